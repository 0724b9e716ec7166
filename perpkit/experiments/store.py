"""The store: one SQLite row for every finished run."""

import json
import os
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

FORMAT = 1


def default_store() -> Path:
    """Where finished rows go unless told: `PERPKIT_STORE`, else the user's cache folder."""
    if path := os.environ.get("PERPKIT_STORE"):
        return Path(path).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "perpkit" / "results.sqlite"


class Store:
    """Finished rows by key, in a SQLite file that survives a killed process.

    Every call opens the file, so a store may be shared by threads and processes.

    Raises ValueError when the file cannot be created, read or written, saying why.

    >>> import tempfile
    >>> store = Store(Path(tempfile.mkdtemp()) / "results.sqlite")
    >>> store.put("a", {"perplexity": 2.5})
    >>> store.get(["a", "b"])
    {'a': {'perplexity': 2.5}}
    """

    def __init__(self, path: str | Path | None = None):
        self.path = Path(path).expanduser() if path is not None else default_store()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"cannot create the folder of the store {str(self.path)!r}: {error}") from error
        with self._open() as connection:
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            if version not in (0, FORMAT):
                raise ValueError(
                    f"the store {str(self.path)!r} has format {version}, this version reads {FORMAT}; "
                    "name another file, or delete this one to compute its rows again"
                )
            connection.execute("CREATE TABLE IF NOT EXISTS rows (key TEXT PRIMARY KEY, row TEXT NOT NULL)")
            connection.execute(f"PRAGMA user_version = {FORMAT}")

    def get(self, keys: Iterable[str]) -> dict[str, dict]:
        """The finished rows among the keys."""
        wanted = set(keys)
        with self._open() as connection:
            found = connection.execute("SELECT key, row FROM rows").fetchall()
        return {key: json.loads(row) for key, row in found if key in wanted}

    def put(self, key: str, row: dict) -> None:
        """Keep one finished row, durable when this returns; a row of the same key is replaced."""
        with self._open() as connection:
            connection.execute("INSERT OR REPLACE INTO rows VALUES (?, ?)", (key, json.dumps(row)))

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """The open file; a transaction that ends with the block, SQLite's errors as sentences."""
        try:
            connection = sqlite3.connect(self.path, timeout=30)
            try:
                # Readers do not wait for the writer, and a killed writer leaves whole rows.
                connection.execute("PRAGMA journal_mode = WAL")
                with connection:
                    yield connection
            finally:
                connection.close()
        except sqlite3.Error as error:
            raise ValueError(
                f"the store {str(self.path)!r} cannot be used: {error}. Free some disk space, check that you "
                "may write there, or name another file with store= or PERPKIT_STORE"
            ) from error

    def __repr__(self) -> str:
        return f"Store({str(self.path)!r})"
