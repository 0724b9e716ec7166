"""Layer by layer: bars, and heat maps over blocks and kinds of layers."""

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.colors import LogNorm, Normalize
from matplotlib.ticker import FuncFormatter

from ...pruning.layers import block_name
from .card import (
    SCALE,
    card,
    check_table,
    figure_of,
    fill,
    finite_rows,
    is_share,
    left_out,
    named,
    names_of,
    over_seeds,
    plain,
    seeds_said,
    short_names,
    tidy,
    words,
    write_caption,
)
from .figure import COLOURS, GREY, DataFigure, on_white

# So many bars or names fit below each other on one card.
MOST_NAMES = 60
TALLEST = 11.0
# So many columns of cells leave room for figures.
MOST_FIGURES = 10
# Values that span more than this factor, such as errors, are coloured by their logarithm.
WIDE = 100
# The kind of a block that is one layer, as the first convolution of a network.
WHOLE = "(itself)"


@on_white()
def plot_layers(table: pd.DataFrame, *, y: str = "sparsity", hue: str | None = None) -> DataFigure:
    """Draw a bar for each layer, or one for each value of `hue`, from a table with `layer`, `y` and `hue`.

    Layers stand in the table's order from the top, without the beginning of their names that all share. With
    a column `seed`, bars are means over seeds with a line from the lowest to the highest. Where there are
    more layers than names fit, every second, third, … is named.

    Raises ValueError for an empty table, a missing column, no finite value and several rows for one bar.

    >>> table = pd.DataFrame({"layer": ["0.fc1", "0.fc2"], "sparsity": [0.4, 0.6]})
    >>> [label.get_text() for label in plot_layers(table).axes[0].get_yticklabels()]
    ['fc1', 'fc2']
    """
    check_table(table, ["layer", y, *([hue] if hue else [])])
    table = named(table, hue)
    finite = finite_rows(table, [y])
    bars = over_seeds(finite, ["layer", *([hue] if hue else [])], y)
    layers = names_of(table["layer"])
    groups = names_of(table[hue]) if hue else [None]
    figure = card(table, height=_height(len(layers), len(groups)))
    axes = figure.subplots()
    thickness = 0.8 / len(groups)
    for i, name in enumerate(groups):
        mine = (bars if hue is None else bars[bars[hue] == name]).set_index("layer").reindex(layers)
        places = np.arange(len(layers)) + (i - (len(groups) - 1) / 2) * thickness
        spread = [mine["mean"] - mine["min"], mine["max"] - mine["mean"]]
        several = bool((mine["count"] > 1).any())
        axes.barh(
            places,
            mine["mean"],
            height=thickness,
            xerr=spread if several else None,
            error_kw={"elinewidth": 1, "capsize": 1.5, "ecolor": GREY},
            label=None if hue is None else plain(name),
            # The black of a single group would be heavy.
            **(fill(i) if hue else {"facecolor": COLOURS[2]}),
        )
    step = -(-len(layers) // MOST_NAMES)
    axes.set_yticks(
        range(0, len(layers), step), [plain(name) for name in short_names(layers)][::step], fontsize=8
    )
    axes.set_ylim(len(layers) - 0.4, -0.6)
    axes.set_xlabel(_short(y))
    if is_share(y):
        axes.xaxis.set_major_formatter(lambda value, _: figure_of(y, value))
    tidy(axes)
    axes.grid(visible=False, axis="y")
    if hue:
        figure.legend(
            title=words(hue), fontsize=9, title_fontsize=9, loc="outside right upper", alignment="left"
        )
    lines = [f"{len(layers)} layers" + (f", one in {step} named" if step > 1 else "")]
    if "seed" in table:
        lines.append(seeds_said(bars["count"], "lines"))
    write_caption(figure, [*lines, left_out(table, finite)])
    return figure


@on_white()
def plot_heatmap(
    table: pd.DataFrame, *, x: str = "kind", y: str = "block", value: str = "sparsity"
) -> DataFigure:
    """Draw a value as a map of coloured cells, `y` downwards, `x` to the right, with figures where they fit.

    Colours follow the logarithm where values span more than a factor of 100.

    A table with `layer` and without `kind` or `block`, such as that of `Masks.sparsity(by="layer")`, is given
    them: the block of "model.layers.3.mlp.up_proj.weight" is "3" and its kind "mlp.up_proj". Cells without a
    row are hatched.

    Raises ValueError for an empty table, a missing column, no finite value and several rows for one cell.

    >>> table = pd.DataFrame({"layer": ["h.0.fc.weight", "h.1.fc.weight"], "sparsity": [0.4, 0.6]})
    >>> axes = plot_heatmap(table).axes[0]
    >>> [label.get_text() for label in axes.get_yticklabels()], axes.get_images()[0].get_array().tolist()
    (['0', '1'], [[0.4], [0.6]])
    """
    placed = _placed(table) if {x, y} - set(table.columns) <= {"block", "kind"} else table
    check_table(placed, [x, y, value])
    finite = finite_rows(placed, [value])
    means = over_seeds(finite, [y, x], value)
    rows, columns = names_of(placed[y]), names_of(placed[x])
    cells = means.pivot(index=y, columns=x, values="mean").reindex(index=rows, columns=columns)
    numbers = cells.to_numpy(dtype=float)
    fits = len(columns) <= MOST_FIGURES and len(rows) <= MOST_NAMES
    figure = card(placed, height=min(TALLEST, 2.0 + 0.28 * len(rows)))
    axes = figure.subplots()
    # Under the cells: what is missing is not a colour of the scale.
    axes.set_facecolor("#EEEEEE")
    axes.patch.set_hatch("////")
    axes.patch.set_edgecolor("#BBBBBB")
    low, high = np.nanmin(numbers), np.nanmax(numbers)
    wide = low > 0 and high > WIDE * low
    norm = LogNorm(low, high) if wide else Normalize(low, high)
    image = axes.imshow(numbers, cmap=SCALE, norm=norm, aspect="auto", interpolation="nearest")
    if fits:
        _write_numbers(axes, numbers, image, value)
    for axis, names in ((axes.xaxis, columns), (axes.yaxis, rows)):
        step = -(-len(names) // MOST_NAMES)
        shown = short_names([str(name) for name in names]) if axis is axes.yaxis else [str(n) for n in names]
        axis.set_ticks(range(0, len(names), step), [plain(name) for name in shown][::step], fontsize=8)
    if sum(len(str(name)) for name in columns) > 70:
        axes.tick_params(axis="x", labelrotation=30)
        for label in axes.get_xticklabels():
            label.set_horizontalalignment("right")
            label.set_rotation_mode("anchor")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel(words(x))
    axes.set_ylabel(words(y))
    formatter = FuncFormatter(lambda number, _: figure_of(value, number))
    figure.colorbar(image, ax=axes, format=formatter, label=_short(value), pad=0.02)
    missing = int(np.isnan(numbers).sum())
    lines = [f"{len(finite)} values" + (f", {missing} cells without one hatched" if missing else "")]
    if "seed" in placed and means["count"].max() > 1:
        low, high = means["count"].min(), means["count"].max()
        lines.append(f"mean of {low if low == high else f'{low} to {high}'} seeds")
    write_caption(figure, [*lines, left_out(placed, finite)])
    return figure


def _short(column: str) -> str:
    """The words for a column; of one layer there is nothing more to say than "sparsity"."""
    return column if column == "sparsity" else words(column)


def _height(layers: int, groups: int) -> float:
    thickness = 0.2 if groups == 1 else max(0.2, 0.09 * groups + 0.06)
    return min(TALLEST, 1.2 + thickness * layers)


def _placed(table: pd.DataFrame) -> pd.DataFrame:
    """The table with the block and the kind of each layer."""
    if "layer" not in table:
        return table
    layers = table["layer"].astype(str)
    blocks = layers.map(block_name)
    kinds = [
        layer.removesuffix(".weight").removeprefix(block).lstrip(".") or WHOLE
        for layer, block in zip(layers, blocks, strict=True)
    ]
    return pd.DataFrame({"block": blocks, "kind": kinds}).join(
        table.drop(columns=["block", "kind"], errors="ignore")
    )


def _write_numbers(axes, numbers: np.ndarray, image, value: str) -> None:
    scale = colormaps[SCALE]
    for (i, j), number in np.ndenumerate(numbers):
        if np.isfinite(number):
            red, green, blue, _ = scale(image.norm(number))
            dark = 0.3 * red + 0.59 * green + 0.11 * blue < 0.5
            said = f"{100 * number:.1f} %" if is_share(value) else f"{number:.2g}"
            axes.text(j, i, said, ha="center", va="center", fontsize=8, color="white" if dark else "black")
