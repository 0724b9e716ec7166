"""The finished rows that an explorer knows."""

import threading
from collections.abc import Mapping

import pandas as pd

# What a table has before the first row.
COLUMNS = ["criterion", "pattern", "sparsity", "retrain", "seed", "perplexity", "accuracy"]


class Rows:
    """Rows by key, for several threads; they are only ever added, or computed a second time.

    >>> rows = Rows({"a": {"sparsity": 0.5}, "b": {"sparsity": 0.7, "error": "ValueError: it diverged"}})
    >>> rows.keep("c", {"sparsity": 0.9})
    >>> sorted(rows.keys()), rows.table().sparsity.tolist(), rows.newest
    (['a', 'c'], [0.5, 0.9], {'sparsity': 0.9})
    """

    def __init__(self, stored: Mapping[str, dict]):
        self._rows = {key: row for key, row in stored.items() if not row.get("error")}
        self._lock = threading.Lock()
        self._table: pd.DataFrame | None = None
        self.newest: dict | None = None

    def __contains__(self, key: str) -> bool:
        return key in self._rows

    def keys(self) -> set[str]:
        """The keys of the rows that are there."""
        with self._lock:
            return set(self._rows)

    def keep(self, key: str, row: dict) -> None:
        """Add a row that is just finished."""
        with self._lock:
            self._rows[key] = self.newest = row
            self._table = None

    def rows(self) -> list[dict]:
        """The rows as they came."""
        with self._lock:
            return list(self._rows.values())

    def table(self) -> pd.DataFrame:
        """The rows as one table, not to be changed."""
        with self._lock:
            if self._table is None:
                rows = list(self._rows.values())
                self._table = pd.DataFrame(rows, columns=None if rows else COLUMNS)
            return self._table
