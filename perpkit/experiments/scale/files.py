"""Rows in a .csv or .parquet file: those of earlier runs, and the file written anew after each row."""

from pathlib import Path
from typing import Any

from ..export import write_table
from .rows import ASKED, FOUND, Rows, asked_for

COLUMNS = {**ASKED, **FOUND}


def read_rows(path: Path) -> dict[tuple, dict[str, Any]]:
    """The rows of a file by what they ask for, none when there is no file.

    Raises ValueError for a file that cannot be read, or that other rows are in.

    >>> read_rows(Path("no such file.csv"))
    {}
    """
    import pandas as pd

    path = path.expanduser()
    if not path.exists():
        return {}
    try:
        if path.suffix.lower() == ".csv":
            table = pd.read_csv(path, dtype=str, keep_default_na=False)
        else:
            table = pd.read_parquet(path)
        if list(table) != list(COLUMNS):
            raise ValueError(f"its columns are {', '.join(map(str, table))}")
        rows = [
            {name: _value(row[name], kind) for name, kind in COLUMNS.items()}
            for row in table.to_dict("records")
        ]
    except OSError as error:
        raise ValueError(f"cannot read {str(path)!r}: {error}") from error
    except ValueError as error:
        raise ValueError(
            f"{str(path)!r} holds no rows of this version of perpkit bench, name another file: {error}"
        ) from error
    return {asked_for(row): row for row in rows}


def write_rows(rows: Rows, path: Path) -> None:
    """Write the rows to a file, whole or not at all; its folder is made if need be.

    Raises ValueError when it cannot be written.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "rows.csv"
    >>> write_rows({}, path)
    >>> read_rows(path)
    {}
    """
    import pandas as pd

    # As objects, or a missing value would make numbers with a point of whole ones.
    table = pd.DataFrame(list(rows.values()), columns=list(COLUMNS), dtype=object)
    write_table(path, table)


def _value(value: Any, kind: type) -> Any:
    if value is None or value == "" or value != value:
        return None
    return str(value) == "True" if kind is bool else kind(value)
