"""What models can do: accuracy on question sets, method beside method."""

import numpy as np
import pandas as pd

from .card import (
    card,
    check_table,
    fill,
    finite_rows,
    left_out,
    names_of,
    over_seeds,
    plain,
    seeds_said,
    tidy,
    write_caption,
)
from .figure import GREY, DataFigure, on_white


@on_white()
def plot_abilities(table: pd.DataFrame) -> DataFigure:
    """Draw the accuracy on each `task` as a bar for each `method`, with guessing as a dashed line.

    Columns: `task`, `method`, `accuracy`, and where known `stderr`, `chance`, `n` (the number of questions)
    and `seed`; so the tables of `zero_shot`, one for each method. With several seeds bars are means and the
    lines go from the lowest to the highest, else they are one standard error to each side.

    Raises ValueError for an empty table, a missing column, no finite value, and several rows for one bar.

    >>> table = pd.DataFrame({"task": ["facts"] * 2, "method": ["dense", "pruned"], "accuracy": [0.9, 0.5]})
    >>> [float(bar.get_height()) for bar in plot_abilities(table).axes[0].patches]
    [0.9, 0.5]
    """
    check_table(table, ["task", "method", "accuracy"])
    finite = finite_rows(table, ["accuracy"])
    bars = over_seeds(finite, ["task", "method"], "accuracy")
    if "stderr" in finite:
        bars["stderr"] = list(finite.groupby(["task", "method"], sort=False, observed=True)["stderr"].mean())
    tasks, methods = names_of(table["task"]), names_of(table["method"])
    several = bool((bars["count"] > 1).any())
    figure = card(table, height=4.2)
    axes = figure.subplots()
    width = 0.8 / len(methods)
    for i, method in enumerate(methods):
        mine = bars[bars["method"] == method].set_index("task").reindex(tasks)
        places = np.arange(len(tasks)) + (i - (len(methods) - 1) / 2) * width
        error = _error(mine, several)
        axes.bar(
            places,
            mine["mean"],
            width,
            yerr=error,
            error_kw={"elinewidth": 1.2, "capsize": 2, "ecolor": GREY},
            label=plain(method),
            **fill(i),
        )
    guessing = _guessing(table, tasks)
    for place, chance in enumerate(guessing):
        label = "guessing" if place == 0 else None
        # White below the dashes: seen on bars of any colour.
        axes.plot([place - 0.45, place + 0.45], [chance, chance], color="white", linewidth=3)
        axes.plot(
            [place - 0.45, place + 0.45], [chance, chance], "k", dashes=(3, 2), linewidth=1.4, label=label
        )
    axes.set_xticks(range(len(tasks)), [plain(str(task).replace("_", "\n")) for task in tasks], fontsize=9)
    axes.set_xlim(-0.6, len(tasks) - 0.4)
    axes.set_ylim(0, max(1.0, float(finite["accuracy"].max())))
    axes.set_ylabel("accuracy")
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.4g} %")
    axes.tick_params(axis="x", length=0)
    tidy(axes)
    axes.grid(visible=False, axis="x")
    handles, labels = axes.get_legend_handles_labels()
    # Lines come before bars by themselves; guessing belongs last.
    lines = len(handles) - len(methods)
    figure.legend(
        handles[lines:] + handles[:lines],
        labels[lines:] + labels[:lines],
        fontsize=9,
        loc="outside upper left",
        ncols=min(5, len(handles)),
        frameon=False,
    )
    write_caption(figure, [*_caption(table, bars, several), left_out(table, finite)])
    return figure


def _error(bars: pd.DataFrame, several: bool) -> list | None:
    """The lines of one method's bars: over its seeds, else its standard errors, else none."""
    if several:
        return [bars["mean"] - bars["min"], bars["max"] - bars["mean"]]
    if "stderr" in bars and bars["stderr"].notna().any():
        # A bar cannot rise above all, nor sink below none.
        return [bars["stderr"].clip(upper=bars["mean"]), bars["stderr"].clip(upper=1 - bars["mean"])]
    return None


def _guessing(table: pd.DataFrame, tasks: list) -> list[float]:
    if "chance" not in table or table["chance"].isna().all():
        return []
    return [float(table.loc[table["task"] == task, "chance"].mean()) for task in tasks]


def _caption(table: pd.DataFrame, bars: pd.DataFrame, several: bool) -> list[str]:
    lines = []
    if "n" in table and table["n"].notna().any():
        low, high = int(table["n"].min()), int(table["n"].max())
        lines.append(f"{low if low == high else f'{low} to {high}'} questions in each set")
    if several:
        lines.append(seeds_said(bars["count"], "lines"))
    elif "stderr" in bars and bars["stderr"].notna().any():
        lines.append("lines: one standard error of the accuracy to each side")
    return ["; ".join(lines)]
