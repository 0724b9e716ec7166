"""Exercises about the shape of a mask: N:M groups, rows, and how much each layer loses."""

import math
from collections.abc import Callable, Mapping

import torch

from ...pruning.allocation import erk
from ...pruning.selection import select
from .verdict import Wrong, call, check, number, same_kind

Shapes = Mapping[str, tuple[int, ...]]


@check("N of every M along the inputs, the largest of each group, also where weights are equal")
def check_nm(my_nm: Callable[[torch.Tensor, int, int], torch.Tensor]) -> None:
    """Check `my_nm(weight, n, m)`: the boolean mask that keeps N of every M weights, True = kept.

    `weight` is `[out, in]`, `in` a multiple of m. Each group of m consecutive weights of a row keeps exactly
    n, the largest in magnitude; of equal ones any may stay.

    >>> check_nm(lambda weight, n, m: weight.abs() > weight.abs().median())
    ✗ not yet: at 2:4 the group [0, 1, 2, 3] of row 0 keeps 3 weights; want 2
    """
    generator = torch.Generator().manual_seed(0)
    first = torch.tensor([[9.0, 8, 7, 1, 1, 2, 0, 3], [1, 2, 3, -4, 5, 6, -7, 8]])
    square = torch.randn(8, 8, generator=generator)
    ties = torch.tensor([[1.0, 1, 1, 1, 2, -2, 2, 0]])
    cases = [(first, 2, 4), (square, 2, 4), (square, 1, 4), (square, 4, 8), (ties, 2, 4)]
    for weight, n, m in cases:
        mask = _mask(call(my_nm, weight, n, m), weight)
        groups, sizes = mask.reshape(-1, m), weight.abs().reshape(-1, m)
        across = mask.t().reshape(-1, m) if len(weight) % m == 0 else None
        counts = groups.sum(1)
        if (counts != n).any():
            if across is not None and (across.sum(1) == n).all():
                raise Wrong(
                    f"at {n}:{m} your groups run down the outputs; want them along the inputs of a row"
                )
            if (counts == m - n).all():
                raise Wrong(
                    f"at {n}:{m} each group keeps {m - n} weights: N is how many stay, not how many go"
                )
            place = int((counts != n).nonzero()[0])
            row, start = divmod(place * m, weight.shape[1])
            hint = " Some are equal: a threshold takes all or none." if weight is ties else ""
            raise Wrong(
                f"at {n}:{m} the group {list(range(start, start + m))} of row {row} keeps "
                f"{int(counts[place])} weights; want {n}.{hint}".removesuffix("." if not hint else "")
            )
        want = select(weight.abs(), None, pattern=(n, m)).reshape(-1, m)
        _largest(groups, want, sizes, f"at {n}:{m} the group")


@check("every row loses the same number, its own smallest weights")
def check_rows(my_rows: Callable[[torch.Tensor, float], torch.Tensor]) -> None:
    """Check `my_rows(weight, sparsity)`: the mask that prunes every row of `[out, in]` alike, True = kept.

    Each row loses exactly `round(sparsity · in)` weights, its own smallest in magnitude; of equal ones any.

    >>> check_rows(lambda weight, sparsity: weight.abs() > weight.abs().quantile(sparsity))
    ✗ not yet: at sparsity 0.5 row 0 keeps 0 of its 4 weights; want 2. You compare over the whole matrix: \
the small weights of a row must be small beside the others of that row
    """
    generator = torch.Generator().manual_seed(0)
    scaled = torch.tensor([[0.1, -0.2, 0.3, 0.4], [5.0, 6.0, -7.0, 8.0]])
    wide = torch.randn(5, 12, generator=generator) * torch.tensor([1.0, 2, 4, 8, 16])[:, None]
    ties = torch.ones(2, 6)
    square = torch.randn(6, 6, generator=generator)
    for weight, sparsity in [
        (scaled, 0.5),
        (wide, 0.3),
        (square, 0.5),
        (ties, 0.5),
        (scaled, 0.0),
        (scaled, 1.0),
    ]:
        mask = _mask(call(my_rows, weight, sparsity), weight)
        want = select(weight.abs(), sparsity, group="row")
        counts, width = mask.sum(1), weight.shape[1]
        if not torch.equal(counts, want.sum(1)):
            row = int((counts != want.sum(1)).nonzero()[0])
            said = (
                f"at sparsity {sparsity} row {row} keeps {int(counts[row])} of its {width} weights; want "
                f"{int(want[row].sum())}"
            )
            if torch.equal(mask, select(weight.abs(), sparsity)):
                said += (
                    ". You compare over the whole matrix: the small weights of a row must be small beside "
                    "the others of that row"
                )
            elif weight is square and torch.equal(mask, select(weight.abs().t(), sparsity, group="row").t()):
                said += ". You compare within the columns; a row is the weights of one output"
            elif weight is ties:
                said += ". All are equal there: a threshold takes all or none"
            raise Wrong(said)
        _largest(mask, want, weight.abs(), f"at sparsity {sparsity} row")


@check("dense where the formula asks for more than there is, and the whole exactly on target")
def check_erk(my_erk: Callable[[Shapes, float], Mapping[str, float]]) -> None:
    """Check `my_erk(shapes, sparsity)`: the sparsity of every layer by the Erdős–Rényi kernel.

    `shapes` maps names to the weights' shapes, such as `(64, 32, 3, 3)`; the answer maps the same names to
    sparsities. The density `1 − s` of a layer is proportional to (sum of its dimensions) / (their product),
    at most 1, and over all weights together the sparsity is the one asked for. Rounding to whole weights is
    not needed.

    >>> check_erk(lambda shapes, sparsity: {name: sparsity for name in shapes})
    ✗ not yet: the layers are all alike; the density follows (sum of the dimensions) / (their product)
    """
    plain: dict[str, tuple[int, ...]] = {"a": (400, 400), "b": (200, 400), "conv": (64, 64, 3, 3)}
    clipped: dict[str, tuple[int, ...]] = {"wide": (800, 800), "middle": (400, 300), "small": (20, 30)}
    chain: dict[str, tuple[int, ...]] = {"wide": (500, 500), "middle": (50, 50), "small": (20, 20)}
    for shapes, sparsity in [(plain, 0.8), (clipped, 0.5), (chain, 0.3)]:
        got = call(my_erk, dict(shapes), sparsity)
        values = _allocation(got, shapes, sparsity)
        want = erk(shapes, sparsity)
        for name, value in values.items():
            if abs(value - want[name]) > 2 / math.prod(shapes[name]) + 1e-4:
                raise Wrong(
                    f"of {shapes} at sparsity {sparsity} you prune {value:.4f} of {name!r}; want "
                    f"{want[name]:.4f}"
                )


def _allocation(got: object, shapes: Shapes, sparsity: float) -> dict[str, float]:
    """The sparsities by name; raises `Wrong` for the usual mistakes before a single number is compared."""
    if not isinstance(got, Mapping) or set(got) != set(shapes):
        raise Wrong(f"want a dictionary from each of {sorted(shapes)} to its sparsity; got {got!r}")
    values = {name: number(f"the sparsity of {name!r}", value) for name, value in got.items()}
    for name, value in values.items():
        if not -1e-9 <= value <= 1 + 1e-9:
            raise Wrong(
                f"of {shapes} at sparsity {sparsity} the sparsity of {name!r} is {value:.4f}: a layer cannot "
                "be denser than dense, so its density stops at 1"
            )
    if max(values.values()) - min(values.values()) < 1e-6:
        raise Wrong("the layers are all alike; the density follows (sum of the dimensions) / (their product)")
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    whole = sum(values[name] * size for name, size in sizes.items()) / sum(sizes.values())
    if abs(whole - sparsity) > 1e-3:
        mean = sum(values.values()) / len(values)
        reason = "weigh each layer by its number of weights"
        if abs(mean - sparsity) > 1e-3 and min(values.values()) < 1e-9:
            reason = "what a full layer cannot take, the others must: scale them again"
        elif abs(1 - whole - sparsity) < 1e-3:
            reason = "are these densities?"
        raise Wrong(f"of {shapes} at sparsity {sparsity} you prune {whole:.4f} of all weights; {reason}")
    return values


def _mask(got: object, weight: torch.Tensor) -> torch.Tensor:
    return same_kind("the mask", got, weight > 0)


def _largest(got: torch.Tensor, want: torch.Tensor, sizes: torch.Tensor, what: str) -> None:
    """Raise `Wrong` unless each row keeps weights as large as those wanted: of equal ones any."""
    for place in range(len(sizes)):
        kept, best = (sizes[place][mask[place]].sort().values for mask in (got, want))
        if not torch.equal(kept, best):
            raise Wrong(
                f"{what} {place} has the magnitudes {[round(size, 3) for size in sizes[place].tolist()]} and "
                f"keeps {got[place].tolist()}; want the largest"
            )
