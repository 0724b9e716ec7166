"""The SQLite file of a store: its locks, and SQLite's errors as sentences."""

import os
import sqlite3
import stat
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from .rows import COLUMNS, FORMAT, SCHEMA, Stored, chunks, insert, marks

Result = TypeVar("Result")

ANOTHER = "name another file with store= in Python, --store in a shell, or PERPKIT_STORE"
LOCKED = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL)
DAMAGED = "is damaged", "Put a copy in its place, or move it away to compute its rows again"
DISK_FULL = "cannot be written", "Free some disk space or raise your quota; the rows before are kept"
PROBLEMS = {
    sqlite3.SQLITE_NOTADB: ("is no SQLite database", "It is left as it is"),
    sqlite3.SQLITE_CORRUPT: DAMAGED,
    sqlite3.SQLITE_READONLY: ("may not be written", "Allow yourself to write the file and its folder"),
    sqlite3.SQLITE_CANTOPEN: ("cannot be opened", "Allow yourself to read and write the file and its folder"),
    sqlite3.SQLITE_FULL: DISK_FULL,
    sqlite3.SQLITE_IOERR: DISK_FULL,
}
# A reader cannot create the file by which SQLite's processes see each other.
UNREADABLE = "cannot be read", "Allow yourself to read it; copy it with a -wal file beside it to a new folder"
# Two changes within one tick of the file system's clock look like one.
TICK_SECONDS, LOOKS = 0.1, 25


@dataclass(frozen=True)
class Database:
    """A file that is opened anew by every call; raises ValueError saying what is wrong and what to do.

    >>> import tempfile
    >>> database = Database(Path(tempfile.mkdtemp()) / "results.sqlite")
    >>> database.write(lambda connection: insert(connection, [Stored("a", None, False, "{}")]))
    >>> [row.key for row in database.rows()]
    ['a']
    """

    path: Path
    readonly: bool = False
    timeout: float = 30.0

    def rows(self, keys: Sequence[str] | None = None) -> list[Stored]:
        """The rows of the keys, or all in the order they were finished."""

        def read(connection: sqlite3.Connection) -> list[Stored]:
            version = self._format(connection)
            if keys is None:
                return self._select(connection, version)
            wheres = ((f"WHERE key IN ({marks(part)})", part) for part in chunks(keys))
            return [row for where in wheres for row in self._select(connection, version, *where)]

        return self._read(read)

    def format(self) -> int:
        """The format of the file, 0 when it is empty; reading alone does not change an older one."""
        return self._read(self._format)

    def _read(self, work: Callable[[sqlite3.Connection], Result]) -> Result:
        return self._patiently(
            lambda: self._read_only(work) if self.readonly else self._once("rwc", "BEGIN", work)
        )

    def write(self, work: Callable[[sqlite3.Connection], Result]) -> Result:
        """Do `work(connection)` wholly or not at all, durable when this returns."""
        if self.readonly:
            raise ValueError(
                f"the store {str(self.path)!r} was opened readonly=True: open it without, to write"
            )
        return self._patiently(lambda: self._once("rwc", "BEGIN IMMEDIATE", work))

    def check(self) -> None:
        """Raise now, not after an hour's work, what reading or writing would raise."""
        if self.readonly:
            self.rows([""])
        else:
            # BEGIN IMMEDIATE alone passes on a file one may not write.
            self.write(lambda connection: connection.execute("DELETE FROM rows WHERE key IS NULL"))

    def _patiently(self, attempt: Callable[[], Result]) -> Result:
        """Try until others let go of the file; SQLite does not wait where two might wait for each other."""
        until = time.monotonic() + self.timeout
        while True:
            try:
                return attempt()
            except sqlite3.Error as error:
                if _code(error) not in LOCKED:
                    raise self._problem(error) from error
                if time.monotonic() >= until:
                    raise ValueError(
                        f"the store {str(self.path)!r} is locked by another process for more than "
                        f"{self.timeout:g} seconds. Let it finish or end it, then try again, or {ANOTHER}"
                    ) from error
            time.sleep(0.01)

    def _once(self, mode: str, begin: str, work: Callable[[sqlite3.Connection], Result]) -> Result:
        self._look()
        address = f"{self.path.absolute().as_uri()}?mode={mode}"
        wait = min(1.0, self.timeout)  # short, so that Ctrl-C is heard
        with closing(sqlite3.connect(address, uri=True, timeout=wait, isolation_level=None)) as connection:
            if not self.readonly:
                self._bring_up_to_date(connection)
            connection.execute(begin)
            result = work(connection)
            connection.execute("COMMIT")
            return result

    def _read_only(self, work: Callable[[sqlite3.Connection], Result]) -> Result:
        """Read without leaving a trace where nobody writes.

        An ordinary connection creates files beside the store: impossible in a folder one may not write, and
        elsewhere they would belong to the reader and shut out a writer who is another user. Without a log the
        file alone is complete and can be read as it is, if it was the same before and after.
        """
        log = self.path.with_name(f"{self.path.name}-wal")
        for _ in range(LOOKS):
            before, log_before = self._look(), _facts(log)
            try:
                if log_before and log_before.st_size:
                    return self._once("ro", "BEGIN", work)
                if before and abs(time.time() - before.st_mtime) > TICK_SECONDS:
                    result = self._once("ro&immutable=1", "BEGIN", work)
                    if _same(before, _facts(self.path)):
                        return result
            except (sqlite3.Error, ValueError):  # perhaps only for what was written at this moment
                if _same(before, _facts(self.path)) and _same(log_before, _facts(log)):
                    raise
            time.sleep(TICK_SECONDS / 5)
        return self._once("ro", "BEGIN", work)

    def _bring_up_to_date(self, connection: sqlite3.Connection) -> None:
        """Create the table, or migrate that of format 1; another's database is left as it is."""
        connection.execute("BEGIN")  # else another process may create the table between two questions
        current = self._format(connection) == FORMAT
        connection.execute("COMMIT")
        # Readers do not wait for the writer, and a killed writer leaves whole rows.
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        if current:
            return
        connection.execute("BEGIN IMMEDIATE")
        version = self._format(connection)  # another process may have done it meanwhile
        if version != FORMAT:
            rows = self._select(connection, version)
            connection.execute("DROP TABLE IF EXISTS rows")
            connection.execute(SCHEMA)
            insert(connection, rows)
            connection.execute(f"PRAGMA user_version = {FORMAT}")
        connection.execute("COMMIT")

    def _format(self, connection: sqlite3.Connection) -> int:
        """The file's format; 0 when it is empty."""
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master")]
        columns = [column[1] for column in connection.execute("PRAGMA table_info(rows)")]
        if version == 0 and not tables:
            return 0
        if version == 0 and columns == COLUMNS[1]:
            return 1  # its first process was killed before it had named the format
        if version > FORMAT and "rows" in tables:
            raise ValueError(
                f"the store {str(self.path)!r} has format {version}, this version reads up to {FORMAT}. "
                f"Update perpkit, or move the file away to compute its rows again, or {ANOTHER}"
            )
        if columns != COLUMNS.get(version):
            raise ValueError(
                f"{str(self.path)!r} is a database, but no store of perpkit. It is left as it is; {ANOTHER}"
            )
        return version

    def _select(
        self, connection: sqlite3.Connection, version: int, where: str = "", values: Sequence[str] = ()
    ) -> list[Stored]:
        if version == 0:
            return []
        # Runs of format 1 were kept only when they had finished.
        columns = "key, finished, failed, row, checksum" if version == FORMAT else "key, NULL, 0, row, NULL"
        # Bytes, so that a damaged text is found here and not in SQLite's module.
        connection.text_factory = bytes
        found = connection.execute(f"SELECT {columns} FROM rows {where} ORDER BY rowid", values).fetchall()
        connection.text_factory = str
        rows = []
        for key, finished, failed, text, checksum in found:
            try:
                row = Stored(key.decode(), finished and finished.decode(), bool(failed), text.decode())
                if version == FORMAT and checksum != row.checksum():
                    raise ValueError(f"the row {row.key!r} is not as it was written")
            except (AttributeError, ValueError) as error:
                raise self.damaged(error) from error
            rows.append(row)
        return rows

    def _look(self) -> os.stat_result | None:
        """What the file system says of the file, None when it is yet to be created."""
        name = repr(str(self.path))
        if not self.readonly:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ValueError(
                    f"cannot create the folder of the store {name}: {error}; {ANOTHER}"
                ) from error
        try:
            facts = self.path.stat()
        except (FileNotFoundError, NotADirectoryError):
            if self.readonly:
                raise ValueError(f"there is no store {name}: run a sweep first, or {ANOTHER}") from None
            return None
        except OSError as error:
            raise ValueError(f"the store {name} cannot be opened: {error}; {ANOTHER}") from error
        if not stat.S_ISREG(facts.st_mode):
            kind = "a folder" if stat.S_ISDIR(facts.st_mode) else "no ordinary file"
            raise ValueError(f"the store {name} is {kind}; {ANOTHER}")
        return facts

    def damaged(self, error: Exception) -> ValueError:
        return self._sentence(*DAMAGED, error)

    def _problem(self, error: sqlite3.Error) -> ValueError:
        code = _code(error)
        if self.readonly and code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN):
            return self._sentence(*UNREADABLE, error)
        return self._sentence(*PROBLEMS.get(code, ("cannot be used", "Try again")), error)

    def _sentence(self, what: str, remedy: str, error: Exception) -> ValueError:
        return ValueError(f"the store {str(self.path)!r} {what} ({error}). {remedy}, or {ANOTHER}")


def _code(error: sqlite3.Error) -> int:
    # The primary one; errors of Python's module have none.
    return getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF


def _facts(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:
        return None


def _same(before: os.stat_result | None, after: os.stat_result | None) -> bool:
    """Whether a file was neither replaced nor written in between."""
    kept = ("st_ino", "st_size", "st_mtime_ns")
    return all(getattr(before, name, None) == getattr(after, name, None) for name in kept)
