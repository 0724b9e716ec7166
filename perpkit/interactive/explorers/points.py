"""What the sparsity explorer shows: curves with one point marked, that point in words, the rows."""

import html
import math
from collections.abc import Callable

import matplotlib
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke

from ..plots.card import figure_of, is_share
from ..plots.curves import plot_curves
from ..plots.figure import DRAWING, GREY, Backdrop, DataFigure, on_white
from .choices import Choice
from .offers import UNSTRUCTURED

# The slider's end, so that the curves stay where they are when points are added.
LAST = 0.9
# Of what is drawn last, legends included.
ABOVE = 10
# Rows of the table in the page; the files have them all.
MOST_ROWS = 300
COLUMNS = ["criterion", "pattern", "sparsity", "retrain", "seed", "perplexity", "accuracy"]
COLUMNS += ["trainable_share", "seconds"]


def draw(
    table: pd.DataFrame,
    choice: Choice,
    retrainings: list[str],
    measures: list[str],
    published: pd.DataFrame | None = None,
) -> DataFigure:
    """The curves of the chosen criterion, and a line at the choice with its points in figures.

    A pattern such as 2:4 stands beside the unstructured curves, as points of their own. `measures` are the
    columns drawn side by side, `published` what `published` gives.
    """
    figure = draw_curves(table, choice, retrainings, measures, published)
    mark(figure, table, choice, measures)
    return figure


def draw_curves(
    table: pd.DataFrame,
    choice: Choice,
    retrainings: list[str],
    measures: list[str],
    published: pd.DataFrame | None = None,
) -> DataFigure:
    """The same without the mark at the choice: it depends on the criterion and the pattern only."""
    rows = in_view(table, choice)
    labelled = rows.assign(
        retrain=[_label(*each) for each in zip(rows["retrain"], rows["pattern"], strict=True)]
    )
    # All the choices, finished or not, so that each keeps its colour.
    patterns = dict.fromkeys([None, choice.nm])
    names = [_label(name, pattern) for pattern in patterns for name in retrainings]
    labelled["retrain"] = pd.Categorical(labelled["retrain"], categories=names)
    labelled = labelled.sort_values(["retrain", "sparsity", "seed"], ignore_index=True)
    if published is not None:
        if choice.nm is not None:
            # Nothing lies between the dense model and a pattern.
            published = published[published["sparsity"] > 0]
        published = published.assign(label=[_label(name, choice.nm) for name in published["label"]])
    figure = plot_curves(labelled, y=measures, published=published)
    for axes in figure.axes:
        axes.set_xlim(-0.02, max(LAST, rows["sparsity"].max()) + 0.04)
        # Room for the figures at the highest and lowest points.
        axes.margins(y=0.15)
    # Behind the figure stand the rows as they are.
    ours = figure.table["retrain"].astype(object)
    figure.table["retrain"] = [str(name).partition(", ")[0] for name in ours]
    return figure


@on_white()
def mark(figure: DataFigure, table: pd.DataFrame, choice: Choice, measures: list[str]) -> list[Artist]:
    """Draw a line at the choice into its curves, with its points in figures; returns what was drawn."""
    artists: list[Artist] = []
    for axes, measure in zip(figure.axes, measures, strict=True):
        artists.append(axes.axvline(choice.sparsity, color=GREY, linewidth=1))
        values = {name: point(table, choice, name)[measure].mean() for name in ("none", choice.retrain)}
        artists += _mark(axes, choice.sparsity, values, measure)
    for artist in artists:
        # The curves stay where they are, wherever the mark stands, and below it.
        artist.set_in_layout(False)
        artist.set_zorder(ABOVE)
    return artists


class Pictures:
    """Pictures of curves with a mark that moves: as long as the curves are the same, only it is drawn anew.

    A picture is the one that `draw` gives, to the last byte, unless the figures at a mark reach into another
    panel. Not for two threads at once.
    """

    def __init__(self, measures: list[str]):
        self._measures = measures
        self._key: object = None
        self._curves: tuple[DataFigure, Backdrop] | None = None

    def png(
        self, key: object, curves: Callable[[], DataFigure], table: pd.DataFrame, choice: Choice
    ) -> bytes:
        """The PNG file's bytes with the mark at a choice; `curves()` is called when the key is a new one."""
        # Fonts and the like may have been set in between; while something is drawn they are not the user's.
        with DRAWING:
            key = key, matplotlib.rcParams.copy()
        if self._curves is None or key != self._key:
            # Forgotten first: whatever ends the drawing, nothing half-done is kept.
            self._curves = None
            figure = curves()
            self._key, self._curves = key, (figure, Backdrop(figure))
        figure, backdrop = self._curves
        marks = mark(figure, table, choice, self._measures)
        try:
            return backdrop.png(marks)
        finally:
            for artist in marks:
                artist.remove()


def in_view(table: pd.DataFrame, choice: Choice) -> pd.DataFrame:
    """The rows of a criterion that are drawn together: unstructured ones, and those of the chosen pattern."""
    patterns = table["pattern"].isna() | (table["pattern"] == choice.nm)
    return table[(table["criterion"] == choice.criterion) & patterns]


def is_in_view(row: dict, choice: Choice) -> bool:
    """Whether a row is one of those."""
    return row["criterion"] == choice.criterion and row["pattern"] in (None, choice.nm)


def point(table: pd.DataFrame, choice: Choice, retrain: str) -> pd.DataFrame:
    """The rows at a choice after one retraining, of all finished seeds."""
    here = (table["criterion"] == choice.criterion) & (table["sparsity"] == choice.sparsity)
    pattern = table["pattern"].isna() if choice.nm is None else table["pattern"] == choice.nm
    return table[here & pattern & (table["retrain"] == retrain)]


def result(table: pd.DataFrame, choice: Choice) -> str:
    """What is known at a choice, in words, without the retraining where that is not finished."""
    pruned, retrained = point(table, choice, "none"), point(table, choice, choice.retrain)
    if pruned.empty:
        return ""
    dense = pruned["dense_perplexity"].iloc[0]
    said = f"perplexity {dense:.2f} dense → {pruned['perplexity'].mean():.2f} pruned"
    trained = choice.retrain != "none" and not retrained.empty
    if trained:
        seeds = f", mean of {len(retrained)} seeds" if len(retrained) > 1 else ""
        said += (
            f" → <b>{retrained['perplexity'].mean():.2f}</b> after retraining {html.escape(choice.retrain)} "
            f"({100 * retrained['trainable_share'].iloc[0]:.3g} % of the parameters, "
            f"{retrained['seconds'].mean():.1f} s{seeds})"
        )
    if "accuracy" in pruned and pruned["accuracy"].notna().all():
        accuracies = [pruned["dense_accuracy"].iloc[0], pruned["accuracy"].mean()]
        accuracies += [retrained["accuracy"].mean()] if trained else []
        said += "; accuracy " + " → ".join(f"{100 * each:.1f} %" for each in accuracies)
    return said


def rows_table(rows: list[dict], newest: dict | None) -> str:
    """Rows as an HTML table, the newest marked.

    >>> row = {"criterion": "<wanda>", "sparsity": 0.5, "retrain": "none", "perplexity": 2.5}
    >>> "&lt;wanda&gt;" in rows_table([row], row), rows_table([row], row).count("● ")
    (True, 1)
    """
    columns = [column for column in COLUMNS if any(row.get(column) is not None for row in rows)]
    key = {name: i for i, name in enumerate(dict.fromkeys(row["retrain"] for row in rows))}
    ordered = sorted(rows, key=lambda row: (str(row["criterion"]), key[row["retrain"]], row["sparsity"]))
    head = "".join(
        f'<th style="text-align: left; padding: 2px 12px 2px 0">{_head(each)}</th>' for each in columns
    )
    lines = []
    for row in ordered[:MOST_ROWS]:
        mark = "● " if row is newest else ""
        cells = [_cell(column, row.get(column)) for column in columns]
        weight = "; font-weight: bold" if row is newest else ""
        style = f'style="padding: 2px 12px 2px 0{weight}"'
        lines.append(
            f"<tr>{''.join(f'<td {style}>{each}</td>' for each in [mark + cells[0], *cells[1:]])}</tr>"
        )
    more = f"<p>and {len(rows) - MOST_ROWS} more; the CSV file has them</p>" if len(rows) > MOST_ROWS else ""
    # Notebooks set lines of widgets as high as a button.
    table = '<table style="line-height: 1.4">'
    return f"{table}<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>{more}"


def percent(sparsity: float) -> str:
    """A sparsity as it stands at the slider."""
    return f"{100 * sparsity:.4g} %"


def _label(retrain: str, pattern: str | None) -> str:
    return retrain if pd.isna(pattern) else f"{retrain}, {pattern}"


def _mark(axes: Axes, sparsity: float, values: dict[str, float], measure: str) -> list[Artist]:
    artists: list[Artist] = []
    finite = {name: value for name, value in values.items() if math.isfinite(value)}
    for value in finite.values():
        artists += axes.plot(sparsity, value, "o", markersize=12, fillstyle="none", color="black")
        # Curves of perplexity rise and those of accuracy fall: away from them a figure hides nothing.
        below = value < max(finite.values())
        rising = not is_share(measure)
        left = sparsity > (0.8 if below == rising else 0.1)
        offset = (-9 if left else 9, -15 if below else 7)
        place: dict = {"textcoords": "offset points", "ha": "right" if left else "left", "weight": "bold"}
        said = f"{100 * value:.1f} %" if is_share(measure) else f"{value:.2f}"
        label = axes.annotate(said, (sparsity, value), offset, **place)
        label.set_path_effects([withStroke(linewidth=3, foreground="white")])
        artists.append(label)
    return artists


def _head(column: str) -> str:
    return {"trainable_share": "trained", "retrain": "retrained"}.get(column, column)


def _cell(column: str, value: object) -> str:
    if value is None or value != value:
        return UNSTRUCTURED if column == "pattern" else ""
    if column == "perplexity" and isinstance(value, float):
        return f"{value:.3f}"
    if column in ("sparsity", "trainable_share", "accuracy") and isinstance(value, float):
        return figure_of(column, value)
    return html.escape(f"{value:.1f}" if isinstance(value, float) else str(value))
