"""perpkit results"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .exits import errors_in_words
from .sweep import JsonOption, StoreOption
from .tables import compact, print_json, print_table, records

if TYPE_CHECKING:
    import pandas as pd

    from ..experiments.store import Store


def results(
    store: StoreOption = None,
    where: Annotated[
        list[str] | None, typer.Option(help="axis=value, or axis=value,value for any of them; repeatable.")
    ] = None,
    failed: Annotated[bool, typer.Option("--failed", help="Failed rows instead of finished ones.")] = False,
    everything: Annotated[bool, typer.Option("--all", help="Finished and failed rows.")] = False,
    outdated: Annotated[
        bool, typer.Option("--outdated", help="Only rows that no sweep of this version would take.")
    ] = False,
    columns: Annotated[str | None, typer.Option(help="Columns to show, with commas.")] = None,
    traceback: Annotated[bool, typer.Option("--traceback", help="Print where failed rows failed.")] = False,
    export: Annotated[
        Path | None, typer.Option(help="Write the rows, all columns, .csv or .parquet.")
    ] = None,
    delete: Annotated[bool, typer.Option("--delete", help="Delete the rows shown.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Delete without asking.")] = False,
    as_json: JsonOption = False,
) -> None:
    """List, filter, export or delete the rows that sweeps have kept."""
    with errors_in_words("results"):
        from ..experiments.store import Store

        if delete and not (where or failed or outdated or everything):
            raise ValueError("say which rows to delete: --where, --failed, --outdated or --all")
        # First read-only: what is not there must not come into being by deleting from it.
        kept = Store(store, readonly=True)
        table = _chosen(kept, where or [], None if everything or outdated else failed or traceback, outdated)
        if export is not None:
            kept.export(export, table)
        _show(table, columns, as_json, str(kept.path))
        if traceback and not as_json:
            _show_tracebacks(table)
        if delete:
            _delete(Store(kept.path), table, yes)


def _chosen(store: "Store", where: list[str], failed: bool | None, outdated: bool) -> "pd.DataFrame":
    rows = store.table(failed=failed)
    for condition in where:
        axis, equals, words = condition.partition("=")
        if not equals:
            raise ValueError(f"--where {condition!r}: write axis=value, such as retrain=biases")
        if axis not in rows:
            if rows.empty:
                continue
            raise ValueError(f"there is no column {axis!r}; the rows have {', '.join(rows.columns)}")
        wanted = [_value(word) for word in words.split(",")]
        rows = rows[[_plain(value) in wanted for value in rows[axis]]]
    if outdated:
        from ..experiments.experiment import RESULT_FORMAT

        if "format" in rows:
            rows = rows[rows["format"] != RESULT_FORMAT]
    return rows.reset_index(drop=True)


def _value(word: str) -> Any:
    """A number where the word is one."""
    try:
        return float(word)
    except ValueError:
        return word


def _plain(value: Any) -> Any:
    """A cell as it is compared: numbers as floats, nothing as the word "none"."""
    if value is None or value != value:
        return "none"
    return float(value) if isinstance(value, int | float) else value


def _show(table: "pd.DataFrame", columns: str | None, as_json: bool, store: str) -> None:
    shown = table.drop(columns=["traceback"], errors="ignore")
    if columns is not None:
        names = [name.strip() for name in columns.split(",")]
        if missing := [name for name in names if name not in table]:
            raise ValueError(f"there is no column {missing[0]!r}; the rows have {', '.join(table.columns)}")
        shown = table[names]
    if as_json:
        print_json({"rows": records(table if columns is None else shown), "store": store})
    elif table.empty:
        typer.echo(f"no such rows in {store}")
    else:
        print_table(_listed(shown) if columns is None else shown)
        typer.echo(f"{len(table)} row{'' if len(table) == 1 else 's'} in {store}")


def _listed(table: "pd.DataFrame") -> "pd.DataFrame":
    """For a terminal: what varies and was measured, and the first line of errors."""
    shown = compact(table)
    if "error" in table and table["error"].notna().any():
        errors: Any = [words.splitlines()[0] if isinstance(words, str) else None for words in table["error"]]
        shown = shown.assign(error=errors)
    return shown


def _show_tracebacks(table: "pd.DataFrame") -> None:
    if "traceback" not in table:
        return
    for number, words in enumerate(table["traceback"]):
        if isinstance(words, str):
            typer.echo(f"\nrow {number + 1}, {table['error'][number]}\n{words.rstrip()}")


def _delete(store: "Store", table: "pd.DataFrame", yes: bool) -> None:
    if table.empty:
        return
    if not yes and not typer.confirm(f"Delete these {len(table)} rows?", err=True):
        typer.echo("nothing is deleted", err=True)
        return
    typer.echo(f"{store.delete(table['key'])} rows deleted", err=True)
