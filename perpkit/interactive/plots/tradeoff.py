"""Quality against what it costs: trained parameters, seconds, memory."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from .card import (
    card,
    check_table,
    figure_of,
    finite_rows,
    is_share,
    left_out,
    marks,
    named,
    names_of,
    over_seeds,
    seeds_said,
    tidy,
    words,
    write_caption,
)
from .curves import INPUTS, draw_legend, draw_references, label_of, scale_values
from .figure import DataFigure, on_white

# Costs that span more than this factor stand on a logarithmic axis.
WIDE = 20
SMALLEST, LARGEST = 5.0, 11.0


@on_white()
def plot_tradeoff(
    results: pd.DataFrame, *, x: str = "trainable_share", y: str = "perplexity", hue: str = "retrain"
) -> DataFigure:
    """Draw the quality `y` against the cost `x`, one point for each experiment: mean over seeds.

    `x` is a column of a sweep's rows such as "trainable_share", "seconds", "peak_memory" (bytes) or
    "tokens_per_second". Bars in both directions go from the lowest to the highest seed. Within a value of
    `hue` one more input may vary, such as the sparsity or the rank: its points are joined in its order and
    grow with it. Costs that span more than a factor of 20 stand on a logarithmic axis, with a place for zero.

    Raises ValueError for an empty table, a missing column, no finite value, and points of one `hue` that
    differ in several inputs.

    >>> table = pd.DataFrame({"trainable_share": [0, 0.01, 1], "perplexity": [9.0, 3.0, 2.5]})
    >>> table["retrain"] = ["none", "biases", "full"]
    >>> plot_tradeoff(table).axes[0].get_xscale()
    'symlog'
    """
    check_table(results, (x, y, hue))
    results = named(results, hue)
    finite = finite_rows(results, [x, y])
    if finite.empty:
        raise ValueError(f"no row has finite values of both {x!r} and {y!r}")
    varied = _varied(finite, hue)
    keys = list(dict.fromkeys([hue, *([varied] if varied else [])]))
    points = over_seeds(finite, keys, x).merge(
        over_seeds(finite, keys, y), on=keys, suffixes=(" of cost", " of quality")
    )
    if varied:
        points = points.sort_values(varied, ignore_index=True)
    figure = card(results, height=4.4)
    axes = figure.subplots()
    sizes = _sizes(points[varied] if varied else pd.Series(0, points.index))
    for i, name in enumerate(names_of(results[hue])):
        mine = points[points[hue] == name]
        if not mine.empty:
            label = label_of(finite[finite[hue] == name], "" if x == "trainable_share" else hue, name)
            _points(axes, mine, sizes[mine.index], label, i)
    draw_references(axes, results, y)
    scale_values(axes, finite[y].astype(float), y)
    _scale_costs(axes, finite[x].astype(float), x)
    axes.set_xlabel(words(x))
    axes.set_ylabel(words(y))
    tidy(axes)
    draw_legend(figure, hue)
    write_caption(figure, _caption(results, finite, points, varied))
    return figure


def _varied(rows: pd.DataFrame, hue: str) -> str | None:
    """The input that varies within the values of `hue`, if any; others may only follow it."""
    groups = rows.groupby(hue, observed=True)
    inputs = [c for c in INPUTS if c in rows and c != hue and groups[c].nunique(dropna=False).max() > 1]
    if not inputs:
        return None
    apart = len(rows[[hue, *inputs]].drop_duplicates())
    for column in inputs:
        if rows[column].notna().all() and len(rows[[hue, column]].drop_duplicates()) == apart:
            return column
    raise ValueError(
        f"the points of one {hue!r} differ in {', '.join(map(repr, inputs))}; select the rows of one "
        f"value, or tell the points apart with hue={inputs[-1]!r}"
    )


def _sizes(values: pd.Series) -> pd.Series:
    """The size of each marker: in steps from the first to the last value."""
    order = sorted(values.unique())
    steps = np.linspace(SMALLEST, LARGEST, len(order)) if len(order) > 1 else [7.0]
    return values.map(dict(zip(order, steps, strict=True)))


def _points(axes: Axes, points: pd.DataFrame, sizes: pd.Series, label: str, i: int) -> None:
    look = marks(i)
    cost, quality = (_ends(points, axis) for axis in ("cost", "quality"))
    axes.plot(cost[0], quality[0], color=look["color"], linestyle=look["linestyle"], linewidth=1, alpha=0.7)
    for place, size in enumerate(sizes):
        axes.errorbar(
            cost[0][place],
            quality[0][place],
            xerr=cost[1:, [place]],
            yerr=quality[1:, [place]],
            color=look["color"],
            marker=look["marker"],
            markersize=size,
            markeredgecolor="white",
            markeredgewidth=0.6,
            elinewidth=1.2,
            capsize=2,
            linestyle="none",
            label=label if place == len(points) - 1 else None,
        )


def _ends(points: pd.DataFrame, axis: str) -> np.ndarray:
    """Mean, and how far the lowest and the highest seed lie from it: `[3, points]`."""
    mean, low, high = (points[f"{part} of {axis}"] for part in ("mean", "min", "max"))
    return np.array([mean, mean - low, high - mean])


def _scale_costs(axes: Axes, values: pd.Series, x: str) -> None:
    positive = values[values > 0]
    if len(positive) and (values >= 0).all() and values.max() > WIDE * positive.min():
        if values.min() > 0:
            axes.set_xscale("log")
        else:
            smallest = 10.0 ** np.floor(np.log10(positive.min()))
            axes.set_xscale("symlog", linthresh=smallest, linscale=0.5)
            axes.set_xlim(left=-0.2 * smallest)
        axes.xaxis.set_minor_formatter("")
    axes.xaxis.set_major_formatter(lambda value, _: figure_of(x, value))
    if is_share(x) and values.max() <= 1 and axes.get_xscale() != "linear":
        axes.set_xlim(right=1.6 * values.max())


def _caption(
    results: pd.DataFrame, finite: pd.DataFrame, points: pd.DataFrame, varied: str | None
) -> list[str]:
    same = ("model", "criterion", "sparsity", "protocol")
    known = [c for c in same if c in results and results[c].nunique() == 1 and c != varied]
    said = [
        f"sparsity {figure_of(c, results[c].iloc[0])}" if c == "sparsity" else str(results[c].iloc[0])
        for c in known
    ]
    lines = [" · ".join(said)]
    if varied:
        values = sorted(points[varied].unique())
        shown = ", ".join(figure_of(varied, v) if isinstance(v, int | float) else str(v) for v in values)
        lines.append(f"joined, from the smallest marker to the largest: {varied.replace('_', ' ')} {shown}")
    if "seed" in finite:
        lines.append(seeds_said(points["count of cost"]))
    return [*lines, left_out(results, finite)]
