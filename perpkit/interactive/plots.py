"""Plots: a table in, a figure out, nothing else."""

import io
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart by people with any colour vision; markers and dashes for print in grey.
COLOURS = ["#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X"]
DASHES: list = [
    "-",
    (0, (6, 2)),
    (0, (2, 1.5)),
    (0, (6, 2, 1.5, 2)),
    (0, (9, 3)),
    (0, (1, 1)),
    (0, (4, 1, 1, 1)),
]
LABELS = {
    "perplexity": "perplexity (test)",
    "sparsity": "sparsity of the pruned matrices",
    "trainable_share": "trainable parameters",
}


class DataFigure(Figure):
    """A figure that carries the table it was drawn from as `table` and shows itself in a notebook."""

    table: pd.DataFrame

    def _repr_png_(self) -> bytes:
        picture = io.BytesIO()
        self.savefig(picture, format="png", dpi=110)
        return picture.getvalue()


def plot_curves(
    results: pd.DataFrame, *, x: str = "sparsity", y: str = "perplexity", hue: str = "retrain"
) -> DataFigure:
    """Draw `y` over `x`, one curve for each value of `hue`: mean over seeds, band from lowest to highest.

    The dense model and the floor, the best possible perplexity, are drawn as lines where the table has the
    columns `dense_perplexity` and `floor` and y is the perplexity; the axis is logarithmic when the values
    span more than a factor of four. The caption says how many seeds there are and what the band is.

    Raises ValueError for an empty table or a missing column, naming those there are.

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
    figure = DataFigure(figsize=(6.4, 4.2), layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    shown = results.dropna(subset=[y])
    for i, (name, rows) in enumerate(shown.groupby(hue, sort=False)):
        curve = rows.groupby(x)[y].agg(["mean", "min", "max"])
        i %= len(COLOURS)
        axes.plot(
            curve.index,
            curve["mean"],
            color=COLOURS[i],
            marker=MARKERS[i],
            linestyle=DASHES[i],
            label=str(name),
            markersize=5,
            linewidth=1.6,
        )
        axes.fill_between(curve.index, curve["min"], curve["max"], color=COLOURS[i], alpha=0.18, linewidth=0)
    if y == "perplexity":
        _reference(axes, results, "dense_perplexity", "dense model", ":")
        _reference(axes, results, "floor", "best possible", "-.")
    if shown[y].min() > 0 and shown[y].max() > 4 * shown[y].min():
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "235" else "")
    axes.set_xlabel(LABELS.get(x, x.replace("_", " ")))
    axes.set_ylabel(LABELS.get(y, y.replace("_", " ")))
    if x == "sparsity":
        axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    axes.grid(alpha=0.25)
    axes.legend(title=hue, fontsize=9, title_fontsize=9)
    axes.set_title(_caption(results), fontsize=8, color="#444444")
    figure.table = results
    return figure


def _reference(axes: Axes, results: pd.DataFrame, column: str, label: str, dash: str) -> None:
    """A horizontal line where the column has one value; several models have no common line."""
    if column in results and results[column].nunique() == 1:
        value = results[column].dropna().iloc[0]
        axes.axhline(value, color="#666666", linestyle=dash, linewidth=1.2, label=f"{label} ({value:.2f})")


def _caption(results: pd.DataFrame) -> str:
    parts = []
    for column in ("model", "criterion", "protocol"):
        if column in results and results[column].nunique() == 1:
            parts.append(str(results[column].iloc[0]))
    if "seed" in results:
        seeds = results["seed"].nunique()
        many = f"mean of {seeds} seeds, band from lowest to highest"
        parts.append(many if seeds > 1 else "one seed, no band")
    return " · ".join(parts[:2]) + "\n" + " · ".join(parts[2:])


def save_figure(figure: DataFigure, path: str | Path) -> list[Path]:
    """Write a figure as PDF, SVG and PNG and the table behind it as CSV; returns the files.

    `path` is the name without an ending; its folder is created.

    Raises ValueError when the files cannot be written.

    >>> import tempfile
    >>> table = pd.DataFrame({"sparsity": [0.5], "perplexity": [3.0], "retrain": ["none"]})
    >>> files = save_figure(plot_curves(table), Path(tempfile.mkdtemp()) / "curve")
    >>> [file.suffix for file in files]
    ['.pdf', '.svg', '.png', '.csv']
    """
    path = Path(path)
    files = [path.with_name(path.name + ending) for ending in (".pdf", ".svg", ".png", ".csv")]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for file in files[:3]:
            figure.savefig(file, dpi=200)
        figure.table.to_csv(files[3], index=False)
    except OSError as error:
        raise ValueError(f"cannot write the figure {str(path)!r}: {error}") from error
    return files
