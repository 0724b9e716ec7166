"""What all plots draw alike: a white card 720 pixels wide, plain words, percentages, a caption under it."""

import textwrap
from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.layout_engine import PlaceHolderLayoutEngine

from .figure import COLOURS, DASHES, DRAWING, MARKERS, DataFigure

WIDTH = 7.2
# From dark to light, and so in order also in grey.
SCALE = "cividis"
# Marks on bars, beside their colours.
HATCHES = ["", "///", "...", "\\\\\\", "xxx", "---", "ooo"]
# What is kept of a mask: never near the white of what is pruned.
KEPT = LinearSegmentedColormap.from_list("kept", ["#B9D9EE", "#56B4E9", "#0072B2", "#002B4D"])
CAPTION = "#444444"
LINE = 113

LABELS = {
    "accuracy": "mean accuracy",
    "peak_memory": "peak memory",
    "perplexity": "perplexity (test)",
    "retrain": "retrained",
    "seconds": "seconds to prune and retrain",
    "sparsity": "sparsity of the pruned matrices",
    "trainable_share": "trainable parameters",
}
# The word for a missing value, of all columns but these "none".
MISSING = {"pattern": "unstructured"}
SHARES = ("sparsity", "reached_sparsity", "trainable_share", "agreement", "overlap")


def card(table: pd.DataFrame, height: float) -> DataFigure:
    """An empty white figure of a height in inches that carries its own copy of a table."""
    # White also in a dark theme: every colour was chosen against white.
    figure = DataFigure(figsize=(WIDTH, height), layout="constrained", facecolor="white")
    figure.table = table.copy()
    return figure


def write_caption(figure: DataFigure, lines: Iterable[str]) -> None:
    """Write lines under a figure, below those that stand there, empty ones left out and long ones wrapped.

    >>> figure = card(pd.DataFrame(), height=2)
    >>> write_caption(figure, ["n = 3", ""])
    >>> figure.get_supxlabel()
    'n = 3'
    """
    wrapped = [plain(textwrap.fill(line, LINE)) for line in lines if line]
    # An empty one would still take room.
    if wrapped:
        text = "\n".join(filter(None, [figure.get_supxlabel(), *wrapped]))
        figure.supxlabel(text, x=0.01, ha="left", fontsize=8, color=CAPTION)
        if isinstance(figure.get_layout_engine(), PlaceHolderLayoutEngine):
            settle(figure)


def settle(figure: DataFigure) -> None:
    """Lay a figure out for good: axes of a fixed shape would move a little at each drawing."""
    figure.set_layout_engine("constrained")
    with DRAWING:
        # The third time nothing moves any more.
        for _ in range(3):
            figure.draw_without_rendering()
    figure.set_layout_engine("none")


def check_table(table: pd.DataFrame, columns: Sequence[str]) -> None:
    """Raise ValueError when there is nothing to plot or a column is missing.

    >>> check_table(pd.DataFrame({"x": [1]}), ["x", "y"])
    Traceback (most recent call last):
    ...
    ValueError: the table has no column 'y'; it has x
    """
    if table.empty:
        raise ValueError("the table has no rows to plot")
    for column in columns:
        if column not in table:
            names = ", ".join(map(str, table.columns))
            raise ValueError(f"the table has no column {column!r}; it has {names}")


def named(table: pd.DataFrame, *columns: str | None) -> pd.DataFrame:
    """The table with a word where a name is missing: that of unstructured pruning in `pattern`, else "none".

    >>> named(pd.DataFrame({"pattern": [None, "2:4"], "rank": [4, None]}), "pattern", "rank").values.tolist()
    [['unstructured', 4.0], ['2:4', 'none']]
    """
    words = {
        column: table[column].astype(object).where(table[column].notna(), MISSING.get(column, "none"))
        for column in columns
        if column is not None and table[column].isna().any()
    }
    return table.assign(**words)


def finite_rows(table: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """The rows whose values in some columns are all finite numbers.

    Raises ValueError for a column without any.
    """
    kept = np.ones(len(table), dtype=bool)
    for column in columns:
        try:
            finite = np.isfinite(table[column].astype(float))
        except (TypeError, ValueError) as error:
            raise ValueError(f"the column {column!r} holds no numbers: {error}") from error
        if not finite.any():
            raise ValueError(f"no value of {column!r} is finite")
        kept &= finite
    return table[kept]


def left_out(table: pd.DataFrame, finite: pd.DataFrame) -> str:
    """How many rows are not drawn, in words; empty for none."""
    lost = len(table) - len(finite)
    return f"{lost} of {len(table)} rows are not finite and not shown" if lost else ""


def words(column: str) -> str:
    """The name of a column as it stands at an axis.

    >>> words("trainable_share"), words("stderr_of_mean")
    ('trainable parameters', 'stderr of mean')
    """
    return plain(LABELS.get(column, column.replace("_", " ")))


def plain(text: object) -> str:
    """Text that is drawn as it is: dollars begin no formula, and a leading underscore hides nothing.

    >>> plain("$5"), plain("_a") == "_a"
    ('\\\\$5', False)
    """
    escaped = str(text).replace("$", r"\$")
    # Matplotlib leaves labels with a leading underscore out of legends; the mark before it has no width.
    return f"\u200b{escaped}" if escaped.startswith("_") else escaped


def names_of(column: pd.Series) -> list:
    """The different values in order: that of the categories, else that of the table."""
    if isinstance(column.dtype, pd.CategoricalDtype):
        return list(column.cat.categories)
    return list(column.dropna().unique())


def is_share(column: str) -> bool:
    """Whether the numbers of a column are shares, shown in percent."""
    return column in SHARES or column.startswith(("accuracy", "dense_accuracy"))


def figure_of(column: str, value: float) -> str:
    """A value in figures: shares in percent, bytes in MB and GB, what is small or large with an exponent.

    >>> figure_of("sparsity", 0.5), figure_of("peak_memory", 2.5e9), figure_of("perplexity", 1.5)
    ('50 %', '2.5 GB', '1.5')
    """
    if is_share(column):
        return f"{100 * value:.4g} %"
    if column == "peak_memory":
        return f"{value / 1e9:.4g} GB" if abs(value) >= 1e9 else f"{value / 1e6:.4g} MB"
    return f"{value:g}"


def tidy(axes: Axes) -> None:
    """A faint grid below what is drawn, and no frame above and on the right."""
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def marks(i: int) -> dict:
    """Colour, marker and dash of the i-th curve; no two of the first 49 are the same."""
    # Past the last colour the markers and dashes shift by one, so that the eighth curve is not the first.
    shift = (i + i // len(COLOURS)) % len(COLOURS)
    return {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[shift], "linestyle": DASHES[shift]}


def fill(i: int) -> dict:
    """Colour and hatch of the i-th bar of a group."""
    hatch = HATCHES[(i + i // len(COLOURS)) % len(HATCHES)]
    # White in the black bars, black in the others.
    colour = COLOURS[i % len(COLOURS)]
    edge = "white" if colour == COLOURS[0] else "black"
    return {"facecolor": colour, "hatch": hatch, "edgecolor": edge, "linewidth": 0.5}


def short_names(names: Sequence[str]) -> list[str]:
    """Names of layers without the beginning that all share and without ".weight".

    >>> short_names(["model.layers.0.q_proj.weight", "model.layers.1.q_proj.weight"])
    ['0.q_proj', '1.q_proj']
    """
    parts = [str(name).removesuffix(".weight").split(".") for name in names]
    dotted = [each for each in parts if len(each) > 1]
    shared = 0
    if len(dotted) > 1:
        shortest = min(len(each) for each in dotted) - 1
        while shared < shortest and len({each[shared] for each in dotted}) == 1:
            shared += 1
    return [".".join(each[shared:]) if len(each) > 1 else each[0] for each in parts]


def over_seeds(table: pd.DataFrame, keys: Sequence[str], value: str) -> pd.DataFrame:
    """Mean, lowest, highest and number of seeds of a value, for every combination of the keys.

    Raises ValueError where rows agree in the keys and in the seed.
    """
    columns = [*keys, *(["seed"] if "seed" in table else [])]
    if (twice := table.duplicated(columns)).any():
        row = table.loc[twice, columns].iloc[0]
        said = ", ".join(f"{column} {row[column]!r}" for column in columns)
        raise ValueError(f"several rows have {said}; select the rows of one experiment")
    groups = table.groupby(list(keys), sort=False, observed=True, dropna=False)[value]
    found = groups.agg(["mean", "min", "max", "count"]).reset_index()
    # The mean of equal numbers may differ from them by rounding, and a negative spread is refused.
    return found.assign(mean=found["mean"].clip(found["min"], found["max"]))


def seeds_said(counts: pd.Series, drawn: str = "bars") -> str:
    """How many seeds stand behind each point and what shows their spread, in words."""
    many = counts[counts > 1]
    if many.empty:
        return f"one seed, no {drawn}"
    seeds = f"{many.min()}" if many.min() == many.max() else f"{many.min()} to {many.max()}"
    alone = (
        f"; points without {'a ' if drawn == 'band' else ''}{drawn}: one run"
        if len(many) < len(counts)
        else ""
    )
    return f"mean of {seeds} seeds, {drawn} from lowest to highest{alone}"
