"""Exercises about which weights go: exact counts and ties."""

from collections.abc import Callable

import torch

from .verdict import Wrong, call, check, same_kind


@check("exactly as many as asked, the largest, and ties settled by position")
def check_mask(my_mask: Callable[[torch.Tensor, float], torch.Tensor]) -> None:
    """Check `my_mask(weight, sparsity)`: the boolean mask that magnitude pruning keeps, True = kept.

    It must prune exactly `round(sparsity * n)` weights, the smallest in magnitude, and among equal ones
    those that come first.

    >>> check_mask(lambda weight, sparsity: weight > 0)
    ✗ not yet: of [[-3.0, 1.0], [2.0, -0.5]] at sparsity 0.5 you keep [[False, True], [True, False]]; the \
largest in magnitude are [[True, False], [True, False]]
    """
    for weight, sparsity in _cases():
        want = _reference(weight, sparsity)
        got = same_kind("the mask", call(my_mask, weight, sparsity), want)
        if got.dtype != torch.bool:
            raise Wrong(f"the mask is of {got.dtype}; want torch.bool")
        asked = f"of {weight.tolist()} at sparsity {sparsity}" if weight.numel() < 10 else "of a 7×9 matrix"
        if got.sum() != want.sum():
            equal = weight.abs().unique().numel() < weight.numel()
            hint = " Some of them are equal: a threshold takes all or none of those." if equal else ""
            raise Wrong(f"{asked} you keep {int(got.sum())} weights; want {int(want.sum())}.{hint}")
        if torch.equal(got, want):
            continue
        if torch.equal(weight.abs()[got].sort().values, weight.abs()[want].sort().values):
            raise Wrong(f"{asked} the count is right; among equal weights prune those that come first")
        if weight.numel() < 10:
            raise Wrong(f"{asked} you keep {got.tolist()}; the largest in magnitude are {want.tolist()}")
        # Of the two places that differ most, so that nobody has to search two large matrices.
        kept = int(weight.abs().masked_fill(~got | want, torch.inf).argmin())
        pruned = int(weight.abs().masked_fill(got | ~want, -1.0).argmax())
        places = [tuple(divmod(place, weight.shape[1])) for place in (kept, pruned)]
        sizes = [f"{weight.flatten()[place]:.2f}" for place in (kept, pruned)]
        raise Wrong(
            f"{asked} you keep {sizes[0]} at {places[0]} and prune {sizes[1]} at {places[1]}, "
            "which is larger in magnitude"
        )


def _cases() -> list[tuple[torch.Tensor, float]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.tensor([[-3.0, 1.0], [2.0, -0.5]]), 0.5),
        (torch.randn(7, 9, generator=generator), 0.37),
        # 22.68 of 63, where rounding down is another number.
        (torch.randn(7, 9, generator=generator), 0.36),
        (torch.tensor([[3.0, 1.0, 1.0], [1.0, -2.0, 1.0]]), 0.5),
        (torch.tensor([[1.0, 2.0], [3.0, 4.0]]), 0.0),
        (torch.tensor([[1.0, 2.0], [3.0, 4.0]]), 1.0),
    ]


def _reference(weight: torch.Tensor, sparsity: float) -> torch.Tensor:
    order = weight.abs().flatten().argsort(stable=True)
    mask = torch.ones(weight.numel(), dtype=torch.bool)
    mask[order[: round(sparsity * weight.numel())]] = False
    return mask.view_as(weight)
