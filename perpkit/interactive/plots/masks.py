"""Matrices with their masks: what is kept, how large it is, and the N:M groups."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.patheffects import withStroke
from torch.nn import functional as F

from ...pruning.selection import checked_pattern
from .card import KEPT, card, figure_of, plain, write_caption
from .figure import COLOURS, DataFigure, on_white

Weighted = tuple[torch.Tensor, torch.Tensor | None]

# More cells than this in a row or column are averaged: a screen shows no more.
FINEST = 512
# Cells and groups can be told apart on at most so many; of larger matrices a corner is shown beside.
MOST_CELLS = 64
CORNER_ROWS, CORNER_GROUPS = 16, 8
# The scale ends here, so that few large weights leave the others their colours.
HIGHEST = 0.995
# How high a picture may be, in widths.
FLATTEST, STEEPEST = 0.5, 2.0
WHOLE, CORNER = "whole", "corner"


@on_white()
def plot_mask(
    weight: torch.Tensor | Mapping[str, Weighted],
    mask: torch.Tensor | None = None,
    *,
    nm: tuple[int, int] | None = None,
    title: str = "",
    threshold: float | None = None,
) -> DataFigure:
    """Draw a matrix `[out, in]` by the size of its entries, white where the boolean mask prunes it.

    A mapping name → (weight, mask) is drawn in a row on one common scale. Without a mask every entry is
    drawn. `weight` may as well hold scores; `threshold` is marked on the scale. With `nm = (N, M)` lines part
    the groups of M consecutive entries of a row, and the caption says how many groups keep N. A corner of a
    matrix of more than 64 rows or columns is drawn large beside it, when it is the only one or has groups. A
    matrix of more than 512 rows or columns is averaged over squares, kept entries and white ones together.
    The figure's table has a row for each cell drawn.

    Raises ValueError for a tensor that is no matrix, a mask of another shape or kind, no matrix at all, an
    impossible pattern, and a width that is no multiple of M.

    >>> figure = plot_mask(torch.tensor([[3.0, -1.0]]), torch.tensor([[True, False]]))
    >>> figure.table[["magnitude", "kept"]].values.tolist()
    [[3.0, 1.0], [1.0, 0.0]]
    """
    given = {title: (weight, mask)} if isinstance(weight, torch.Tensor) else dict(weight)
    if not given:
        raise ValueError("there is no matrix to draw")
    if nm is not None:
        checked_pattern(nm)
    matrices = {name: _checked(name, *each, nm) for name, each in given.items()}
    near = nm is not None or len(matrices) == 1
    zoomed = {name: near and max(w.shape) > MOST_CELLS for name, (w, _) in matrices.items()}
    norm = Normalize(0, _highest([w[m] for w, m in matrices.values()]) or 1.0)
    shapes = [w.shape for w, _ in matrices.values()]
    panels: list[tuple[str, str]] = []
    for name in matrices:
        panels += [(name, WHOLE), *([(name, CORNER)] if zoomed[name] else [])]
    figure = card(pd.DataFrame(), height=_height(shapes, len(panels)))
    drawn = figure.subplots(1, len(panels), squeeze=False)[0]
    tables = []
    for axes, (name, part) in zip(drawn, panels, strict=True):
        w, m = matrices[name]
        if part == CORNER:
            w, m = (each[:CORNER_ROWS, : CORNER_GROUPS * (nm[1] if nm else 4)] for each in (w, m))
        magnitude, kept = _pooled(w, m)
        _matrix(axes, magnitude, kept, norm, w.shape)
        heading = f"{name}\n" if name else ""
        if part == CORNER:
            named = heading if len(matrices) > 1 else ""
            axes.set_title(plain(f"{named}its first {len(w)} rows"), fontsize=9)
        else:
            tables.append(_cells(name, magnitude, kept))
            axes.set_title(plain(f"{heading}{_sparsity(m)}"), fontsize=9)
        if part == CORNER or not zoomed[name]:
            _groups(axes, nm[1] if nm else None, w.shape)
    figure.table = pd.concat(tables, ignore_index=True)
    bar = figure.colorbar(
        ScalarMappable(norm, KEPT), ax=drawn.tolist(), extend="max", label="size of the entry", pad=0.02
    )
    if threshold is not None:
        _mark(bar.ax, threshold, norm)
    write_caption(figure, _caption(matrices, nm, threshold))
    return figure


def _checked(
    name: str, weight: torch.Tensor, mask: torch.Tensor | None, nm: tuple[int, int] | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sizes of a matrix's entries in float32 on the CPU, and its mask."""
    called = f" {name!r}" if name else ""
    if weight.ndim != 2 or not weight.numel():
        raise ValueError(f"the tensor{called} is {list(weight.shape)}; a matrix is [out, in]")
    if mask is None:
        mask = torch.ones(weight.shape, dtype=torch.bool)
    if mask.shape != weight.shape or mask.dtype != torch.bool:
        raise ValueError(
            f"the mask{called} is {mask.dtype} {list(mask.shape)}; masks are boolean, True = kept, and have "
            f"the matrix's shape {list(weight.shape)}"
        )
    if nm is not None and weight.shape[1] % nm[1]:
        raise ValueError(f"the matrix{called} has {weight.shape[1]} inputs, no multiple of M = {nm[1]}")
    return weight.detach().float().abs().cpu(), mask.detach().cpu()


def _highest(kept: list[torch.Tensor]) -> float:
    """The end of the scale, from few of the entries where there are many."""
    some = torch.cat([each[torch.isfinite(each)][:: max(1, each.numel() // 2**18)] for each in kept])
    return float(some.quantile(HIGHEST)) if len(some) else 1.0


def _pooled(weight: torch.Tensor, mask: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Mean size of the kept entries (of all where none is kept) and share of kept ones, cell by cell."""
    side = _side(weight.shape)
    if side == 1:
        return weight.numpy(), mask.float().numpy()
    share = F.avg_pool2d(mask.float()[None], side, ceil_mode=True)[0]
    kept = F.avg_pool2d((weight * mask)[None], side, ceil_mode=True)[0]
    everything = F.avg_pool2d(weight[None], side, ceil_mode=True)[0]
    return torch.where(share > 0, kept / share.clamp_min(1e-9), everything).numpy(), share.numpy()


def _side(shape: torch.Size) -> int:
    return -(-max(shape) // FINEST)


def _matrix(axes: Axes, magnitude: np.ndarray, kept: np.ndarray, norm: Normalize, shape: torch.Size) -> None:
    """Draw the cells in their colours, the pruned ones white."""
    colours = KEPT(norm(magnitude))[..., :3]
    blended = 1 - kept[..., None] * (1 - colours)
    rows, columns = shape
    # Cells are squares, unless the picture would be a narrow strip.
    aspect = float(np.clip(rows / columns, FLATTEST, STEEPEST)) * columns / rows
    extent = (0.0, float(columns), float(rows), 0.0)
    # A pixel of the screen that covers several cells shows their mean, and so their density.
    axes.imshow(blended, extent=extent, aspect=aspect, interpolation="antialiased")
    axes.set_xlabel(f"{columns} inputs", fontsize=8)
    axes.set_ylabel(f"{rows} outputs", fontsize=8)
    axes.set_xticks([])
    axes.set_yticks([])


def _groups(axes: Axes, m: int | None, shape: torch.Size) -> None:
    """Lines between the groups and, where there is room, the rows."""
    rows, columns = shape
    if m is not None:
        axes.vlines(np.arange(m, columns, m), 0, rows, color=COLOURS[5], linewidth=1.4)
        if rows <= MOST_CELLS:
            axes.hlines(np.arange(1, rows), 0, columns, color="#BBBBBB", linewidth=0.4)


def _mark(axes: Axes, threshold: float, norm: Normalize) -> None:
    """A line on the scale where entries begin to be kept."""
    place = min(threshold, norm.vmax or threshold)
    line = axes.axhline(place, color=COLOURS[5], linewidth=2.5)
    line.set_path_effects([withStroke(linewidth=4.5, foreground="white")])


def _cells(name: str, magnitude: np.ndarray, kept: np.ndarray) -> pd.DataFrame:
    rows, columns = np.indices(magnitude.shape).reshape(2, -1)
    cells = {"row": rows, "column": columns, "magnitude": magnitude.ravel(), "kept": kept.ravel()}
    return pd.DataFrame({"name": name, **cells})


def _sparsity(mask: torch.Tensor) -> str:
    pruned = int((~mask).sum())
    if not pruned:
        return "nothing pruned"
    return f"{figure_of('sparsity', pruned / mask.numel())} pruned"


def _height(shapes: list[torch.Size], panels: int) -> float:
    """So high that square cells fill the width, within reason."""
    steepest = max(float(np.clip(rows / columns, FLATTEST, STEEPEST)) for rows, columns in shapes)
    return float(np.clip(6.0 / panels * steepest + 1.2, 2.6, 5.4))


def _caption(
    matrices: dict[str, tuple[torch.Tensor, torch.Tensor]],
    nm: tuple[int, int] | None,
    threshold: float | None,
) -> list[str]:
    lines = ["white: pruned; the darker, the larger"]
    if threshold is not None:
        lines[0] += f"; kept above the line on the scale, {threshold:.4g}"
    if (side := max(_side(weight.shape) for weight, _ in matrices.values())) > 1:
        lines[0] += f"; each cell is the mean of up to {side} × {side} entries"
    if broken := sum(int((~torch.isfinite(weight)).sum()) for weight, _ in matrices.values()):
        lines.append(f"{broken} entries are not finite: black")
    if nm is not None:
        n, m = nm
        for name, (_, mask) in matrices.items():
            counts = mask.reshape(-1, m).sum(1)
            exact = int((counts == n).sum())
            which = "all" if exact == len(counts) else f"{exact:,} of"
            called = f"{name}: " if len(matrices) > 1 else ""
            lines.append(f"{called}{which} {len(counts):,} groups of {m} inputs keep {n}")
    return lines
