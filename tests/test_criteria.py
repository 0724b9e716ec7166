"""Pruning criteria."""

import pytest
import torch

from perpkit.pruning.criteria import magnitude, random, ria, wanda


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


# --- criteria that look at the inputs ---------------------------------------------------------------


@pytest.fixture
def layer():
    """A weight [5, 7], the lengths of its inputs, and one length for each weight, in float64."""
    draw = generator(0)
    weight = torch.randn(5, 7, dtype=torch.float64, generator=draw)
    norms = torch.rand(7, dtype=torch.float64, generator=draw) * 10
    own = torch.rand(5, 7, dtype=torch.float64, generator=draw)
    return weight, norms, own


def test_wanda_is_the_size_times_the_length_of_the_input(layer):
    weight, norms, own = layer
    scores = wanda(weight, norms)
    for i in range(5):
        for j in range(7):
            assert scores[i, j].item() == pytest.approx(abs(weight[i, j].item()) * norms[j].item(), rel=1e-14)
    assert torch.equal(wanda(weight, own), weight.abs() * own)


@pytest.mark.parametrize("power", [0.5, 0.0, 1.0])
def test_ria_is_the_share_in_row_and_column_times_a_power(layer, power):
    weight, norms, own = layer
    size = weight.abs().tolist()
    scores, scores_own = ria(weight, norms, power), ria(weight, own, power=power)
    for i in range(5):
        for j in range(7):
            row, column = sum(size[i]), sum(size[k][j] for k in range(5))
            share = size[i][j] / row + size[i][j] / column
            assert scores[i, j].item() == pytest.approx(share * norms[j].item() ** power, rel=1e-12)
            assert scores_own[i, j].item() == pytest.approx(share * own[i, j].item() ** power, rel=1e-12)


def test_ria_takes_the_square_root_unless_told(layer):
    weight, norms, _ = layer
    assert torch.equal(ria(weight, norms), ria(weight, norms, 0.5))


def test_rows_and_columns_of_zeros_score_zero(layer):
    weight, norms, _ = layer
    weight[2], weight[:, 3], norms[4] = 0, 0, 0
    scores = ria(weight, norms)
    assert scores.isfinite().all()
    zero = torch.zeros(5, 7, dtype=torch.bool)
    zero[2], zero[:, 3], zero[:, 4] = True, True, True
    assert torch.equal(scores == 0, zero)


@pytest.mark.parametrize("score", [wanda, ria])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_scored_like_exact_ones(score, dtype):
    weight = torch.randn(300, 400, generator=generator(0)).to(dtype)
    norms = torch.rand(400, generator=generator(1))
    before = weight.clone()
    scores = score(weight, norms)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, score(weight.double(), norms.double()).float())
    assert torch.equal(weight, before)


@pytest.mark.parametrize("score", [wanda, ria])
@pytest.mark.parametrize("shape", [(5,), (5, 1), (1, 7), (7, 5), ()])
def test_norms_of_another_shape_are_refused(layer, score, shape):
    with pytest.raises(
        ValueError, match=r"the norms have shape .*; a weight \(5, 7\) needs one for each input"
    ):
        score(layer[0], torch.ones(shape))
