"""Exercises about which weights go."""

import re

import pytest

import perpkit as pk


def right(weight, sparsity):
    order = weight.abs().flatten().argsort(stable=True)
    return (order.argsort() >= round(sparsity * weight.numel())).view_as(weight)


def mask_from_the_end(weight, sparsity):
    order = weight.abs().flatten().flip(0).argsort(stable=True)
    return (order.argsort() >= round(sparsity * weight.numel())).flip(0).view_as(weight)


def mirrored_if_large(weight, sparsity):
    mask = right(weight, sparsity)
    return mask.flip(0) if weight.numel() > 9 else mask


def test_a_right_mask_passes():
    assert pk.exercises.check_mask(right)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda weight, sparsity: weight.abs() > weight.abs().flatten().quantile(sparsity), "you keep"),
        (lambda weight, sparsity: weight > 0, "the largest in magnitude are"),
        (lambda weight, sparsity: ~right(weight, sparsity), "the largest in magnitude are"),
        (mirrored_if_large, r"you keep -?\d\.\d+ at \(\d, \d\) and prune .*, which is larger in magnitude"),
        (mask_from_the_end, "prune those that come first"),
        (lambda weight, sparsity: right(weight, sparsity).flatten(), r"has shape \(4,\); want \(2, 2\)"),
        (lambda weight, sparsity: weight * right(weight, sparsity), "want torch.bool"),
        (lambda weight, sparsity: None, "returns nothing yet"),
        (lambda weight, sparsity: weight.zero_() == 0, "changes its argument 1 in place"),
        (lambda weight, sparsity: weight[9], "raises IndexError.*its line 1"),
    ],
)
def test_a_wrong_mask_is_told_why(answer, said):
    verdict = pk.exercises.check_mask(answer)
    assert not verdict
    assert re.search(said, verdict.words)
