"""Exercises about low-rank adapters on pruned layers: merging, gradients, a start that changes nothing."""

from collections.abc import Callable

import torch
from torch import Tensor

from ...retraining.adapters.masklora import mask_lora_linear
from ...retraining.adapters.modules import Adapter
from .verdict import Wrong, call, check, close, same_kind


@check("merged as it was trained: scaled, masked, and as sparse as before")
def check_merge(my_merge: Callable[..., Tensor]) -> None:
    """Check `my_merge(weight, mask, a, b, alpha)`: MaskLoRA's merged weight `W + M ⊙ (α/r) BA`.

    `weight` `[out, in]` is zero where `mask` is False, `a` is A `[r, in]`, `b` is B `[out, r]`.

    >>> check_merge(lambda weight, mask, a, b, alpha: weight + alpha / len(a) * b @ a)
    ✗ not yet: the merged weight at (0, 1), which is pruned, is 8, not zero: merging must not undo the pruning
    """
    for weight, mask, a, b, alpha in _layers():
        want = Adapter("mask_lora", alpha / len(a)).effective(weight, mask, a, b)
        got = same_kind("the merged weight", call(my_merge, weight, mask, a, b, alpha), weight).detach()
        if (got[~mask] == 0).all():
            for factor, words in [
                (1.0, "your update lacks the scale α/r"),
                (alpha, "your update is scaled by α; want α/r"),
                (1 / len(a), "your update is scaled by 1/r; want α/r"),
                (0.0, "your merged weight is the pruned one: the update is missing"),
            ]:
                if torch.allclose(got, weight + mask * (factor * b @ a)) and not torch.allclose(got, want):
                    raise Wrong(words)
        elif torch.allclose(got, weight + ~mask * (alpha / len(a) * b @ a)):
            raise Wrong("the update goes into the pruned places: the mask is the wrong way round")
        for place in ((got != 0) & ~mask).nonzero()[:1].tolist():
            raise Wrong(
                f"the merged weight at {tuple(place)}, which is pruned, is {got[tuple(place)].item():.4g}, "
                "not zero: merging must not undo the pruning"
            )
        close("the merged weight", got, want)


@check("exact, and nothing but x, grad, the mask and A was needed")
def check_lora_gradient(my_gradient: Callable[..., Tensor]) -> None:
    """Check `my_gradient(x, grad, mask, a, scale)`: MaskLoRA's gradient `∂L/∂B = σ E Aᵀ`, `E = (gᵀx) ⊙ M`.

    The layer is `y = x (W + M ⊙ σBA)ᵀ`; `x` is `[tokens, in]`, `grad` is `g = ∂L/∂y` `[tokens, out]`, `mask`
    `[out, in]`, `a` is A `[r, in]`, `scale` is σ. The answer is `[out, r]`.

    >>> check_lora_gradient(lambda x, grad, mask, a, scale: scale * grad.T @ x @ a.T)
    ✗ not yet: your gradient leaves the mask out: it moves B for weights that are pruned
    """
    generator = torch.Generator().manual_seed(0)
    for weight, mask, a, b, alpha in _layers():
        x = torch.randn(6, weight.shape[1], generator=generator)
        grad = torch.randn(6, weight.shape[0], generator=generator)
        scale = alpha / len(a)
        trained = b.clone().requires_grad_()
        y = mask_lora_linear(x, weight, mask, a, trained, scale=scale)
        (want,) = torch.autograd.grad(y, trained, grad)
        got = call(my_gradient, x, grad, mask, a, scale)
        if torch.is_tensor(got) and got.shape == want.T.shape != want.shape:
            raise Wrong(f"the gradient is {tuple(got.shape)}, that is transposed; want {tuple(want.shape)}")
        got = same_kind("the gradient", got, want).detach()
        for wrong, words in [
            (scale * grad.T @ x @ a.T, "leaves the mask out: it moves B for weights that are pruned"),
            (want / scale, "lacks the scale σ"),
            (want * scale, "has the scale σ twice"),
            (want / len(x), "is a mean over the tokens; the chain rule sums over them"),
            (-want, "has the wrong sign: the step subtracts it, not you"),
        ]:
            if torch.allclose(got, wrong, rtol=1e-4, atol=1e-4):
                raise Wrong(f"your gradient {words}")
        close("the gradient", got, want, 1e-4)


@check("all entries equal, their product all ones, so that W ⊙ BA is W")
def check_scale_start(my_start: Callable[[int, int, int], tuple[Tensor, Tensor]]) -> None:
    """Check `my_start(rows, columns, rank)`: the factors A and B with which ScaleLoRA starts.

    The layer's weight is `W ⊙ BA`. A is `[rank, columns]`, B `[rows, rank]`, all entries of both the same
    positive number, and at the start `W ⊙ BA` is W.

    >>> check_scale_start(lambda rows, columns, rank: (torch.ones(rank, columns), torch.ones(rows, rank)))
    ✗ not yet: at rank 2 your BA is 2 everywhere; want 1, or the weight starts 2 times as large
    """
    for rows, columns, rank in ((3, 5, 2), (4, 4, 1), (6, 3, 3)):
        got = call(my_start, rows, columns, rank)
        if not isinstance(got, tuple | list) or len(got) != 2:
            raise Wrong(f"your function returns a {type(got).__name__}; want the two factors A and B")
        if [tuple(getattr(each, "shape", ())) for each in got] == [(rows, rank), (rank, columns)]:
            raise Wrong("your factors are B, A; want A first, then B")
        a = same_kind("A", got[0], torch.empty(rank, columns)).detach().float()
        b = same_kind("B", got[1], torch.empty(rows, rank)).detach().float()
        product = b @ a
        if not product.any():
            raise Wrong("your BA is zero, and so is W ⊙ BA: the start of LoRA erases the layer here")
        if not torch.allclose(product, torch.ones(())):
            first = product[0, 0].item()
            if torch.allclose(product, product[0, 0]):
                raise Wrong(
                    f"at rank {rank} your BA is {first:.4g} everywhere; want 1, or the weight starts "
                    f"{first:.4g} times as large"
                )
            raise Wrong(f"your BA is not the same everywhere, {first:.4g} at (0, 0); want 1")
        close("A", a, torch.full_like(a, rank**-0.5))
        close("B", b, torch.full_like(b, rank**-0.5))


def _layers() -> list[tuple[Tensor, Tensor, Tensor, Tensor, float]]:
    """Weight, mask, A, B and alpha of layers: a small one to follow by hand, one of rank 1, a random one."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.tensor([[True, False, True], [False, True, True]])
    weight = torch.tensor([[1.0, 0.0, 2.0], [0.0, 3.0, -1.0]])
    a, b = torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, 1.0]]), torch.tensor([[1.0, 0.0], [2.0, -1.0]])
    random = torch.rand(5, 7, generator=generator) < 0.5
    drawn = [torch.randn(*shape, generator=generator) for shape in ((5, 7), (3, 7), (5, 3))]
    return [(weight, mask, a, b, 8.0), (drawn[0] * random, random, drawn[1], drawn[2], 6.0)]
