"""Exercises about low-rank adapters on pruned layers."""

import re

import pytest
import torch

import perpkit as pk


def merge(weight, mask, a, b, alpha):
    return weight + mask * (alpha / len(a) * (b @ a))


def test_a_right_merge_passes():
    assert pk.exercises.check_merge(merge)
    assert pk.exercises.check_merge(lambda w, m, a, b, alpha: torch.where(m, w + alpha / len(a) * b @ a, 0.0))


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda w, m, a, b, alpha: w + alpha / len(a) * b @ a, "which is pruned, is 8, not zero"),
        (lambda w, m, a, b, alpha: w + m * (b @ a), "lacks the scale"),
        (lambda w, m, a, b, alpha: w + m * (alpha * b @ a), "scaled by α; want α/r"),
        (lambda w, m, a, b, alpha: w + m * (b @ a / len(a)), "scaled by 1/r"),
        (lambda w, m, a, b, alpha: w, "the update is missing"),
        (lambda w, m, a, b, alpha: w + ~m * (alpha / len(a) * b @ a), "the wrong way round"),
        (lambda w, m, a, b, alpha: m * (alpha / len(a) * b @ a), r"has 4 at \(0, 0\); want 5"),
        (lambda w, m, a, b, alpha: w + m * (alpha / len(a) * a.T @ b.T), "raises RuntimeError"),
        (lambda w, m, a, b, alpha: torch.zeros_like(w), r"has 0 at \(0, 0\); want 5"),
        (lambda w, m, a, b, alpha: b @ a @ w.T, "has shape"),
        (lambda w, m, a, b, alpha: w.add_(m * (b @ a)), "changes its argument 1 in place"),
    ],
)
def test_a_wrong_merge_is_told_why(answer, said):
    verdict = pk.exercises.check_merge(answer)
    assert not verdict
    assert re.search(said, verdict.words)


def gradient(x, grad, mask, a, scale):
    return scale * (mask * (grad.T @ x)) @ a.T


def test_a_right_gradient_passes():
    assert pk.exercises.check_lora_gradient(gradient)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda x, grad, mask, a, scale: scale * grad.T @ x @ a.T, "leaves the mask out"),
        (lambda x, grad, mask, a, scale: (mask * (grad.T @ x)) @ a.T, "lacks the scale"),
        (lambda x, grad, mask, a, scale: scale * gradient(x, grad, mask, a, scale), "the scale σ twice"),
        (
            lambda x, grad, mask, a, scale: gradient(x, grad, mask, a, scale) / len(x),
            "a mean over the tokens",
        ),
        (lambda x, grad, mask, a, scale: -gradient(x, grad, mask, a, scale), "wrong sign"),
        (lambda x, grad, mask, a, scale: gradient(x, grad, ~mask, a, scale), "the gradient has"),
        (lambda x, grad, mask, a, scale: torch.ones(grad.shape[1], len(a)), "the gradient has 1 at"),
        (lambda x, grad, mask, a, scale: scale * mask * (grad.T @ x), "has shape"),
        (lambda x, grad, mask, a, scale: None, "returns nothing yet"),
    ],
)
def test_a_wrong_gradient_is_told_why(answer, said):
    verdict = pk.exercises.check_lora_gradient(answer)
    assert not verdict
    assert re.search(said, verdict.words)


def test_a_transposed_gradient_is_told_so():
    def transposed(x, grad, mask, a, scale):
        found = gradient(x, grad, mask, a, scale)
        return found if found.shape == (2, 2) else found.T

    assert "transposed" in pk.exercises.check_lora_gradient(transposed).words


def start(rows, columns, rank):
    return torch.full((rank, columns), rank**-0.5), torch.full((rows, rank), rank**-0.5)


def test_a_right_start_passes():
    assert pk.exercises.check_scale_start(start)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda n, m, r: (torch.ones(r, m), torch.ones(n, r)), "at rank 2 your BA is 2 everywhere"),
        (lambda n, m, r: (torch.ones(r, m) / r, torch.ones(n, r) / r), "your BA is 0.5 everywhere"),
        (lambda n, m, r: (torch.ones(r, m), torch.zeros(n, r)), "erases the layer"),
        (lambda n, m, r: start(n, m, r)[::-1], "want A first"),
        (lambda n, m, r: (torch.arange(r * m).view(r, m) / 9, torch.ones(n, r)), "not the same everywhere"),
        (lambda n, m, r: (torch.ones(r, m), torch.ones(n, r) / r), r"A has 1 at \(0, 0\); want 0.70711"),
        (lambda n, m, r: start(m, n, r), "A has shape"),
        (lambda n, m, r: start(3, 5, 2), "A has shape"),
        (lambda n, m, r: torch.ones(n, m), "want the two factors"),
    ],
)
def test_a_wrong_start_is_told_why(answer, said):
    verdict = pk.exercises.check_scale_start(answer)
    assert not verdict
    assert re.search(said, verdict.words)
