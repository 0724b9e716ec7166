"""Exercises about the shape of a mask."""

import math
import re

import pytest
import torch

import perpkit as pk


def nm(weight, n, m):
    groups = weight.abs().view(-1, m)
    best = groups.topk(n, dim=1).indices
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(1, best, True).view(weight.shape)


def nm_by_threshold(weight, n, m):
    groups = weight.abs().view(-1, m)
    return (groups >= groups.topk(n, dim=1).values[:, -1:]).view(weight.shape)


def nm_smallest(weight, n, m):
    return nm(1 / (1e-3 + weight.abs()), n, m)


def rows(weight, sparsity):
    order = weight.abs().argsort(dim=1, stable=True)
    return order.argsort(dim=1) >= round(sparsity * weight.shape[1])


def layer(weight, sparsity):
    order = weight.abs().flatten().argsort(stable=True)
    return (order.argsort() >= round(sparsity * weight.numel())).view_as(weight)


def unclipped_erk(shapes, sparsity):
    raw = {name: sum(shape) / math.prod(shape) for name, shape in shapes.items()}
    total = sum(math.prod(shape) for shape in shapes.values())
    scale = (1 - sparsity) * total / sum(sum(shape) for shape in shapes.values())
    return {name: 1 - scale * value for name, value in raw.items()}


def clipped_erk(shapes, sparsity):
    return {name: max(0.0, value) for name, value in unclipped_erk(shapes, sparsity).items()}


def unweighted_erk(shapes, sparsity):
    raw = {name: sum(shape) / math.prod(shape) for name, shape in shapes.items()}
    mean = sum(raw.values()) / len(raw)
    return {name: max(0.0, 1 - (1 - sparsity) * value / mean) for name, value in raw.items()}


def erk(shapes, sparsity):
    free, dense = dict(shapes), {}
    kept = (1 - sparsity) * sum(math.prod(shape) for shape in shapes.values())
    while True:
        scale = kept / sum(sum(shape) for shape in free.values())
        density = {name: scale * sum(shape) / math.prod(shape) for name, shape in free.items()}
        full = [name for name in free if density[name] > 1]
        if not full:
            return {name: 1 - density.get(name, 1.0) for name in shapes} | dict.fromkeys(dense, 0.0)
        for name in full:
            dense[name] = free.pop(name)
            kept -= math.prod(dense[name])


def test_right_answers_pass():
    assert pk.exercises.check_nm(nm)
    assert pk.exercises.check_rows(rows)
    assert pk.exercises.check_erk(erk)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda weight, n, m: nm(weight, m - n, m), "keeps 3 weights: N is how many stay, not how many go"),
        (lambda weight, n, m: nm(weight.t().contiguous(), n, m).t() if len(weight) > 2 else nm(weight, n, m),
         "groups run down the outputs"),
        (nm_by_threshold, "Some are equal: a threshold takes all or none"),
        (nm_smallest, "want the largest"),
        (lambda weight, n, m: layer(weight, 1 - n / m), "keeps 3 weights; want 2|keeps 1 weights; want 2"),
        (lambda weight, n, m: nm(weight, n, m).view(-1, m), "has shape"),
        (lambda weight, n, m: torch.ones_like(weight), "want torch.bool"),
        (lambda weight, n, m: torch.ones_like(weight, dtype=torch.bool), "keeps 4 weights; want 2"),
        (lambda weight, n, m: torch.arange(weight.numel()).view_as(weight) % m < n, "want the largest"),
    ],
)  # fmt: skip
def test_a_wrong_pattern_is_told_why(answer, said):
    verdict = pk.exercises.check_nm(answer)
    assert not verdict
    assert re.search(said, verdict.words), verdict


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (layer, "You compare over the whole matrix"),
        (
            lambda weight, sparsity: (
                rows(weight.t(), sparsity).t() if weight.shape == (6, 6) else rows(weight, sparsity)
            ),
            "You compare within the columns",
        ),
        (
            lambda weight, sparsity: (
                weight.abs() > weight.abs().kthvalue(max(1, round(sparsity * weight.shape[1])), 1, True)[0]
            ),
            "All are equal there: a threshold takes all or none",
        ),
        (lambda weight, sparsity: ~rows(weight, sparsity), "want the largest"),
        (lambda weight, sparsity: weight.abs() >= 0, "keeps 4 of its 4 weights; want 2"),
    ],
)
def test_wrong_rows_are_told_why(answer, said):
    verdict = pk.exercises.check_rows(answer)
    assert not verdict
    assert re.search(said, verdict.words), verdict


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (unclipped_erk, "a layer cannot be denser than dense"),
        (clipped_erk, "what a full layer cannot take, the others must"),
        (unweighted_erk, "weigh each layer by its number of weights"),
        (
            lambda shapes, sparsity: {n: 1 - s for n, s in erk(shapes, sparsity).items()},
            "are these densities",
        ),
        (lambda shapes, sparsity: dict.fromkeys(shapes, sparsity), "the layers are all alike"),
        (lambda shapes, sparsity: [sparsity], "want a dictionary"),
        (lambda shapes, sparsity: dict.fromkeys(shapes, 0.5), "all alike"),
    ],
)
def test_a_wrong_allocation_is_told_why(answer, said):
    verdict = pk.exercises.check_erk(answer)
    assert not verdict
    assert re.search(said, verdict.words), verdict
