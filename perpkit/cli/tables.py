"""Rows of results as a compact table, and as JSON."""

import json
import math
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    import pandas as pd

RESULTS = ("perplexity", "accuracy", "accuracy_stderr", "trainable_share", "seconds")
# One line above the table where all rows agree, else columns.
CONTEXT = ("dense_perplexity", "floor", "dense_accuracy")
# These follow from other axes as often as they are chosen.
SETTINGS = (
    *("unit_steps", "unit_lr", "rank", "alpha", "start", "steps", "lr", "batch", "accumulate"),
    *("schedule", "weight_decay", "seed"),
)


def compact(table: "pd.DataFrame") -> "pd.DataFrame":
    """The axes that vary and the main results.

    >>> import pandas as pd
    >>> rows = {"model": ["m", "m"], "retrain": ["none", "biases"], "steps": [0, 100], "perplexity": [6, 2]}
    >>> compact(pd.DataFrame(rows)).columns.tolist()
    ['retrain', 'perplexity']
    """
    context = [name for name in CONTEXT if name in table and table[name].nunique() > 1]
    results = [name for name in RESULTS if name in table and table[name].notna().any()]
    return table[[*varying(table), *results, *context]]


def varying(table: "pd.DataFrame") -> list[str]:
    """The axes in which rows differ, but of the settings only those that tell rows apart."""
    from ..experiments.grid import AXES

    axes = [axis for axis in AXES if axis in table and table[axis].nunique(dropna=False) > 1]
    chosen = [axis for axis in axes if axis not in SETTINGS]
    for axis in axes:
        if axis in SETTINGS and _combinations(table, [*chosen, axis]) > _combinations(table, chosen):
            chosen.append(axis)
    return [axis for axis in axes if axis in chosen]


def _combinations(table: "pd.DataFrame", columns: list[str]) -> int:
    return len(table[columns].drop_duplicates()) if columns else 1


def context(table: "pd.DataFrame") -> str | None:
    """What the rows were measured on and beside, where all agree."""
    if "protocol" not in table or table["protocol"].nunique() != 1:
        return None
    words = [f"Measured on {table['protocol'].dropna().iloc[0]}"]
    for name, said in zip(CONTEXT, ("dense model", "best possible", "dense accuracy"), strict=True):
        if name in table and table[name].nunique() == 1:
            words.append(f"{said} {table[name].dropna().iloc[0]:.4g}")
    return "; ".join(words)


def print_table(table: "pd.DataFrame") -> None:
    """Print a table on stdout, every row and column of it."""

    def words(value: Any) -> str:
        if value is None or value != value:
            return "-"
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    typer.echo(table.map(words).to_string(index=False))


def print_json(document: Any) -> None:
    """Print one JSON document on stdout."""
    typer.echo(json.dumps(document, indent=1, allow_nan=False, ensure_ascii=False))


def records(table: "pd.DataFrame") -> list[dict[str, Any]]:
    """The rows for JSON, which has no NaN and no infinity: they are null.

    >>> import pandas as pd
    >>> records(pd.DataFrame({"rank": [16, None], "perplexity": [float("inf"), 2.5]}))
    [{'rank': 16, 'perplexity': None}, {'rank': None, 'perplexity': 2.5}]
    """
    whole = {name for name in table if _is_whole(table[name])}
    return [
        {str(name): _plain(value, name in whole) for name, value in row.items()}
        for row in table.to_dict("records")
    ]


def _is_whole(column: "pd.Series") -> bool:
    """Whether a missing value made numbers out of an axis of whole numbers."""
    from ..experiments.experiment import Experiment

    field = Experiment.__dataclass_fields__.get(str(column.name))
    return field is not None and field.type in (int, int | None)


def _plain(value: Any, whole: bool) -> Any:
    value = value.item() if hasattr(value, "item") else value
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return None
    return int(value) if whole else value
