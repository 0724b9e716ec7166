"""perpkit results"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .chosen import check_column, chosen
from .exits import errors_in_words
from .sweep import JsonOption, StoreOption
from .tables import compact, print_json, print_table, records

if TYPE_CHECKING:
    import pandas as pd

    from ..experiments.store import Store


def results(
    store: StoreOption = None,
    where: Annotated[
        list[str] | None,
        typer.Option(
            help="axis=value, or axis=value,value for any of them; repeatable. The commas of tasks are "
            "theirs; elsewhere quotes keep a value together: 'text=\"a,b.txt\"'."
        ),
    ] = None,
    failed: Annotated[bool, typer.Option("--failed", help="Failed rows instead of finished ones.")] = False,
    everything: Annotated[bool, typer.Option("--all", help="Finished and failed rows.")] = False,
    outdated: Annotated[
        bool,
        typer.Option(
            "--outdated",
            help="Only rows that no sweep from here would take: of another format, or made from files that "
            "have changed or are not here (--delete leaves those whose files are not here).",
        ),
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
    with errors_in_words("results", as_json=as_json):
        from ..experiments.outdated import NOT_HERE
        from ..experiments.store import Store

        if delete and not (where or failed or outdated or everything):
            raise ValueError("say which rows to delete: --where, --failed, --outdated or --all")
        # First read-only: what is not there must not come into being by deleting from it.
        kept = Store(store, readonly=True)
        if everything and failed:
            raise ValueError("--all takes finished and failed rows, --failed only failed ones; give one")
        both = everything or (outdated and not failed)
        table = chosen(kept, where or [], None if both else failed or traceback)
        if outdated:
            table = table[table["outdated"].notna()].reset_index(drop=True)
        if export is not None:
            kept.export(export, table)
        _show(table, columns, as_json, str(kept.path))
        if traceback and not as_json:
            _show_tracebacks(table)
        if delete:
            # Of rows whose files cannot be found from here nobody can say that they are of no use.
            useless = table[table["outdated"] != NOT_HERE] if outdated else table
            if left := len(table) - len(useless):
                typer.echo(f"{left} left: their files are not here, so they may be good elsewhere", err=True)
            _delete(Store(kept.path), useless.reset_index(drop=True), yes)


def _show(table: "pd.DataFrame", columns: str | None, as_json: bool, store: str) -> None:
    shown = table.drop(columns=["traceback"], errors="ignore")
    if columns is not None:
        names = [name.strip() for name in columns.split(",")]
        for name in names:
            check_column(name, table)
        shown = table.reindex(columns=names)
    if as_json:
        print_json({"rows": records(table if columns is None else shown), "store": store})
    elif table.empty:
        typer.echo(f"no such rows in {store}")
    else:
        print_table(_listed(shown) if columns is None else shown)
        typer.echo(f"{len(table)} row{'' if len(table) == 1 else 's'} in {store}")
        _count_outdated(int(table["outdated"].notna().sum()))


def _listed(table: "pd.DataFrame") -> "pd.DataFrame":
    """For a terminal: what varies and was measured, and the first line of errors."""
    shown = compact(table)
    if table["outdated"].notna().any():
        shown = shown.assign(outdated=table["outdated"])
    if "error" in table and table["error"].notna().any():
        errors: Any = [words.splitlines()[0] if isinstance(words, str) else None for words in table["error"]]
        shown = shown.assign(error=errors)
    return shown


def _count_outdated(count: int) -> None:
    if count:
        typer.echo(
            f"{count} of them outdated: no sweep from here would take {'it' if count == 1 else 'them'} "
            "(--outdated shows only these, --outdated --delete deletes all of these but 'files not here')"
        )


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
    # A sweep may have finished one of them while the question stood there.
    now = {key: row.get("error") for key, row in store.get(table["key"]).items()}
    same = [
        key
        for key, error in zip(table["key"], table.get("error", [None] * len(table)), strict=True)
        if key in now and (now[key] is None) == (not isinstance(error, str))
    ]
    typer.echo(f"{store.delete(same)} rows deleted", err=True)
    if left := len(table) - len(same):
        typer.echo(f"{left} left: they have changed since they were listed", err=True)
