"""Measured points beside published ones, where what is compared has names and no order."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from .card import (
    card,
    check_table,
    finite_rows,
    left_out,
    marks,
    named,
    names_of,
    over_seeds,
    plain,
    seeds_said,
    tidy,
    words,
    write_caption,
)
from .curves import scale_values
from .figure import GREY, DataFigure, on_white

# Of the place of a name on the axis, how much its points take.
SPREAD = 0.7
# That fit into a row of the legend, the markers counted as six.
LETTERS = 100


@on_white()
def plot_beside(
    results: pd.DataFrame, *, x: str, y: str, hue: str | None = None, published: pd.DataFrame | None = None
) -> DataFigure:
    """Draw `y` for the names in `x`, in the colours of `hue`: filled markers, published ones open.

    Points are means over seeds, their lines go from the lowest to the highest. `published` has the columns
    `x`, `y` and `hue`. The vertical axis is logarithmic when its values span more than a factor of four. The
    figure's table has both, told apart by its column `published`.

    Raises ValueError for an empty table, a missing column, and no finite value.

    >>> table = pd.DataFrame({"pattern": ["2:4", "4:8"], "perplexity": [3.0, 2.0]})
    >>> plot_beside(table, x="pattern", y="perplexity", published=table).table["published"].tolist()
    [False, False, True, True]
    """
    keys = [x, *([hue] if hue else [])]
    check_table(results, [*keys, y])
    theirs = pd.DataFrame(columns=[*keys, y]) if published is None or published.empty else published
    check_columns = [*keys, y]
    if not theirs.empty:
        check_table(theirs, check_columns)
        theirs = theirs[np.isfinite(theirs[y].astype(float))]
    results, theirs = (named(each, *keys) for each in (results, theirs))
    finite = finite_rows(results, [y])
    points = over_seeds(finite, keys, y)
    behind = pd.concat([results.assign(published=False), theirs.assign(published=True)], ignore_index=True)
    figure = card(behind, height=4.4)
    axes = figure.subplots()
    places = _names(results, theirs, x)
    hues = _names(results, theirs, hue) if hue else [None]
    for i, name in enumerate(hues):
        mine = points if hue is None else points[points[hue] == name]
        other = theirs if hue is None else theirs[theirs[hue] == name]
        middle = (i - (len(hues) - 1) / 2) * SPREAD / len(hues)
        step = 0.28 * SPREAD / len(hues)
        _ours(axes, mine, [places.index(each) + middle - step for each in mine[x]], i)
        look = marks(i)
        where = [places.index(each) + middle + step for each in other[x]]
        axes.plot(
            where,
            other[y],
            linestyle="none",
            marker=look["marker"],
            color=look["color"],
            markerfacecolor="white",
            markersize=6.5,
        )
    values = pd.concat([finite[y].astype(float), theirs[y].astype(float)])
    scale_values(axes, values, y)
    axes.set_xticks(range(len(places)), [plain(_broken(each)) for each in places], fontsize=9)
    axes.set_xlim(-0.6, len(places) - 0.4)
    axes.set_ylabel(words(y))
    if hue:
        axes.set_xlabel(words(x))
    tidy(axes)
    axes.grid(visible=False, axis="x")
    axes.grid(alpha=0.12, which="minor", axis="y")
    for edge in range(len(places) - 1):
        axes.axvline(edge + 0.5, color=GREY, linewidth=0.5, alpha=0.35)
    _legend(figure, hue, hues, not theirs.empty)
    write_caption(figure, _caption(results, finite, points))
    return figure


def _names(results: pd.DataFrame, theirs: pd.DataFrame, column: str) -> list:
    """Ours in their order, then those of the published alone; numbers by size."""
    found = names_of(pd.concat([results[column], theirs[column]]).reset_index(drop=True))
    return sorted(found) if all(isinstance(each, int | float) for each in found) else found


def _ours(axes: Axes, points: pd.DataFrame, where: list[float], i: int) -> None:
    error = [points["mean"] - points["min"], points["max"] - points["mean"]]
    look = marks(i)
    axes.errorbar(
        where,
        points["mean"],
        yerr=error,
        linestyle="none",
        marker=look["marker"],
        color=look["color"],
        markersize=6.5,
        elinewidth=1.2,
        capsize=2.5,
    )


def _broken(name: object) -> str:
    """A long name on two lines."""
    text = str(name)
    if len(text) <= 14:
        return text
    breaks = [i for i, letter in enumerate(text) if letter in " +_"]
    if not breaks:
        return text
    middle = min(breaks, key=lambda i: abs(i - len(text) / 2))
    return f"{text[: middle + 1].rstrip()}\n{text[middle + 1 :]}"


def _legend(figure: DataFigure, hue: str | None, hues: list, published: bool) -> None:
    handles = [
        Line2D(
            [], [], linestyle="none", marker=marks(i)["marker"], color=marks(i)["color"], label=plain(name)
        )
        for i, name in enumerate(hues)
        if hue
    ]
    marker: dict[str, Any] = {"linestyle": "none", "marker": "o", "color": GREY if hue else marks(0)["color"]}
    handles.append(Line2D([], [], **marker, label="here"))
    if published:
        handles.append(Line2D([], [], **marker, markerfacecolor="white", label="published"))
    figure.legend(
        handles=handles,
        fontsize=9,
        loc="outside upper left",
        ncols=max(1, min(len(handles), LETTERS // (6 + max(len(str(each.get_label())) for each in handles)))),
        frameon=False,
    )


def _caption(results: pd.DataFrame, finite: pd.DataFrame, points: pd.DataFrame) -> list[str]:
    same = [c for c in ("model", "protocol") if c in results and results[c].dropna().nunique() == 1]
    lines = [" · ".join(str(results[column].dropna().iloc[0]) for column in same)]
    if "seed" in finite:
        lines.append(seeds_said(points["count"], "lines"))
    lines.append(left_out(results, finite))
    return lines
