"""Exercises about retraining few parameters: their share, and pruned weights that stay zero."""

import math
from collections.abc import Callable

import torch
from torch import nn

from ...retraining.subsets import trainable_share
from .verdict import Wrong, call, check, close, number, same_kind


@check("every trained number counted, a tied matrix once, and no buffer")
def check_share(my_share: Callable[[nn.Module], float]) -> None:
    """Check `my_share(model)`: the fraction of a model's parameters that require gradients, a tied one once.

    Numbers are counted, not tensors, and over all parameters, not over the frozen ones.

    >>> check_share(lambda model: 0.4)
    ✗ not yet: of a layer with 6 frozen weights and 2 trained biases your share is 0.4; want 2/8 = 0.25
    """
    for model, words in _models():
        want = trainable_share(model)
        got = number("your share", call(my_share, model))
        if math.isclose(got, want, rel_tol=1e-6):
            continue
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        total = sum(p.numel() for p in model.parameters())
        raise Wrong(
            f"of {words} your share is {got:.6g}; want {trained}/{total} = {want:.6g}{_why(model, got, want)}"
        )


def _why(model: nn.Module, got: float, want: float) -> str:
    """The mistake behind a share, where it is a common one."""
    parameters = list(model.parameters())
    tensors = sum(p.requires_grad for p in parameters)
    twice = [p for _, p in model.named_parameters(remove_duplicate=False)]
    numbers = sum(p.numel() for p in parameters)
    buffers = sum(b.numel() for b in model.buffers())
    guesses = [
        (100 * want, ". It is a fraction, not per cent"),
        (want / (1 - want) if want < 1 else math.nan, ". You divide by the frozen parameters, not by all"),
        (1 - want, ". That is the share of the frozen ones"),
        (tensors / len(parameters), ". You count tensors, not the numbers in them"),
        (
            sum(p.numel() for p in twice if p.requires_grad) / sum(p.numel() for p in twice),
            ". You count the tied matrix twice",
        ),
        (
            sum(p.numel() for p in parameters if p.requires_grad) / sum(p.numel() for p in twice),
            ". You count the tied matrix twice",
        ),
        (want * numbers / (numbers + buffers), ". Buffers are no parameters; nobody trains them"),
    ]
    return next((words for value, words in guesses if math.isclose(got, value, rel_tol=1e-6)), "")


def _models() -> list[tuple[nn.Module, str]]:
    layer = nn.Linear(3, 2)
    layer.weight.requires_grad_(False)
    normed = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4))
    normed[0].requires_grad_(False)
    tied = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 4), nn.Linear(4, 10, bias=False))
    tied[2].weight = tied[0].weight
    tied[1].weight.requires_grad_(False)
    return [
        (layer, "a layer with 6 frozen weights and 2 trained biases"),
        (normed, "a frozen convolution with a batch normalisation"),
        (tied, "an embedding tied to the head around a layer"),
        (nn.Linear(2, 2).requires_grad_(False), "a layer that is all frozen"),
    ]


@check("a step of SGD with momentum, and every pruned weight exactly zero after it")
def check_masked_step(my_step: Callable[..., torch.Tensor]) -> None:
    """Check `my_step(weight, gradient, velocity, mask, lr, momentum)`: the new weight, its zeros kept.

    All four tensors are `[out, in]`, the mask True = kept. Momentum makes `v = momentum * velocity +
    gradient` and moves the weight by `-lr * v`; pruned weights are exactly zero afterwards, whatever the
    velocity holds.

    >>> check_masked_step(lambda weight, gradient, velocity, mask, lr, momentum: weight - lr * gradient)
    ✗ not yet: after the step the pruned weight at (0, 1) is -0.2, not zero
    """
    generator = torch.Generator().manual_seed(0)
    mask = torch.tensor([[True, False], [False, True]])
    weight = torch.tensor([[1.0, 0.0], [0.0, -2.0]])
    gradient = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    velocity = torch.tensor([[0.5, 0.0], [1.0, -1.0]])
    large = torch.rand(6, 5, generator=generator) < 0.5
    random = [torch.randn(6, 5, generator=generator) for _ in range(3)]
    for w, g, v, m, lr, momentum in [
        (weight, gradient, torch.zeros(2, 2), mask, 0.1, 0.9),
        (weight, gradient, velocity, mask, 0.1, 0.9),
        (random[0] * large, random[1], random[2], large, 0.01, 0.5),
    ]:
        got = same_kind("the weight", call(my_step, w, g, v, m, lr, momentum), w)
        _zeros(got, m, "weight", "after the step the pruned weight", _carried(v, m))
        want = (w - lr * (momentum * v + g)) * m
        if torch.allclose(got.detach(), (w + lr * (momentum * v + g)) * m, atol=1e-6):
            raise Wrong("your step goes up the gradient; a loss is lowered by going against it")
        if v.any() and torch.allclose(got.detach(), (w - lr * g) * m, atol=1e-6):
            raise Wrong("your step leaves the velocity out; it goes on with momentum times what it was")
        close("the weight after the step", got, want)


def _carried(velocity: torch.Tensor, mask: torch.Tensor) -> str:
    if not velocity[~mask].any():
        return ""
    return ". Its velocity was not zero: masking the gradient is not enough"


@check("the gradient reaches the kept weights only, and it is that of the loss")
def check_masked_gradient(my_gradient: Callable[..., torch.Tensor]) -> None:
    """Check `my_gradient(x, grad, mask)`: the gradient of a loss for the weight of a pruned layer.

    The layer computes `y = x (M ⊙ W)ᵀ`; `x` is `[tokens, in]`, `grad` is `∂L/∂y` `[tokens, out]`, the mask M
    `[out, in]`, True = kept. The answer `∂L/∂W` is `[out, in]`.

    >>> check_masked_gradient(lambda x, grad, mask: grad.T @ x)
    ✗ not yet: the gradient of the pruned weight at (0, 1) is 2, not zero
    """
    generator = torch.Generator().manual_seed(0)
    small = (
        torch.tensor([[1.0, 2.0, 1.0]]),
        torch.tensor([[1.0, 3.0]]),
        torch.tensor([[True, False, True], [True] * 3]),
    )
    large = (
        torch.randn(7, 4, generator=generator),
        torch.randn(7, 5, generator=generator),
        torch.rand(5, 4, generator=generator) < 0.5,
    )
    for x, grad, mask in (small, large):
        weight = torch.zeros(mask.shape, requires_grad=True)
        (want,) = torch.autograd.grad(x @ (mask * weight).T, weight, grad)
        got = call(my_gradient, x, grad, mask)
        if torch.is_tensor(got) and got.shape == want.T.shape != want.shape:
            raise Wrong(f"the gradient is {tuple(got.shape)}, that is transposed; want {tuple(want.shape)}")
        got = same_kind("the gradient", got, want)
        _zeros(got, mask, "gradient", "the gradient of the pruned weight", "")
        if len(x) > 1 and torch.allclose(got.detach(), want / len(x), atol=1e-6):
            raise Wrong("your gradient is a mean over the tokens; the chain rule sums over them")
        close("the gradient", got, want)


def _zeros(got: torch.Tensor, mask: torch.Tensor, what: str, words: str, hint: str) -> None:
    """Raise `Wrong` naming the first pruned place that is not exactly zero."""
    if (got.detach() * mask == 0).all() and (got.detach()[~mask] != 0).any():
        raise Wrong(f"the {what} is zero where weights are kept: the mask is the wrong way round")
    alive = (got.detach() != 0) & ~mask
    if alive.any():
        place = tuple(alive.nonzero()[0].tolist())
        raise Wrong(f"{words} at {place} is {got[place].item():.4g}, not zero{hint}")
