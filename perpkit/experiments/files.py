"""What tells one version of an experiment's local files from another."""

import difflib
import hashlib
import inspect
import time
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from ..sources import grammar, storyworld, world
from ..sources.embedded import EMBEDDED_MODELS, data_folder
from ..sources.text import TEXTS

# What defines the embedded language. Its code, not a sample of it: some choices show only after thousands
# of stories.
LANGUAGE = (world, grammar, storyworld)
# Larger files are told apart by size and time: reading them would cost more than the run.
LARGE = 2**24
# A file written so lately may be written again within the same tick of the file system's clock.
TICK_SECONDS = 2.0
# Beside the weights. The tokenizer's settings say the context, which is the length of a window unless told.
MODEL_FILES = (
    *("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model"),
)


def digest(files: Iterable[Path]) -> str:
    """A digest of files that exist; what is on the Hub goes by its name.

    >>> digest([Path("no such file")]) == digest([])
    True
    """
    found = hashlib.sha256()
    for file in files:
        try:
            facts = file.stat()
        except OSError:
            continue
        found.update(f"{file.name}\0".encode())
        if facts.st_size >= LARGE:
            found.update(f"{facts.st_size} {facts.st_mtime_ns}".encode())
        elif time.time() - facts.st_mtime < TICK_SECONDS:
            found.update(_content(file))
        else:
            found.update(_content_once(file, facts.st_size, facts.st_mtime_ns))
    return found.hexdigest()


def _content(file: Path) -> bytes:
    return hashlib.sha256(file.read_bytes()).digest() if file.is_file() else b""


@lru_cache(maxsize=256)
def _content_once(file: Path, size: int, time_ns: int) -> bytes:
    """A sweep asks for the same files once for every row."""
    return _content(file)


@lru_cache
def language() -> str:
    """A digest of the code that tells the stories."""
    return hashlib.sha256("".join(map(inspect.getsource, LANGUAGE)).encode()).hexdigest()


def model_files(model: str) -> list[Path]:
    """The files of an embedded model or a local folder."""
    folder = data_folder("models", "tiny-opt") if model in EMBEDDED_MODELS else Path(model).expanduser()
    return sorted([*folder.glob("*.safetensors"), *(folder / name for name in MODEL_FILES)])


def text_files(text: str) -> list[Path]:
    """The file of a local text; a text known by name is never one, whatever lies beside."""
    return [] if text in TEXTS else [Path(text).expanduser()]


def check_text(text: str) -> None:
    """Raise ValueError for a text that is neither known by name nor a file that is there.

    >>> check_text("storyword")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: unknown text 'storyword'; did you mean 'storyworld'? Valid: storyworld, ..., a file
    """
    if text not in TEXTS and not Path(text).expanduser().is_file():
        near = difflib.get_close_matches(text, TEXTS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(f"unknown text {text!r}{hint} Valid: {', '.join(TEXTS)}, a file")


def task_files(folder: str | None) -> list[Path]:
    """The files of local tasks."""
    return [] if folder is None else sorted(Path(folder).expanduser().glob("*.jsonl"))
