"""Pruning criteria."""

import pytest
import torch

from perpkit.pruning.criteria import magnitude, random


def generator(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_magnitude_is_the_absolute_value(dtype):
    weight = torch.tensor([[-2.0, 0.5], [0.0, -0.0]], dtype=dtype)
    scores = magnitude(weight)
    assert scores.tolist() == [[2.0, 0.5], [0.0, 0.0]]
    assert scores.dtype == dtype
    assert weight.tolist() == [[-2.0, 0.5], [0.0, 0.0]]


def test_random_scores_are_uniform_and_look_at_nothing():
    weight = torch.linspace(-1, 1, 40_000).view(200, 200)
    scores = random(weight, generator(0))
    assert scores.shape == weight.shape
    assert scores.min() >= 0
    assert scores.max() < 1
    counts = torch.histc(scores, bins=10, min=0, max=1)
    assert (counts - 4000).abs().max() < 5 * (4000 * 0.9) ** 0.5
    assert torch.corrcoef(torch.stack([scores.flatten(), weight.flatten()]))[0, 1].abs() < 5 / 200


def test_random_scores_come_from_the_generator_alone(generators_unchanged):
    weight = torch.ones(8, 8)
    assert torch.equal(random(weight, generator(0)), random(-weight, generator(0)))
    assert not torch.equal(random(weight, generator(0)), random(weight, generator(1)))
    shared = generator(0)
    assert not torch.equal(random(weight, shared), random(weight, shared))


def test_random_scores_of_half_precision_weights_have_no_ties():
    # a bfloat16 has 256 values in [0.5, 1): noise drawn as one would tie
    scores = random(torch.ones(64, 64, dtype=torch.bfloat16), generator(0))
    assert len(scores.unique()) > 4000
