"""Curves over sparsity, or over anything else that was varied."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from ...experiments.experiment import Experiment
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
    plain,
    seeds_said,
    tidy,
    words,
    write_caption,
)
from .figure import GREY, DataFigure, on_white

INPUTS = [field.name for field in dataclasses.fields(Experiment) if field.name != "seed"]
# The columns whose one value is a line, by the column that is drawn.
REFERENCES = {
    "perplexity": [("dense_perplexity", "dense model", ":"), ("floor", "best possible", "-.")],
    "accuracy": [("dense_accuracy", "dense model", ":")],
}
LINES = ("dense model", "best possible")


@on_white()
def plot_curves(
    results: pd.DataFrame,
    *,
    x: str = "sparsity",
    y: str | Sequence[str] = "perplexity",
    hue: str = "retrain",
    published: pd.DataFrame | None = None,
) -> DataFigure:
    """Draw `y` over `x`, one curve for each value of `hue`: mean over seeds, band from lowest to highest.

    Several `y`, such as `("perplexity", "accuracy")`, are drawn side by side. The dense model and the floor,
    the best possible perplexity, are drawn as lines where the table has one value of `dense_perplexity`,
    `floor` or `dense_accuracy`; an axis is logarithmic when its values span more than a factor of four. The
    caption says how many seeds there are, what the band is, and how many rows are left out because they are
    not finite. A categorical `hue` keeps its order and its colours when a category has no rows.

    `published` has the columns `x`, `y` and `label`: numbers from elsewhere, drawn dashed with open markers,
    in the colour of the curve when the label is a value of `hue`; they join the figure's table, told apart
    by its column `published`.

    Raises ValueError for an empty table, a missing column, no finite value, and a curve that would mix
    different experiments (another model, criterion, …) as if they were seeds.

    >>> table = pd.DataFrame({"sparsity": [0.5, 0.7], "perplexity": [3.0, 19.0], "retrain": ["none", "none"]})
    >>> figure = plot_curves(table)
    >>> figure.axes[0].get_yscale()
    'log'
    """
    drawn = [y] if isinstance(y, str) else list(y)
    if not drawn:
        raise ValueError("y names no column to draw")
    check_table(results, (x, *drawn, hue))
    if published is not None and not published.empty:
        drawn_there = [column for column in drawn if column in published] or drawn
        check_table(published, (x, *drawn_there, "label"))
    else:
        published = None
    results = named(results, hue)
    finite = {column: finite_rows(results, [column]) for column in drawn}
    for rows in finite.values():
        check_unmixed(rows, x, hue)
    figure = card(_behind(results, published, hue), height=4.4 if len(drawn) == 1 else 4.0)
    panels = figure.subplots(1, len(drawn), squeeze=False)[0]
    for axes, column in zip(panels, drawn, strict=True):
        _panel(axes, results, finite[column], published, x, column, hue)
    draw_legend(figure, hue)
    write_caption(figure, _caption(results, finite, x, hue, published))
    return figure


def check_unmixed(rows: pd.DataFrame, x: str, hue: str) -> None:
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


def label_of(rows: pd.DataFrame, hue: str, name: object) -> str:
    """The name of a curve, with the share of the parameters that it trained where that is its point."""
    if hue == "retrain" and "trainable_share" in rows and (share := rows["trainable_share"].iloc[0]) > 0:
        return plain(f"{name} ({100 * share:.3g} %)")
    return plain(name)


def draw_references(axes: Axes, results: pd.DataFrame, y: str) -> None:
    """Horizontal lines where a column has one value; several models have no common line."""
    for column, label, dash in REFERENCES.get(y, []):
        if column in results and results[column].nunique() == 1:
            value = float(results[column].dropna().iloc[0])
            said = f"{label} ({100 * value:.1f} %)" if is_share(column) else f"{label} ({value:.2f})"
            axes.axhline(value, color=GREY, linestyle=dash, linewidth=1.2, label=said)


def scale_values(axes: Axes, values: pd.Series, y: str) -> None:
    """The vertical axis: logarithmic where values explode, percent for shares."""
    if is_share(y):
        axes.yaxis.set_major_formatter(lambda value, _: figure_of(y, value))
    elif values.min() > 0 and values.max() > 4 * values.min():
        _logarithmic(axes, decades=np.log10(values.max() / values.min()))


def draw_legend(figure: DataFigure, hue: str) -> None:
    """One legend for all panels, the reference lines last, outside, where it never covers a curve."""
    curves: dict[str, tuple] = {}
    lines: dict[str, tuple] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            # A line of both panels, such as "dense model (1.96)" and "dense model (95 %)", is one entry.
            name, _, value = label.rpartition(" (")
            if name not in LINES:
                curves.setdefault(label, (handle, label))
            elif name in lines:
                lines[name] = lines[name][0], f"{lines[name][1][:-1]}; {value}"
            else:
                lines[name] = handle, label
    handles, labels = zip(*curves.values(), *lines.values(), strict=True)
    several = len(figure.axes) > 1
    figure.legend(
        handles,
        labels,
        title=words(hue),
        fontsize=9,
        title_fontsize=9,
        loc="outside upper left" if several else "outside right upper",
        alignment="left",
        ncols=3 if several else 1,
    )


def _panel(
    axes: Axes,
    results: pd.DataFrame,
    finite: pd.DataFrame,
    published: pd.DataFrame | None,
    x: str,
    y: str,
    hue: str,
) -> None:
    names = names_of(results[hue])
    for i, name in enumerate(names):
        rows = finite[finite[hue] == name]
        if not rows.empty:
            _curve(axes, rows.groupby(x)[y].agg(["mean", "min", "max"]), label_of(rows, hue, name), i)
    values = finite[y].astype(float)
    if published is not None and y in published:
        points = published[np.isfinite(published[y].astype(float))]
        values = pd.concat([values, points[y].astype(float)])
        _published(axes, points, x, y, names)
    draw_references(axes, results, y)
    scale_values(axes, values, y)
    axes.set_xlabel(words(x))
    axes.set_ylabel(words(y))
    if is_share(x):
        axes.xaxis.set_major_formatter(lambda value, _: figure_of(x, value))
    elif pd.api.types.is_integer_dtype(results[x]):
        # There is no block 1.5.
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    tidy(axes)
    axes.grid(alpha=0.12, which="minor", axis="y")


def _curve(axes: Axes, curve: pd.DataFrame, label: str, i: int) -> None:
    axes.plot(curve.index, curve["mean"], label=label, markersize=5, linewidth=1.6, **marks(i))
    colour = marks(i)["color"]
    axes.fill_between(curve.index, curve["min"], curve["max"], color=colour, alpha=0.18, linewidth=0)


def _published(axes: Axes, points: pd.DataFrame, x: str, y: str, names: list) -> None:
    """Curves of numbers from elsewhere, in the colours of their namesakes or in the next ones."""
    labels = names_of(points["label"])
    others = [label for label in labels if label not in names]
    for label in labels:
        rows = points[points["label"] == label].sort_values(x)
        if rows.empty:
            continue
        look = marks([*names, *others].index(label))
        axes.plot(
            rows[x],
            rows[y],
            color=look["color"],
            marker=look["marker"],
            # Two points say nothing of what lies between them.
            linestyle=(0, (4, 3)) if len(rows) > 2 else "none",
            markerfacecolor="white",
            markersize=7,
            linewidth=1.1,
            label=plain(f"{label}, published"),
        )


def _behind(results: pd.DataFrame, published: pd.DataFrame | None, hue: str) -> pd.DataFrame:
    """The table behind the figure: what was measured and, told apart, what was published."""
    if published is None:
        return results
    theirs = published.rename(columns={"label": hue}).assign(published=True)
    ours = results.assign(published=False)
    if isinstance(ours[hue].dtype, pd.CategoricalDtype):
        ours[hue] = ours[hue].astype(object)
    return pd.DataFrame([*ours.to_dict("records"), *theirs.to_dict("records")])


def _logarithmic(axes: Axes, decades: float) -> None:
    """Plain numbers on a logarithmic axis: 2, 3, 5, 10, 20, …; only powers of ten where many decades show."""
    digits = "235" if decades < 3 else ""
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in digits else "")


def _caption(
    results: pd.DataFrame,
    finite: dict[str, pd.DataFrame],
    x: str,
    hue: str,
    published: pd.DataFrame | None,
) -> list[str]:
    """What was measured, how often, what the band is and what is left out."""
    same = [c for c in ("model", "criterion", "protocol") if c in results and results[c].nunique() == 1]
    lines = [" · ".join(str(results[column].iloc[0]) for column in same)]
    first = next(iter(finite.values()))
    if "seed" in first:
        lines.append(seeds_said(first.groupby([hue, x], observed=True)["seed"].nunique(), "band"))
    if published is not None:
        lines.append("open markers: published numbers")
    for column, rows in finite.items():
        said = left_out(results, rows)
        lines.append(f"{words(column)}: {said}" if said and len(finite) > 1 else said)
    return lines
