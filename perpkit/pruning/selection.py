"""Exact selection: which of the scores are the highest, in a matrix, in each row, in each N:M group."""

import re

import numpy as np
import torch

GROUPS = ("layer", "row")
# Groups up to this size are ranked by comparing every pair; larger ones are partitioned.
PAIRWISE = 16
# So many groups are ranked at a time: what a step reads was just written and still lies in the cache.
RANKED_TOGETHER = 2**17


def select(
    scores: torch.Tensor,
    sparsity: float | None,
    *,
    group: str = "layer",
    pattern: tuple[int, int] | None = None,
) -> torch.Tensor:
    """The boolean mask (`True` = kept) that prunes exactly the lowest scores of each group.

    `scores` is `[out, in]` (any shape for `group="layer"`). A group of n scores loses `round(sparsity · n)`
    of them; a group is the whole tensor ("layer") or a row along the last dimension ("row"). A `pattern`
    (N, M) keeps N of every M consecutive scores along the last dimension instead, and then `sparsity` and
    `group` are not looked at. Of equal scores those in front are pruned first, so the count is exact under
    ties (published code prunes everything up to the threshold and so one or more too many). A score of -inf
    is the lowest: give it to weights that are pruned already.

    Raises ValueError for a sparsity outside [0, 1], scores that are NaN, an unknown group and a width that is
    no multiple of M.

    >>> select(torch.tensor([[3.0, 1.0], [1.0, 1.0]]), 0.5)
    tensor([[ True, False],
            [False,  True]])
    >>> select(torch.tensor([[3.0, 1.0, 2.0, 5.0]]), None, pattern=(1, 2))
    tensor([[ True, False, False,  True]])
    """
    if scores.numel() and scores.amin().isnan():
        raise ValueError("a score is NaN; the weights or activations it was computed from are broken")
    groups, kept = grouped(scores, sparsity, group=group, pattern=pattern)
    return highest(groups, kept).view(scores.shape)


def grouped(
    tensor: torch.Tensor,
    sparsity: float | None,
    *,
    group: str = "layer",
    pattern: tuple[int, int] | None = None,
) -> tuple[torch.Tensor, int]:
    """The tensor as `[groups, size]`, whose entries are compared with each other, and how many a group keeps.

    Raises ValueError like `select`.

    >>> groups, kept = grouped(torch.zeros(2, 8), 0.25, group="row")
    >>> groups.shape, kept
    (torch.Size([2, 8]), 6)
    """
    if pattern is not None:
        n, m = checked_pattern(pattern)
        if tensor.shape[-1] % m:
            raise ValueError(f"the width {tensor.shape[-1]} is no multiple of {m}: no {n}:{m} pattern fits")
        return tensor.reshape(-1, m), n
    if group not in GROUPS:
        raise ValueError(f"unknown group {group!r}; the groups are {', '.join(GROUPS)}")
    if sparsity is None or not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity is {sparsity}; it is the fraction of pruned weights, between 0 and 1")
    size = tensor.numel() if group == "layer" else tensor.shape[-1]
    return tensor.reshape(tensor.numel() // max(size, 1), size), size - round(sparsity * size)


def parse_pattern(pattern: str) -> tuple[int, int]:
    """Read a pattern `"N:M"`: N of every M consecutive weights are kept.

    Raises ValueError unless both are whole numbers with 0 <= N <= M and M > 0.

    >>> parse_pattern("2:4")
    (2, 4)
    """
    found = re.fullmatch(r"(\d+):(\d+)", pattern) if isinstance(pattern, str) else None
    if not found:
        raise ValueError(
            f"the pattern is {pattern!r}; write N:M to keep N of every M weights, such as '2:4', "
            "or None for no pattern"
        )
    return checked_pattern((int(found[1]), int(found[2])))


def checked_pattern(pattern: tuple[int, int]) -> tuple[int, int]:
    """The pattern (N, M) itself; raises ValueError unless `0 <= N <= M` and `M > 0`.

    >>> checked_pattern((2, 4))
    (2, 4)
    """
    n, m = pattern
    if not 0 <= n <= m or m < 1:
        raise ValueError(f"the pattern is {n}:{m}; N:M keeps N of every M weights, so N is between 0 and M")
    return n, m


@torch.no_grad()
def highest(scores: torch.Tensor, count: int, dim: int = 1) -> torch.Tensor:
    """The boolean mask of the `count` highest scores in each row of a matrix (`dim=0`: in each column).

    Of equal scores those behind are kept. The scores may be infinite, but not NaN.

    >>> highest(torch.tensor([[3.0, 1.0, 2.0], [0.0, 0.0, 0.0]]), 1)
    tensor([[ True, False, False],
            [False, False,  True]])
    """
    size = scores.shape[dim]
    if count in (0, size):
        return torch.full(scores.shape, count > 0, dtype=torch.bool, device=scores.device)
    if size > PAIRWISE:
        return _by_threshold(scores, count) if dim == 1 else _by_threshold(scores.t(), count).t()
    if dim == 0:
        return _by_rank(scores, count)
    mask = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    for part, chosen in zip(scores.split(RANKED_TOGETHER), mask.split(RANKED_TOGETHER), strict=True):
        chosen.copy_(_by_rank(torch.stack(part.unbind(1)), count).t())
    return mask


def _by_rank(columns: torch.Tensor, count: int) -> torch.Tensor:
    """The highest of each column, by comparing each pair."""
    size = len(columns)
    # How many go before each, less those in front of it: nothing yet, as if all went in the order they stand.
    lead = torch.zeros(columns.shape, dtype=torch.int8, device=columns.device)
    for distance in range(1, size):
        goes_later = (columns[:-distance] > columns[distance:]).view(torch.int8)
        lead[:-distance] += goes_later
        lead[distance:] -= goes_later
    # Kept are those that have at least size − count before them.
    fewest = torch.arange(size - count, -count, -1, dtype=torch.int8, device=columns.device)
    return lead >= fewest[:, None]


def _by_threshold(groups: torch.Tensor, count: int) -> torch.Tensor:
    size = groups.shape[1]
    threshold = kth_lowest(groups, size - count)
    mask = groups > threshold
    if torch.count_nonzero(mask) == count * len(groups):
        return mask
    # Where several scores equal the threshold, the last of them belong to the kept as well.
    rows, columns = (groups == threshold).nonzero(as_tuple=True)
    ties = torch.bincount(rows, minlength=len(groups))
    several = (ties > 1).nonzero().squeeze(1)
    missing = torch.zeros_like(ties)
    missing[several] = count - mask[several].sum(1)
    late = torch.arange(len(rows), device=rows.device) >= (ties.cumsum(0) - missing)[rows]
    mask[rows[late], columns[late]] = True
    return mask


def kth_lowest(groups: torch.Tensor, k: int) -> torch.Tensor:
    """The k-th lowest of each row, `[groups, 1]`."""
    if groups.device.type != "cpu":
        # On a GPU kthvalue searches with one block of threads: a hundred times slower than the sort.
        return groups.sort(dim=1).values[:, k - 1 : k]
    # NumPy partitions with vector instructions, ten times faster than kthvalue, but not the half precisions.
    exact = groups.float() if groups.dtype in (torch.bfloat16, torch.float16) else groups
    lowest = np.partition(exact.numpy(), k - 1, axis=1)[:, k - 1 : k]
    return torch.from_numpy(lowest.copy()).to(groups.dtype)
