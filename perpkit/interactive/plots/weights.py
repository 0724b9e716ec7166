"""Histograms of weights, before and after."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
import torch

from .card import card, marks, plain, tidy, write_caption
from .figure import DataFigure, on_white

BINS = 101
# So many standard deviations away, a weight is an outlier and the counts need a logarithmic axis.
FAR = 10


@on_white()
def plot_weights(weights: Mapping[str, torch.Tensor]) -> DataFigure:
    """Draw how often each size of weight occurs, one line for each tensor, in common bins.

    `weights` maps names, such as "dense" and "pruned", to tensors of any shape. Weights that are exactly zero
    would be one spike that hides the others: they are told in the legend and not drawn. Counts stand on a
    logarithmic axis when a weight lies more than ten standard deviations from zero. The figure's table has
    `name`, the bin from `low` to `high`, and `count`; its rows from 0 to 0 count the exact zeros.

    Raises ValueError for no weights, and none that is finite.

    >>> table = plot_weights({"pruned": torch.tensor([0.0, 0.0, 1.0, 2.0])}).table
    >>> table["count"].sum().item(), table[table.low == table.high]["count"].tolist()
    (4, [2])
    """
    values = {name: tensor.detach().float().cpu().numpy().ravel() for name, tensor in weights.items()}
    finite = {name: each[np.isfinite(each)] for name, each in values.items()}
    if not sum(len(each) for each in finite.values()):
        raise ValueError(f"there are no finite weights to draw, of {len(values)} tensors")
    drawn = {name: each[each != 0] for name, each in finite.items()}
    # Symmetric and odd, so that zero lies in the middle of a bin and not on the edge of two.
    largest = max((float(np.abs(each).max()) for each in drawn.values() if len(each)), default=1.0)
    edges = np.linspace(-largest, largest, BINS + 1)
    counts = {name: np.histogram(each, edges)[0] for name, each in drawn.items()}
    figure = card(_table(finite, counts, edges), height=4.2)
    axes = figure.subplots()
    for i, (name, count) in enumerate(counts.items()):
        look = marks(i)
        axes.stairs(count, edges, color=look["color"], alpha=0.12, fill=True)
        axes.stairs(
            count,
            edges,
            color=look["color"],
            linestyle=look["linestyle"],
            linewidth=1.6,
            label=plain(f"{name}: {_zeros(finite[name])}"),
        )
    if any(len(each) and np.abs(each).max() > FAR * each.std() for each in drawn.values()):
        axes.set_yscale("log")
        axes.set_ylim(bottom=0.7)
    else:
        axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
    axes.set_xlabel("weight")
    axes.set_ylabel("number of weights")
    tidy(axes)
    figure.legend(fontsize=9, loc="outside upper left", ncols=1, frameon=False)
    write_caption(figure, _caption(values, finite, edges))
    return figure


def _zeros(values: np.ndarray) -> str:
    zeros = int((values == 0).sum())
    if not zeros:
        return f"{len(values):,} weights, none exactly zero"
    return f"{len(values):,} weights, {100 * zeros / len(values):.4g} % exactly zero (not drawn)"


def _table(finite: dict[str, np.ndarray], counts: dict[str, np.ndarray], edges: np.ndarray) -> pd.DataFrame:
    tables = []
    for name, count in counts.items():
        tables.append(pd.DataFrame({"name": name, "low": edges[:-1], "high": edges[1:], "count": count}))
        zeros = int((finite[name] == 0).sum())
        tables.append(pd.DataFrame({"name": [name], "low": [0.0], "high": [0.0], "count": [zeros]}))
    return pd.concat(tables, ignore_index=True)


def _caption(values: dict[str, np.ndarray], finite: dict[str, np.ndarray], edges: np.ndarray) -> list[str]:
    lines = [f"{BINS} bins of width {edges[1] - edges[0]:.3g}"]
    for name, each in values.items():
        if lost := len(each) - len(finite[name]):
            lines.append(f"{lost} of {len(each)} weights of {name} are not finite and not shown")
    return lines
