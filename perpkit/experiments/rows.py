"""The rows of a store in SQL: their table, its formats, and how they are put there."""

import sqlite3
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

FORMAT = 2
# `number` is the order of finishing, for clocks jump. `finished` is NULL where format 1 had kept no time.
SCHEMA = """
CREATE TABLE rows (
    number INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, finished TEXT, failed INTEGER NOT NULL,
    row TEXT NOT NULL, checksum INTEGER NOT NULL
)
"""
COLUMNS = {1: ["key", "row"], FORMAT: ["number", "key", "finished", "failed", "row", "checksum"]}
# Two workers may race for a row: what one of them has finished stays.
INSERT = """
INSERT OR REPLACE INTO rows (key, finished, failed, row, checksum)
SELECT :key, :finished, :failed, :row, :checksum
WHERE NOT (:failed AND EXISTS (SELECT * FROM rows WHERE key = :key AND NOT failed))
"""
# SQLite before 3.32 takes at most 999 values in one statement.
CHUNK = 900


@dataclass(frozen=True)
class Stored:
    """One row as it lies in the file; `text` is JSON, `finished` a time or None."""

    key: str
    finished: str | None
    failed: bool
    text: str

    def checksum(self) -> int:
        """SQLite finds a damaged page only when its structure is damaged."""
        return zlib.crc32(f"{self.key} {self.finished} {self.failed:d} {self.text}".encode())


def insert(connection: sqlite3.Connection, rows: Iterable[Stored]) -> None:
    """Put rows in the place of those of the same keys, but no failed one in that of a finished one."""
    for row in rows:
        values: dict[str, Any] = {"key": row.key, "finished": row.finished, "failed": row.failed}
        connection.execute(INSERT, values | {"row": row.text, "checksum": row.checksum()})


def delete(connection: sqlite3.Connection, keys: Sequence[str]) -> int:
    """Delete the rows of the keys and return how many there were."""
    command = "DELETE FROM rows WHERE key IN"
    return sum(connection.execute(f"{command} ({marks(part)})", part).rowcount for part in chunks(keys))


def chunks(keys: Sequence[str]) -> list[Sequence[str]]:
    """The keys, as many at once as every SQLite takes."""
    return [keys[start : start + CHUNK] for start in range(0, len(keys), CHUNK)]


def marks(keys: Sequence[str]) -> str:
    """A question mark for each key."""
    return ",".join("?" * len(keys))
