"""A pruned matrix, its adapter and what they come to, above the loss of the training."""

import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from .card import CAPTION, KEPT, LINE, WIDTH, figure_of, plain, tidy
from .figure import COLOURS, DataFigure, on_white
from .masks import HIGHEST

# Rows and columns of the corner that is drawn: single entries can be told apart.
CORNER = 32
HEIGHT = 4.6


@on_white()
def plot_adapter(
    matrices: Mapping[str, torch.Tensor], losses: Sequence[float], steps: int, *, words: str = ""
) -> DataFigure:
    """Draw matrices `[out, in]` by name in a row, white where exactly zero, above the losses so far.

    Of each matrix a corner of 32 rows and columns is drawn, the darker the larger the entry, each on a scale
    of its own that its words name, with the share of zeros of the whole matrix. `words` stand at the end of
    the caption. The figure's table holds the
    `part` and for the matrices `row`, `column` and `value`, for the `"loss"` `step` and `value`.

    Raises ValueError for no matrix and a tensor that is none.

    >>> figure = plot_adapter({"W": torch.eye(2)}, [2.0, 1.5], steps=10)
    >>> figure.table["part"].value_counts().to_dict()
    {'W': 4, 'loss': 2}
    """
    if not matrices:
        raise ValueError("there is no matrix to draw")
    for name, matrix in matrices.items():
        if matrix.ndim != 2 or not matrix.numel():
            raise ValueError(f"the tensor {name!r} is {list(matrix.shape)}; a matrix is [out, in]")
    # Placed by hand: a layout that is worked out for each picture would hold up the training.
    figure = DataFigure(figsize=(WIDTH, HEIGHT), facecolor="white")
    step = 0.98 / len(matrices)
    side = min(step - 0.015, 0.25)
    boxes = [
        (0.01 + i * step, 0.94 - side * WIDTH / HEIGHT, side, side * WIDTH / HEIGHT)
        for i in range(len(matrices))
    ]
    drawn = [figure.add_axes(box) for box in boxes]
    tables = []
    for axes, (name, matrix) in zip(drawn, matrices.items(), strict=True):
        values = matrix.detach().float().cpu()
        _matrix(axes, name, values)
        corner = values[:CORNER, :CORNER].numpy()
        rows, columns = np.indices(corner.shape).reshape(2, -1)
        tables.append(pd.DataFrame({"part": name, "row": rows, "column": columns, "value": corner.ravel()}))
    _losses(figure.add_axes((0.075, 0.18, 0.905, 0.25)), losses, steps)
    loss = pd.DataFrame({"part": "loss", "step": range(1, len(losses) + 1), "value": list(losses)})
    figure.table = pd.DataFrame([row for table in [*tables, loss] for row in table.to_dict("records")])
    out, width = next(iter(matrices.values())).shape
    seen = f"the first {min(CORNER, out)} rows and {min(CORNER, width)} columns of {out} × {width}; "
    seen += "white: exactly zero; the darker, the larger, each on its own scale"
    caption = plain("\n".join(textwrap.fill(line, LINE) for line in (seen, words) if line))
    figure.text(0.01, 0.01, caption, fontsize=8, color=CAPTION, va="bottom")
    return figure


def _matrix(axes: Axes, name: str, values: torch.Tensor) -> None:
    sizes = values.abs()
    other = sizes[sizes > 0]
    # From few of the entries where there are many.
    highest = float(other[:: max(1, other.numel() // 2**18)].quantile(HIGHEST)) if other.numel() else 1.0
    corner = sizes[:CORNER, :CORNER].numpy()
    pixels = np.where((corner > 0)[..., None], KEPT(corner / highest)[..., :3], 1.0)
    axes.imshow(pixels, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(plain(name), fontsize=9.5)
    zeros = figure_of("sparsity", round(float((values == 0).double().mean()), 3))
    axes.set_xlabel(f"{zeros} zeros\nsizes up to {highest:.2g}" if other.numel() else "all zeros", fontsize=8)


def _losses(axes: Axes, losses: Sequence[float], steps: int) -> None:
    axes.plot(range(1, len(losses) + 1), losses, color=COLOURS[4], linewidth=1.6)
    axes.set_xlim(0, max(steps, len(losses), 1))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("training step", fontsize=9)
    axes.set_ylabel("training loss", fontsize=9)
    axes.tick_params(labelsize=8)
    tidy(axes)
