"""The loss over the plane through three models, with the three and their mean."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke

from .card import SCALE, card, check_table, finite_rows, settle, tidy, write_caption
from .figure import DataFigure, on_white

LEVELS = 14
# Where the highest loss lies so much farther from the lowest than the middle one does, contours are denser
# below.
STEEP = 4


@on_white()
def plot_plane(table: pd.DataFrame) -> DataFigure:
    """Draw what `plane` returns: contours of the loss, and the three models A, B, C with their mean.

    Where the loss explodes, contours stand denser at low losses; the scale says which they are. Points that
    are not finite are left white and counted in the caption. The loss at the mean is not in the table: move
    a model there to measure it.

    Raises ValueError for a table without the columns `x`, `y`, `loss` and `model`, without the three models,
    and whose other points are no full grid.

    >>> grid = [(x, y, x * x + y * y, None) for y in (0.0, 1.0, 2.0) for x in (0.0, 1.0, 2.0)]
    >>> models = [(0.0, 0.0, 0.0, "a"), (2.0, 0.0, 4.0, "b"), (1.0, 2.0, 5.0, "c")]
    >>> figure = plot_plane(pd.DataFrame(grid + models, columns=["x", "y", "loss", "model"]))
    >>> [text.get_text() for text in figure.axes[0].texts]
    ['A 0', 'B 4', 'C 5', 'mean']
    """
    check_table(table, ["x", "y", "loss", "model"])
    finite = finite_rows(table, ["loss"])
    corners = table[table["model"].notna()].drop_duplicates("model").set_index("model")
    if set(corners.index) != set("abc"):
        found = ", ".join(map(repr, corners.index)) or "none"
        raise ValueError(f"the table has the models {found}; those of a plane are 'a', 'b' and 'c'")
    points = table[table["model"].isna()]
    columns, rows = points["x"].nunique(), points["y"].nunique()
    if len(points) != columns * rows or min(columns, rows) < 2:
        raise ValueError(f"the {len(points)} points without a model are no full grid over x and y")
    finite_rows(points, ["loss"])
    grid = points.pivot(index="y", columns="x", values="loss").astype(float)
    losses = np.ma.masked_invalid(grid.to_numpy())
    figure = card(table, height=5.0)
    axes = figure.subplots()
    levels = _levels(losses)
    filled = axes.contourf(grid.columns, grid.index, losses, levels=levels, cmap=f"{SCALE}_r")
    axes.contour(grid.columns, grid.index, losses, levels=levels, colors="#444444", linewidths=0.4)
    bar = figure.colorbar(filled, ax=axes, label="loss", pad=0.02)
    digits = _digits(levels)
    bar.ax.yaxis.set_major_formatter(lambda value, _: f"{value:.{digits}g}")
    _models(axes, corners, digits)
    # One unit of length to the right is one upwards, so that angles are angles.
    axes.set_aspect("equal", adjustable="box")
    axes.set_xlabel("distance along B − A")
    axes.set_ylabel("distance towards C")
    tidy(axes)
    axes.grid(visible=False)
    lost = len(table) - len(finite)
    write_caption(
        figure,
        [
            f"loss on {len(points)} points of the plane through three models, the lowest "
            f"{float(losses.min()):.4g}; distances: L2 norm of the parameters",
            f"{lost} of {len(table)} points are not finite and left white" if lost else "",
        ],
    )
    settle(figure)
    return figure


def _levels(losses: np.ma.MaskedArray) -> np.ndarray:
    """The losses of the contours, denser at the bottom where the top is far away."""
    low, middle, high = float(losses.min()), float(np.ma.median(losses)), float(losses.max())
    if high <= low:
        room = abs(low) * 1e-3 or 1e-3
        return np.array([low - room, low + room])
    power = 3 if high - low > STEEP * (middle - low) else 1
    levels = low + (high - low) * np.linspace(0, 1, LEVELS) ** power
    # A first step that rounding swallows is none.
    return np.unique(levels)


def _digits(levels: np.ndarray) -> int:
    """So many digits that no two levels read the same."""
    different = (digits for digits in range(4, 16) if len({f"{v:.{digits}g}" for v in levels}) == len(levels))
    return next(different, 16)


def _models(axes: Axes, corners: pd.DataFrame, digits: int) -> None:
    order = corners.loc[list("abc")]
    x, y = (order[axis].astype(float).tolist() for axis in ("x", "y"))
    axes.plot([*x, x[0]], [*y, y[0]], color="black", linewidth=1, linestyle=(0, (4, 2)))
    centre = float(np.mean(x)), float(np.mean(y))
    for name, across, up, loss in zip("ABC", x, y, order["loss"], strict=True):
        axes.plot(across, up, "o", markersize=9, color="black", markeredgecolor="white", markeredgewidth=1.2)
        _label(axes, f"{name} {loss:.{digits}g}", (across, up), below=up < centre[1])
    axes.plot(*centre, "D", markersize=8, color="white", markeredgecolor="black", markeredgewidth=1.5)
    _label(axes, "mean", centre, below=True)


def _label(axes: Axes, text: str, place: tuple[float, float], *, below: bool) -> None:
    label = axes.annotate(
        text,
        place,
        (0, -9 if below else 9),
        textcoords="offset points",
        ha="center",
        va="top" if below else "bottom",
        weight="bold",
    )
    label.set_path_effects([withStroke(linewidth=2.5, foreground="white")])
