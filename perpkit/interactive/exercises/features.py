"""Exercises about distorted features: how far they are off, how alike they stay, what a bias can mend."""

from collections.abc import Callable

import torch

from ...evaluation.distortion import linear_cka, relative_error
from .verdict import Wrong, call, check, close, number, same_kind


@check("the distance, measured in lengths of the reference")
def check_relative_error(my_error: Callable[[torch.Tensor, torch.Tensor], float]) -> None:
    """Check `my_error(reference, other)`: `‖reference − other‖ / ‖reference‖`, norms over all values.

    >>> check_relative_error(lambda reference, other: (reference - other).norm())
    ✗ not yet: for [[3.0, 4.0]] against [[3.0, 0.0]] you say 4; want 0.8
    """
    generator = torch.Generator().manual_seed(0)
    several = torch.randn(2, 3, 4, generator=generator), torch.randn(2, 3, 4, generator=generator)
    cases = [
        (torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 0.0]])),
        (torch.tensor([[1.0, 0.0], [0.0, 9.0]]), torch.tensor([[0.0, 0.0], [0.0, 9.0]])),
        several,
    ]
    for reference, other in cases:
        got, want = number("the error", call(my_error, reference, other)), relative_error(reference, other)
        if abs(got - want) > 1e-5:
            case = f"{reference.tolist()} against {other.tolist()}" if reference.ndim == 2 else "random maps"
            raise Wrong(f"for {case} you say {got:.4g}; want {want:.4g}")


@check("alike up to shifts, rotations and one scale")
def check_cka(my_cka: Callable[[torch.Tensor, torch.Tensor], float]) -> None:
    """Check `my_cka(x, y)`: the linear CKA of features `[n, d]` and `[n, e]` of the same n inputs.

    With the columns centred it is `‖YᵀX‖² / (‖XᵀX‖ ‖YᵀY‖)`, with Frobenius norms.

    >>> check_cka(lambda x, y: (y.T @ x).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm()))
    ✗ not yet: a shift of all features by 3 changes your value from 1 to 0.05535: centre the columns
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 4, generator=generator, dtype=torch.float64)
    y = x @ torch.randn(4, 6, generator=generator, dtype=torch.float64) + torch.randn(
        50, 6, generator=generator, dtype=torch.float64
    )
    x, y = x - x.mean(0), y - y.mean(0)
    itself = number("the similarity", call(my_cka, x, x))
    if abs(itself - 1) > 1e-6:
        raise Wrong(f"features are as like themselves as can be: 1; you say {itself:.4g}")
    shifted = number("the similarity", call(my_cka, x, x + 3))
    if abs(shifted - itself) > 1e-6:
        raise Wrong(
            f"a shift of all features by 3 changes your value from 1 to {shifted:.4g}: centre the columns"
        )
    got, want = number("the similarity", call(my_cka, x, y)), linear_cka(x, y)
    shifted = number("the similarity", call(my_cka, x + 3, y))
    if abs(shifted - got) > 1e-6:
        raise Wrong(
            f"a shift of the first features by 3 changes your value from {got:.4g} to {shifted:.4g}: centre "
            "the columns of both"
        )
    if abs(got - want) > 1e-6:
        hint = ": the norm of YᵀX enters as its square" if abs(got**2 - want) < 0.05 else ""
        raise Wrong(f"for two random features of 4 and 6 columns you say {got:.4f}; want {want:.4f}{hint}")
    scaled = number("the similarity", call(my_cka, x, 5 * y))
    if abs(scaled - want) > 1e-6:
        raise Wrong(
            f"five times as large features make {scaled:.4f} out of {want:.4f}; the scale must not count"
        )


Bias = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@check("the bias takes over the mean of what the pruned weights gave")
def check_bias(my_bias: Bias) -> None:
    """Check `my_bias(inputs, weight, pruned, bias)`: the bias that repairs a pruned layer best.

    The dense layer made `inputs @ weight.T + bias`, the pruned one has the weight `pruned`; the shapes are
    `[n, in]`, `[out, in]`, `[out, in]` and `[out]`. Of all new biases `[out]` it has the least squared error.

    >>> check_bias(lambda inputs, weight, pruned, bias: bias)
    ✗ not yet: the bias has 20 at (0,); want 22. Pruned weights gave something on the average: add it
    """
    generator = torch.Generator().manual_seed(0)
    cases = [
        (
            torch.tensor([[1.0, 0.0], [3.0, 2.0]]),
            torch.tensor([[1.0, 5.0]]),
            torch.tensor([[0.0, 5.0]]),
            # No wrong answer that one would think of comes to the same as another.
            torch.tensor([20.0]),
        )
    ]
    weight = torch.randn(3, 5, generator=generator)
    inputs = torch.randn(20, 5, generator=generator) + 1
    cases.append((inputs, weight, weight * (weight.abs() > 0.5), torch.randn(3, generator=generator)))
    for inputs, weight, pruned, bias in cases:
        lost = (inputs @ (weight - pruned).T).mean(0)
        got = same_kind("the bias", call(my_bias, inputs, weight, pruned, bias), bias).detach()
        try:
            close("the bias", got, bias + lost, 1e-4)
        except Wrong as wrong:
            hint = ""
            if torch.allclose(got, bias):
                hint = ". Pruned weights gave something on the average: add it"
            elif torch.allclose(got, lost, atol=1e-5):
                hint = ". The old bias is still needed"
            elif torch.allclose(got, bias + (weight - pruned).sum(1), atol=1e-5):
                hint = ". A pruned weight gave its value times its input: the mean input counts"
            elif torch.allclose(got, bias - lost, atol=1e-5):
                hint = ". The sign is the wrong way round"
            raise Wrong(f"{wrong}{hint}") from None
