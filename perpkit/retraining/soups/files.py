"""The folder of a soup: what run it is of, and its tensors, each file written whole or not at all."""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

FORMAT = "perpkit soup 1"
IDENTITY = "soup.json"


@contextmanager
def opened(folder: str | Path | None, same: Mapping[str, str]) -> Iterator[Path]:
    """The folder of a run, made if it is not there; without one a temporary folder that goes afterwards.

    `same` are digests of all that the outcome depends on, by a name that an error can say.

    Raises ValueError for a folder of another run, one with other files, and one that cannot be written.

    >>> with opened(None, {"seed": "0"}) as path:
    ...     sorted(file.name for file in path.iterdir())
    ['soup.json']
    >>> path.exists()
    False
    """
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="perpkit-soup-", ignore_cleanup_errors=True) as made:
            _claim(Path(made), same)
            yield Path(made)
        return
    path = Path(folder).expanduser().absolute()
    _claim(path, same)
    try:
        yield path
    except BaseException:
        if not any(path.rglob("*.safetensors")):
            # A call that came to nothing, by a misspelt criterion say, leaves the folder to the next.
            (path / IDENTITY).unlink(missing_ok=True)
        raise


def _claim(path: Path, same: Mapping[str, str]) -> None:
    file = path / IDENTITY
    try:
        if file.exists():
            _check_same(file, same)
            return
        path.mkdir(parents=True, exist_ok=True)
        # A killed call may have left this one.
        partial = path / f"{IDENTITY}.part"
        if any(other.is_file() and other != partial for other in path.rglob("*")):
            raise ValueError(f"the folder {str(path)!r} has other files in it; name an empty or a new one")
        partial.write_text(json.dumps({"format": FORMAT, "same": dict(same)}, indent=1))
        os.replace(partial, file)
    except OSError as error:
        raise ValueError(f"cannot use the folder {str(path)!r}: {error}") from error


def _check_same(file: Path, same: Mapping[str, str]) -> None:
    try:
        found = json.loads(file.read_text())
        known = found["same"] if found["format"] == FORMAT else None
    except (ValueError, KeyError, TypeError):
        known = None
    if not isinstance(known, dict):
        raise ValueError(f"{str(file)!r} does not describe a soup; name another folder")
    if others := [name for name in same if known.get(name) != same[name]]:
        raise ValueError(
            f"the folder {str(file.parent)!r} belongs to a run with another {' and '.join(others)}; "
            "resume with the same, or name another folder to start from the beginning"
        )


def write(path: Path, tensors: Mapping[str, torch.Tensor], **metadata: object) -> None:
    """Write tensors and metadata to a safetensors file; it is there when it is complete.

    Raises ValueError when it cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(whole, partial, metadata={"format": FORMAT, "about": json.dumps(metadata)})
        os.replace(partial, path)
    except (SafetensorError, OSError) as error:
        partial.unlink(missing_ok=True)
        # Unless another process has been quicker: both have the same to say.
        if not path.exists():
            raise ValueError(f"cannot write {str(path)!r}: {error}") from error
    for left in path.parent.glob(f"{path.name}.*.part"):
        # Of a process that was killed.
        left.unlink(missing_ok=True)


def read(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file that `write` has written.

    Raises ValueError for any other file.

    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write(Path(folder) / "a.safetensors", {"w": torch.ones(1)}, seconds=0.5)
    ...     read(Path(folder) / "a.safetensors"), about(Path(folder) / "a.safetensors")
    ({'w': tensor([1.])}, {'seconds': 0.5})
    """
    with _opened_file(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping


def about(path: Path) -> dict[str, Any]:
    """The metadata of a file that `write` has written.

    Raises ValueError for any other file.
    """
    with _opened_file(path) as file:
        return json.loads(file.metadata()["about"])


@contextmanager
def _opened_file(path: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("format") != FORMAT:
                raise ValueError(f"{str(path)!r} is no file of a soup; name another folder")
            yield file
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"cannot read {str(path)!r}: {error}. Delete it to have it computed again"
        ) from error


def digest(value: object) -> str:
    """A digest of what `repr` shows of a value.

    >>> digest([1, 2]) == digest([1, 2]), digest([1, 2]) == digest([1, 3])
    (True, False)
    """
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]
