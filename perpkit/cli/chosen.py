"""Which rows of a store `perpkit results` is asked for."""

import csv
import difflib
from typing import TYPE_CHECKING, Any

import typer

from .axes import WHOLE

if TYPE_CHECKING:
    import pandas as pd

    from ..experiments.store import Store


def chosen(store: "Store", where: list[str], failed: bool | None) -> "pd.DataFrame":
    """The rows that meet all conditions, with a column `outdated` that says why no sweep would take a row.

    Conditions on one column are alternatives, as the values of one are.

    Raises ValueError for a condition that is none and a column that no row has.
    """
    from ..experiments.outdated import outdated

    everything = store.table(failed=None)
    everything["outdated"] = [outdated(row) for row in everything.to_dict("records")]
    wanted: dict[str, list[str]] = {}
    for condition in where:
        column, equals, words = condition.partition("=")
        if not equals:
            raise ValueError(f"--where {condition!r}: write axis=value, such as retrain=biases")
        check_column(column, everything)
        wanted.setdefault(column, []).extend(values(column, words))
    rows = everything
    if failed is not None:
        has_failed = everything["error"].notna() if "error" in everything else everything["key"].isna()
        rows = everything[has_failed == failed]
    for column, several in wanted.items():
        _hint(column, several, everything)
        rows = rows[[_is_one_of(value, several) for value in rows[column]]]
    if failed is False:
        rows = rows.drop(columns=["traceback"], errors="ignore")
    return rows.reset_index(drop=True)


def values(column: str, words: str) -> list[str]:
    """The values that a condition names, with commas; quotes hold together what has commas of its own.

    >>> values("sparsity", "0.5,0.7"), values("text", '"a,b.txt",c4'), values("tasks", "boolq,rte")
    (['0.5', '0.7'], ['a,b.txt', 'c4'], ['boolq,rte'])
    """
    if column in WHOLE:
        return [",".join(word.strip() for word in words.split(","))]
    return next(csv.reader([words], skipinitialspace=True), [""])


def check_column(name: str, table: "pd.DataFrame") -> None:
    """Raise ValueError for a column that a table with rows does not have, with the nearest."""
    if name not in table and not table.empty:
        near = difflib.get_close_matches(name, table.columns, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(f"there is no column {name!r}{hint} The rows have {', '.join(table.columns)}")


def _hint(column: str, several: list[str], table: "pd.DataFrame") -> None:
    """Say on stderr which value is near to one that no row has."""
    there = [value for value in table[column].drop_duplicates() if isinstance(value, str)]
    for word in several:
        near = difflib.get_close_matches(word, there, n=1)
        if near and not any(_is_one_of(value, [word]) for value in table[column]):
            typer.echo(f"no row has {column}={word}; did you mean {near[0]!r}?", err=True)


def _is_one_of(value: Any, several: list[str]) -> bool:
    """As numbers where both are, as words else; nothing is the word "none"."""
    if value is None or value != value:
        return "none" in several
    if isinstance(value, int | float):
        return any(_number(word) == value for word in several)
    return str(value) in several


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None
