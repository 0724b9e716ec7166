"""Tables in files."""

import os
import uuid
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd


def write_table(path: str | Path, table: "pd.DataFrame") -> None:
    """Write a table to a `.csv` or `.parquet` file, whole or not at all; its folder is made if need be.

    Raises ValueError for another suffix, a table that Parquet cannot hold, and a file that cannot be written.

    >>> import tempfile
    >>> import pandas as pd
    >>> file = Path(tempfile.mkdtemp()) / "table.csv"
    >>> write_table(file, pd.DataFrame({"sparsity": [0.5]}))
    >>> file.read_text()
    'sparsity\\n0.5\\n'
    """
    target = Path(path).expanduser()
    suffix = target.suffix.lower()
    if suffix not in (".csv", ".parquet"):
        raise ValueError(f"cannot export to {str(target)!r}: name a file that ends in .csv or .parquet")
    beside = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with beside.open("xb") as file:
            if suffix == ".csv":
                table.to_csv(file, index=False)
            else:
                table.to_parquet(file, index=False)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(target)
    except OSError as error:
        raise ValueError(f"cannot write {str(target)!r}: {error}") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"{suffix} cannot hold this table, export to .csv: {error}") from error
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
