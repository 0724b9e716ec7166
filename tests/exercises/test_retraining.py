"""Exercises about retraining few parameters."""

import re

import pytest
import torch

import perpkit as pk


def share(model, counted=lambda model: list(model.parameters())):
    return sum(p.numel() for p in counted(model) if p.requires_grad) / sum(p.numel() for p in counted(model))


def both_tied(model):
    return [p for _, p in model.named_parameters(remove_duplicate=False)]


def over_the_state(model):
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    tied = len(both_tied(model)) - len(list(model.parameters()))
    return trained / sum(t.numel() for t in list(model.state_dict().values())[: -tied or None])


def test_a_right_share_passes():
    assert pk.exercises.check_share(share)
    assert pk.exercises.check_share(lambda model: torch.tensor(share(model), dtype=torch.float64))


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda model: 100 * share(model), "a fraction, not per cent"),
        (lambda model: 1 - share(model), "share of the frozen"),
        (lambda model: share(model) / max(1e-9, 1 - share(model)), "divide by the frozen"),
        (
            lambda model: sum(p.requires_grad for p in model.parameters()) / len(list(model.parameters())),
            "count tensors",
        ),
        (lambda model: share(model, both_tied), "tied matrix twice"),
        (over_the_state, "Buffers are no parameters"),
        (lambda model: "a third", "a str; want a number"),
        (lambda model: 0.4, "your share is 0.4; want 2/8 = 0.25$"),
        (lambda model: None, "returns nothing yet"),
    ],
)
def test_a_wrong_share_is_told_why(answer, said):
    verdict = pk.exercises.check_share(answer)
    assert not verdict
    assert re.search(said, verdict.words)


def step(weight, gradient, velocity, mask, lr, momentum):
    return (weight - lr * (momentum * velocity + gradient)) * mask


def test_a_right_step_passes():
    assert pk.exercises.check_masked_step(step)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda w, g, v, m, lr, mu: w - lr * (mu * v + g), r"pruned weight at \(0, 1\) is -0.2, not zero"),
        (lambda w, g, v, m, lr, mu: w - lr * (mu * v + g * m), "masking the gradient is not enough"),
        (lambda w, g, v, m, lr, mu: (w - lr * (mu * v + g)) * ~m, "the wrong way round"),
        (lambda w, g, v, m, lr, mu: (w + lr * (mu * v + g)) * m, "goes up the gradient"),
        (lambda w, g, v, m, lr, mu: (w - lr * g) * m, "leaves the velocity out"),
        (lambda w, g, v, m, lr, mu: w * m, r"has 1 at \(0, 0\); want 0.9"),
        (lambda w, g, v, m, lr, mu: torch.zeros_like(w), r"has 0 at \(0, 0\)"),
        (lambda w, g, v, m, lr, mu: w.sub_(lr * g), "changes its argument 1 in place"),
        (lambda w, g, v, m, lr, mu: w[0], "has shape"),
    ],
)
def test_a_wrong_step_is_told_why(answer, said):
    verdict = pk.exercises.check_masked_step(answer)
    assert not verdict
    assert re.search(said, verdict.words)


def test_a_right_gradient_passes():
    assert pk.exercises.check_masked_gradient(lambda x, grad, mask: grad.T @ x * mask)
    assert pk.exercises.check_masked_gradient(lambda x, grad, mask: torch.where(mask, grad.T @ x, 0.0))


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda x, grad, mask: grad.T @ x, r"pruned weight at \(0, 1\) is 2, not zero"),
        (lambda x, grad, mask: grad.T @ x * ~mask, "the wrong way round"),
        (lambda x, grad, mask: grad.T @ x * mask / len(x), "a mean over the tokens"),
        (lambda x, grad, mask: -(grad.T @ x * mask), r"has -1 at \(0, 0\); want 1"),
        (lambda x, grad, mask: mask * 1.0, r"has 1 at \(1, 0\); want 3"),
        (lambda x, grad, mask: x, "has shape"),
        (lambda x, grad, mask: x.T @ grad * mask.T, r"is \(3, 2\), that is transposed; want \(2, 3\)"),
    ],
)
def test_a_wrong_gradient_is_told_why(answer, said):
    verdict = pk.exercises.check_masked_gradient(answer)
    assert not verdict
    assert re.search(said, verdict.words)


def test_a_transposed_gradient_is_told_so():
    verdict = pk.exercises.check_masked_gradient(
        lambda x, grad, mask: grad.T @ x * mask if len(x) == 1 else (grad.T @ x * mask).T
    )
    assert "transposed" in verdict.words
