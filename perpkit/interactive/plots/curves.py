"""Curves over sparsity, or over anything else that was varied."""

import dataclasses

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from ...experiments.experiment import Experiment
from .figure import COLOURS, DASHES, GREY, MARKERS, DataFigure

LABELS = {
    "perplexity": "perplexity (test)",
    "retrain": "retrained",
    "sparsity": "sparsity of the pruned matrices",
    "trainable_share": "trainable parameters",
}
INPUTS = [field.name for field in dataclasses.fields(Experiment) if field.name != "seed"]


def plot_curves(
    results: pd.DataFrame, *, x: str = "sparsity", y: str = "perplexity", hue: str = "retrain"
) -> DataFigure:
    """Draw `y` over `x`, one curve for each value of `hue`: mean over seeds, band from lowest to highest.

    The dense model and the floor, the best possible perplexity, are drawn as lines where the table has the
    columns `dense_perplexity` and `floor` and y is the perplexity; the axis is logarithmic when the values
    span more than a factor of four. The caption says how many seeds there are, what the band is, and how
    many rows are left out because they are not finite. A categorical `hue` keeps its order and its colours
    when a category has no rows.

    Raises ValueError for an empty table, a missing column, no finite value, and a curve that would mix
    different experiments (another model, criterion, …) as if they were seeds.

    >>> table = pd.DataFrame({"sparsity": [0.5, 0.7], "perplexity": [3.0, 19.0], "retrain": ["none", "none"]})
    >>> figure = plot_curves(table)
    >>> figure.axes[0].get_yscale()
    'log'
    """
    if results.empty:
        raise ValueError("the table has no rows to plot")
    for column in (x, y, hue):
        if column not in results:
            raise ValueError(f"the table has no column {column!r}; it has {', '.join(results.columns)}")
    finite = results[np.isfinite(results[y].astype(float))]
    if finite.empty:
        raise ValueError(f"no value of {y!r} is finite")
    _check_unmixed(finite, x, hue)
    figure = DataFigure(figsize=(7.2, 4.4), layout="constrained", facecolor="white")
    figure.table = results.copy()
    axes = figure.add_subplot()
    for i, name in enumerate(_names(results[hue])):
        rows = finite[finite[hue] == name]
        if not rows.empty:
            _curve(axes, rows.groupby(x)[y].agg(["mean", "min", "max"]), _label(rows, hue, name), i)
    if y == "perplexity":
        _reference(axes, results, "dense_perplexity", "dense model", ":")
        _reference(axes, results, "floor", "best possible", "-.")
    if finite[y].min() > 0 and finite[y].max() > 4 * finite[y].min():
        _logarithmic(axes, decades=np.log10(finite[y].max() / finite[y].min()))
    axes.set_xlabel(_words(x))
    axes.set_ylabel(_words(y))
    if x == "sparsity":
        axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.4g} %")
    axes.grid(alpha=0.25)
    axes.grid(alpha=0.12, which="minor", axis="y")
    axes.spines[["top", "right"]].set_visible(False)
    # Beside the axes, where it never covers a curve.
    figure.legend(
        title=_words(hue), fontsize=9, title_fontsize=9, loc="outside right upper", alignment="left"
    )
    figure.supxlabel(_caption(results, finite, x, hue), x=0.01, ha="left", fontsize=8, color="#444444")
    return figure


def _check_unmixed(rows: pd.DataFrame, x: str, hue: str) -> None:
    """Raise ValueError when a point of a curve would average over anything but seeds."""
    for column in INPUTS:
        # The first test is only for speed: most inputs have one value in the whole table.
        if column in rows and column not in (x, hue) and rows[column].nunique(dropna=False) > 1:
            values = rows.groupby([hue, x], observed=True)[column].nunique(dropna=False).reset_index()
            for name, at, count in values[values[column] > 1].itertuples(index=False):
                raise ValueError(
                    f"the curve {name!r} has {count} different values of {column!r} at {x} {at}; "
                    f"select the rows of one, or draw a curve for each with hue={column!r}"
                )


def _words(column: str) -> str:
    return LABELS.get(column, column.replace("_", " "))


def _names(column: pd.Series) -> list:
    """The curves in order: that of the categories, else that of the table."""
    if isinstance(column.dtype, pd.CategoricalDtype):
        return list(column.cat.categories)
    return list(column.dropna().unique())


def _label(rows: pd.DataFrame, hue: str, name: object) -> str:
    """The name of a curve, with the share of the parameters that it trained where that is its point."""
    if hue == "retrain" and "trainable_share" in rows and (share := rows["trainable_share"].iloc[0]) > 0:
        return f"{name} ({100 * share:.3g} %)"
    return str(name)


def _curve(axes: Axes, curve: pd.DataFrame, label: str, i: int) -> None:
    colour = COLOURS[i % len(COLOURS)]
    # Past the last colour the markers and dashes shift by one, so that the eighth curve is not the first.
    shift = (i + i // len(COLOURS)) % len(COLOURS)
    axes.plot(
        curve.index,
        curve["mean"],
        color=colour,
        marker=MARKERS[shift],
        linestyle=DASHES[shift],
        label=label,
        markersize=5,
        linewidth=1.6,
    )
    axes.fill_between(curve.index, curve["min"], curve["max"], color=colour, alpha=0.18, linewidth=0)


def _reference(axes: Axes, results: pd.DataFrame, column: str, label: str, dash: str) -> None:
    """A horizontal line where the column has one value; several models have no common line."""
    if column in results and results[column].nunique() == 1:
        value = results[column].dropna().iloc[0]
        axes.axhline(value, color=GREY, linestyle=dash, linewidth=1.2, label=f"{label} ({value:.2f})")


def _logarithmic(axes: Axes, decades: float) -> None:
    """Plain numbers on a logarithmic axis: 2, 3, 5, 10, 20, …; only powers of ten where many decades show."""
    digits = "235" if decades < 3 else ""
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in digits else "")


def _caption(results: pd.DataFrame, finite: pd.DataFrame, x: str, hue: str) -> str:
    """What was measured, how often, what the band is and what is left out."""
    same = [c for c in ("model", "criterion", "protocol") if c in results and results[c].nunique() == 1]
    lines = [" · ".join(str(results[column].iloc[0]) for column in same)]
    if "seed" in finite:
        counts = finite.groupby([hue, x], observed=True)["seed"].nunique()
        many = counts[counts > 1]
        if many.empty:
            lines.append("one seed, no band")
        else:
            seeds = f"{many.min()}" if many.min() == many.max() else f"{many.min()} to {many.max()}"
            alone = "; points without a band: one run" if len(many) < len(counts) else ""
            lines.append(f"mean of {seeds} seeds, band from lowest to highest{alone}")
    if lost := len(results) - len(finite):
        lines.append(f"{lost} of {len(results)} rows are not finite and not shown")
    return "\n".join(line for line in lines if line)
