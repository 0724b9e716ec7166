"""The store: one row for every run, finished or failed."""

import json
import os
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .database import Database
from .export import write_table
from .rows import Stored, delete, insert

if TYPE_CHECKING:
    import pandas as pd

OWN_COLUMNS = ("key", "finished")


def default_store() -> Path:
    """Where rows go unless told: `PERPKIT_STORE`, else the user's cache folder."""
    if path := os.environ.get("PERPKIT_STORE"):
        return Path(path).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "perpkit" / "results.sqlite"


class Store:
    """Rows of finished and failed runs by key, in a SQLite file that survives a killed process.

    Every call opens the file, so threads and processes of one machine may share a store. A row whose `error`
    is a string has failed. `readonly=True` reads a store in which others may be writing or which one may not
    write, and never creates it. A store of an earlier format is brought to this one when opened for writing.

    Raises ValueError, here and in every method, when the file is missing, locked, damaged, of a newer format
    or no store, or may not be read or written, saying what to do.

    >>> import tempfile
    >>> store = Store(Path(tempfile.mkdtemp()) / "results.sqlite")
    >>> store.put("a", {"sparsity": 0.5, "perplexity": 2.5})
    >>> store.put("b", {"sparsity": 0.9, "error": "ValueError: the loss is NaN"})
    >>> store.get(["a", "c"])
    {'a': {'sparsity': 0.5, 'perplexity': 2.5}}
    >>> Store(store.path, readonly=True).table({"sparsity": [0.5, 0.9]}, failed=None).sparsity.tolist()
    [0.5, 0.9]
    """

    _timeout = 30.0

    def __init__(self, path: str | Path | None = None, *, readonly: bool = False):
        self.path = Path(path).expanduser() if path is not None else default_store()
        self.readonly = readonly
        self._database.check()

    @property
    def _database(self) -> Database:
        return Database(self.path, self.readonly, self._timeout)

    @property
    def format(self) -> int:
        """The format of the file: 2, or an earlier one that was opened `readonly` and is read as it is."""
        return self._database.format()

    def get(self, keys: Iterable[str]) -> dict[str, dict]:
        """The rows among the keys, finished and failed, in the order of the keys."""
        wanted = _several(keys)
        found = {row.key: row for row in self._database.rows(wanted)}
        return {key: self._row(found[key]) for key in wanted if key in found}

    def put(self, key: str, row: Mapping[str, Any]) -> None:
        """Keep one row, durable when this returns, in place of one of the same key.

        A failed row never takes the place of a finished one. NumPy scalars become Python's.

        Raises ValueError for a row that JSON cannot hold or with a column `key` or `finished`.
        """
        _check(row)
        finished = datetime.now(UTC).isoformat(timespec="microseconds")
        stored = Stored(key, finished, _failed(row), _text(dict(row)))
        self._database.write(lambda connection: insert(connection, [stored]))

    def delete(self, keys: Iterable[str]) -> int:
        """Delete the rows of the keys and return how many there were."""
        doomed = _several(keys)
        return self._database.write(lambda connection: delete(connection, doomed))

    def table(
        self, where: Mapping[str, object] | None = None, *, failed: bool | None = False
    ) -> "pd.DataFrame":
        """The rows in the order they were finished, as one tidy table.

        Columns: `key`, `finished` (UTC, ISO 8601; None for rows of format 1), then the rows' own; `traceback`
        only when failed rows are asked for. `where` maps a column to the value rows must have, or to several
        of which they must have one. `failed` True takes only failed rows, None both.

        Raises ValueError for a column that no row has. An empty store gives an empty table.
        """
        import pandas as pd

        wanted = {column: _any_of(values) for column, values in (where or {}).items()}
        everything = [
            {"key": stored.key, "finished": stored.finished} | self._row(stored)
            for stored in self._database.rows()
        ]
        known = dict.fromkeys(column for row in everything for column in row)
        if everything and (unknown := [column for column in wanted if column not in known]):
            raise ValueError(f"the store has no column {unknown[0]!r}; it has {', '.join(sorted(known))}")
        rows = [row for row in everything if failed is None or _failed(row) == failed]
        columns = dict.fromkeys([*OWN_COLUMNS, *(column for row in rows for column in row)])
        if failed is False:
            columns.pop("traceback", None)
        chosen = [row for row in rows if all(_is_one_of(row.get(name), wanted[name]) for name in wanted)]
        return pd.DataFrame(chosen, columns=list(columns))

    def export(self, path: str | Path, table: "pd.DataFrame | None" = None) -> None:
        """Write a table, the finished rows unless given, to a `.csv` or `.parquet` file, whole or not at all.

        Raises ValueError for another suffix, a table that Parquet cannot hold, and a file that cannot be
        written.
        """
        write_table(path, self.table() if table is None else table)

    def _row(self, stored: Stored) -> dict:
        try:
            row = json.loads(stored.text)
            if not isinstance(row, dict):
                raise ValueError(f"the row {stored.key!r} is no mapping")
        except ValueError as error:
            raise self._database.damaged(error) from error
        return row

    def __repr__(self) -> str:
        return f"Store({str(self.path)!r}{', readonly=True' if self.readonly else ''})"


def _several(keys: Iterable[str]) -> list[str]:
    if isinstance(keys, str):
        raise ValueError(f"keys must be a list of keys, got the string {keys!r}: write [{keys!r}]")
    return list(dict.fromkeys(keys))


def _failed(row: Mapping[str, Any]) -> bool:
    return row.get("error") is not None


def _check(row: Mapping[str, Any]) -> None:
    """Raise ValueError for what would come back as something else."""
    for column, value in row.items():
        if not isinstance(column, str) or column in OWN_COLUMNS:
            names = " and ".join(OWN_COLUMNS)
            raise ValueError(f"a row's columns must be strings other than {names}, got {column!r}")
        try:
            _text(value)
        except (TypeError, ValueError) as error:
            raise ValueError(f"the row cannot be kept for its {column!r}: {error}") from error
    if not isinstance(row.get("error"), str | None):
        raise ValueError(f"a row's error must be a string or None, got {row['error']!r}")


def _text(value: object) -> str:
    def plain(value: object) -> object:
        if isinstance(value, np.generic):
            return value.item()
        raise TypeError(f"use numbers, strings, lists or mappings of them, not {type(value).__name__}")

    return json.dumps(value, default=plain)


def _any_of(values: object) -> list:
    """The wanted values as they come out of a row."""
    several = isinstance(values, Iterable) and not isinstance(values, str | Mapping)
    return json.loads(_text(list(values) if several else [values]))  # type: ignore[call-overload]


def _is_one_of(value: object, wanted: list) -> bool:
    return any(value == one or (value != value and one != one) for one in wanted)  # NaN is NaN here
