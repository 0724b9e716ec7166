"""A row of what was measured, or of why it could not be."""

import gc
from collections.abc import Callable
from typing import Any

import torch


def tried(row: dict[str, Any], device: str, measured: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The row with what `measured()` gives, or with its `error` in words: one row must not end the others.

    What a row has taken of the device's memory is given back before the next is measured.

    >>> def too_much():
    ...     return {"seconds": torch.empty(2**60)}
    >>> tried({"what": "prune", "seconds": None}, "cpu", too_much)
    {'what': 'prune', 'seconds': None, 'error': 'out of memory'}
    """
    row = {**row, "error": None}
    try:
        row |= measured()
    except (ValueError, ImportError, RuntimeError) as error:
        row["error"] = _words(error)
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
    return row


def _words(error: Exception) -> str:
    # A CPU has no exception of its own for it.
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        return "out of memory"
    if isinstance(error, RuntimeError):
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return str(error)
