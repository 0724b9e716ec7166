"""SparseGPT: prune column by column and let the weights still to come make up for the error."""

import warnings
from collections.abc import Callable, Iterator
from functools import partial

import torch

from .selection import grouped, highest, select

# Up to this size a matrix is left to LAPACK.
LEAF = 128


@torch.no_grad()
def sparsegpt(
    weight: torch.Tensor,
    gram: torch.Tensor,
    *,
    sparsity: float | None,
    pattern: tuple[int, int] | None = None,
    group: str = "layer",
    damping: float = 0.01,
    block: int = 128,
    kept: torch.Tensor | None = None,
    name: str = "the layer",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prune a weight `[out, in]` and correct what is left (SparseGPT, algorithm 1): the new weight, the mask.

    `gram` is `XᵀX [in, in]` of the calibration inputs, in any positive scale; `H = XᵀX + λ·mean(diag XᵀX)·I`
    with λ = `damping`, and `U` is the upper Cholesky factor of its inverse. Columns go from left to right in
    blocks of `block`. At the start of a block the weights with the lowest `W² / diag(U)²` are chosen, over
    all rows (`group="layer"`, as published) or in each row ("row"); with a `pattern` (N, M) at the start of
    each M columns, whatever the sparsity. The error `(w − ŵ) / U_jj` of a column is then taken from all later
    columns through row j of `U`. The input is left as it is.

    The layer, or each row, loses exactly `round(sparsity · n)` weights: counts are rounded over all blocks so
    far. Weights that an earlier mask `kept` has pruned stay pruned and count; a group that has lost more
    keeps its zeros. Weights of inputs that are always zero become zero and are pruned first.

    The mathematics is in float32 (float64 for a float64 weight), the result in the weight's dtype. Where `H`
    is not positive definite, the damping is raised tenfold until it is, with a warning that names `name`.

    Raises ValueError for what `select` refuses, a gram or a mask that does not fit, damping < 0, block < 1,
    and a weight or gram that is not finite or that no damping can save.

    >>> gram = torch.tensor([[2.0, 0.0, 2.0], [0.0, 1.0, 0.0], [2.0, 0.0, 4.0]])
    >>> sparsegpt(torch.tensor([[1.0, 3.0, 3.0]]), gram, sparsity=1 / 3, damping=0)  # the last takes over
    (tensor([[0.0000, 3.0000, 3.5000]]), tensor([[False,  True,  True]]))
    """
    check_inputs(weight, gram, kept)
    if not damping >= 0:
        raise ValueError(f"damping is {damping}; it is a share of the mean diagonal of XᵀX, at least 0")
    if block < 1:
        raise ValueError(f"block is {block}; it is a number of columns, at least 1")
    grouped(weight, sparsity, group=group, pattern=pattern)
    unused = gram.diagonal() == 0
    if unused.any():
        kept = _prune_first(unused, weight, sparsity, group, pattern, kept)
        weight = weight.masked_fill(unused, 0)
    precise = torch.promote_types(weight.dtype, torch.float32)
    root = _root(gram.to(precise), damping, name)
    # A column of the weight is a contiguous row here.
    columns = torch.empty(weight.t().shape, dtype=precise, device=weight.device).copy_(weight.t())
    mask = torch.empty(columns.shape, dtype=torch.bool, device=weight.device)
    unit = pattern[1] if pattern else 1
    starts = range(0, len(columns), max(block // unit, 1) * unit)
    choices = _choices(starts, weight.shape, kept, sparsity, group, pattern)
    for start, choose in zip(starts, choices, strict=True):
        here = slice(start, start + starts.step)
        corner = root[here, here]
        one = torch.eye(len(corner), dtype=precise, device=weight.device)
        factor = torch.linalg.solve_triangular(corner, one, upper=True)
        # The errors E of all columns so far have moved the weights by E·U = W − Ŵ, which is what `columns`
        # holds of them. U, a whole inverse, is needed only within the block.
        moved = root[:start, here].t() @ columns[:start]
        current = torch.addmm(columns[here], factor.t(), moved)
        held = None if kept is None else kept[:, here].t()
        mask[here] = _prune_block(current, factor, held, unit if pattern else len(current), choose)
        columns[here] -= current
    new = torch.empty(weight.shape, dtype=precise, device=weight.device).copy_(columns.t())
    return torch.sub(weight, new, out=new).to(weight.dtype), mask.t().contiguous()


def _prune_block(columns, factor, held, unit: int, choose: Callable) -> torch.Tensor:
    """Prune the columns of a block in place; returns their mask `[block, out]`."""
    diagonal = factor.diagonal()[:, None]
    mask = torch.empty_like(columns, dtype=torch.bool)
    errors, gains = torch.empty_like(columns), torch.empty_like(columns)
    each = list(zip(columns.unbind(), gains.unbind(), errors.unbind(), strict=True))

    for start, middle, stop in _halves(0, len(columns), unit):
        if middle is not None:
            columns[middle:stop].addmm_(factor[start:middle, middle:stop].t(), errors[start:middle], alpha=-1)
            continue
        # All errors from the left have arrived in these columns.
        here = slice(start, stop)
        if stop - start == unit:
            scores = (columns[here] / diagonal[here]).square_()
            if held is not None:
                scores.masked_fill_(~held[here], -torch.inf)
            mask[here] = choose(scores) if held is None else choose(scores) & held[here]
            torch.div(~mask[here], diagonal[here], out=gains[here])
        if stop - start == 1:
            column, gain, error = each[start]
            torch.mul(column, gain, out=error)
    columns *= mask
    return mask


def _halves(start: int, stop: int, unit: int) -> Iterator[tuple[int, int | None, int]]:
    """The order of the work on columns `start` to `stop`: left half, its errors into the right, right half.

    Yields `(start, None, stop)` for a mask of `unit` columns to choose or one column to eliminate, and
    `(start, middle, stop)` for errors to pass on. (A function that calls itself from inside would be part of
    a cycle that keeps the tensors it sees alive until the collector comes.)
    """
    if stop - start in (1, unit):
        yield start, None, stop
    if stop - start == 1:
        return
    units = unit if stop - start > unit else 1
    middle = start + (stop - start) // units // 2 * units
    yield from _halves(start, middle, unit)
    yield start, middle, stop
    yield from _halves(middle, stop, unit)


def _choices(starts: range, shape: torch.Size, kept, sparsity, group: str, pattern) -> list[Callable]:
    """How each block turns scores `[columns, out]` into a mask."""
    if pattern:
        return [partial(highest, count=pattern[0], dim=0)] * len(starts)
    counts = _counts(starts, shape, kept, sparsity, group)
    return [partial(_without_lowest, counts=those, group=group) for those in counts]


def _without_lowest(scores: torch.Tensor, counts: torch.Tensor, group: str) -> torch.Tensor:
    """The mask of a block of scores `[block, out]` without the `counts` lowest of each group."""
    groups = scores.view(1, -1) if group == "layer" else scores.t()
    if (counts == counts[0]).all():
        chosen = highest(groups, groups.shape[1] - int(counts[0]))
    else:
        places = groups.argsort(dim=1, stable=True).argsort(dim=1)
        chosen = places >= counts.to(places.device)[:, None]
    return chosen.view(scores.shape) if group == "layer" else chosen.t()


def _counts(starts: range, shape: torch.Size, kept, sparsity: float, group: str) -> torch.Tensor:
    """How many weights each group loses in each block, `[blocks, groups]`."""
    rows, width = shape
    each = rows if group == "layer" else 1
    ends = [min(start + starts.step, width) for start in starts]
    shares = torch.tensor([round(sparsity * (end * each)) for end in ends])[:, None]
    groups = 1 if group == "layer" else rows
    if kept is None:
        forced = torch.zeros(len(ends), groups, dtype=torch.int64)
    else:
        gone = torch.stack([(~part).sum(1) for part in kept.split(starts.step, dim=1)]).cpu()
        forced = gone.sum(1, keepdim=True) if group == "layer" else gone
    total = torch.maximum(shares[-1], forced.sum(0))
    # Zeros that later blocks must keep are set aside before this block takes its share.
    limits = total - (forced.sum(0) - forced.cumsum(0))
    lost = [torch.zeros(groups, dtype=torch.int64)]
    for share, must, limit in zip(shares, forced, limits, strict=True):
        lost.append(torch.maximum(share, lost[-1] + must).minimum(limit))
    return torch.stack(lost).diff(dim=0)


def _prune_first(unused, weight, sparsity, group, pattern, kept) -> torch.Tensor:
    """`kept` without the weights of unused inputs, as many of them as the sparsity takes."""
    priority = torch.where(unused, -1.0, 1.0).expand(weight.shape)
    if kept is not None:
        priority = priority.masked_fill(~kept, -torch.inf)
    spared = select(priority, sparsity, group=group, pattern=pattern) | ~unused
    return spared if kept is None else spared & kept


def _root(gram: torch.Tensor, damping: float, name: str) -> torch.Tensor:
    """The upper triangular R of the damped `H = R Rᵀ`: the inverse of U, as `H⁻¹ = UᵀU`."""
    mean = gram.diagonal().mean()
    used = damping
    while True:
        # The order of rows and columns reversed, R is an ordinary lower Cholesky factor.
        reverse = gram.flip(0, 1)
        diagonal = reverse.diagonal()
        diagonal.copy_(torch.where(diagonal == 0, 1, diagonal + used * mean))
        if _cholesky(reverse):
            break
        used = max(10 * used, 1e-4)
        if used > 100:
            raise ValueError("XᵀX is not positive semidefinite: no damping up to 100 can save it")
    if used != damping:
        warnings.warn(
            f"XᵀX of {name} is not positive definite at damping {damping:g}; used {used:g}", stacklevel=3
        )
    return reverse.flip(0, 1)


def _cholesky(matrix: torch.Tensor) -> bool:
    """Put the lower factor in place of the lower triangle; whether the matrix is positive definite.

    Torch's own clears the upper triangle too, column by column, and that takes a third of its time.
    """
    size = len(matrix)
    if size <= LEAF:
        lower, failed = torch.linalg.cholesky_ex(matrix)
        matrix.copy_(lower)
        return not failed
    half = size // 2
    top, below, rest = matrix[:half, :half], matrix[half:, :half], matrix[half:, half:]
    if not _cholesky(top):
        return False
    below.copy_(torch.linalg.solve_triangular(top.t(), below, upper=True, left=False))
    rest.addmm_(below, below.t(), alpha=-1)
    return _cholesky(rest)


def check_inputs(weight: torch.Tensor, gram: torch.Tensor, kept: torch.Tensor | None) -> None:
    """Raise ValueError unless a weight `[out, in]`, its `XᵀX [in, in]` and an earlier mask fit, all finite.

    >>> check_inputs(torch.ones(2, 3), torch.eye(2), None)
    Traceback (most recent call last):
    ValueError: XᵀX is (2, 2); a weight (2, 3) needs (3, 3)
    """
    width = weight.shape[1]
    if gram.shape != (width, width):
        raise ValueError(f"XᵀX is {tuple(gram.shape)}; a weight {tuple(weight.shape)} needs {(width, width)}")
    if kept is not None and (kept.shape != weight.shape or kept.dtype != torch.bool):
        found = f"{kept.dtype} {tuple(kept.shape)}"
        raise ValueError(f"the earlier mask is {found}; it must be torch.bool {tuple(weight.shape)}")
    for what, tensor in (("the weight", weight), ("XᵀX of the calibration inputs", gram)):
        # The extremes are NaN where any entry is, and found faster than by looking at each.
        if tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
            raise ValueError(f"{what} has entries that are not finite")
