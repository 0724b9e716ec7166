"""A row of what was measured, or of why it could not be."""

import gc
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ...evaluation.cost import device_name, out_of_memory

# What is asked for, by which a row is told from others. Every row has all columns: a file may hold all kinds.
ASKED = {
    **{"model": str, "layers": int, "what": str, "method": str, "checkpointing": bool},
    **{"batch": int, "length": int, "steps": int, "warmup": int, "samples": int, "dtype": str, "device": str},
}
FOUND = {
    **{"device_memory": int, "parameters": int, "trainable_share": float, "tokens_per_second": float},
    **{"slowest_step": float, "fastest_step": float, "seconds": float, "peak_memory": int},
    **{"ratio": float, "published_ratio": float, "error": str},
}

Rows = Mapping[tuple, dict[str, Any]]


def new_row(device: str, **asked: Any) -> dict[str, Any]:
    """A row in which nothing is measured yet: what is asked for, and the device's name and whole memory.

    >>> row = new_row("cpu", model="opt-125m", what="prune", method="wanda")
    >>> row["method"], row["seconds"], list(row) == [*ASKED, *FOUND]
    ('wanda', None, True)
    """
    known = {**asked, "device": device_name(device), "device_memory": total_memory(device)}
    return {column: known.get(column) for column in (*ASKED, *FOUND)}


def asked_for(row: Mapping[str, Any]) -> tuple:
    """What tells a row from others.

    >>> asked_for(new_row("cpu", model="opt-125m"))[:2]
    ('opt-125m', None)
    """
    return tuple(row[column] for column in ASKED)


def total_memory(device: str) -> int | None:
    """Bytes of a card, or of the machine beside a CPU; None where nobody says.

    >>> total_memory("cpu") is None or total_memory("cpu") > 2**20
    True
    """
    if device.startswith("cuda"):
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # Windows has no such call
        return None


def tried(
    row: dict[str, Any], device: str, measured: Callable[[], dict[str, Any]], known: Rows | None = None
) -> dict[str, Any]:
    """The row with what `measured()` gives, or with its `error` in words: one row must not end the others.

    A row that is `known` and has no error is not measured again. What a row has taken of the device's memory
    is given back before the next is measured.

    >>> def too_much():
    ...     return {"seconds": torch.empty(2**60)}
    >>> tried(new_row("cpu", what="prune"), "cpu", too_much)["error"]
    'out of memory'
    """
    if is_known(row, known):
        return dict((known or {})[asked_for(row)])
    row = {**row, "error": None}
    try:
        row |= measured()
    except (ValueError, ImportError, RuntimeError) as error:
        row["error"] = _words(error)
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
    return row


def is_known(row: Mapping[str, Any], known: Rows | None) -> bool:
    """Whether what a row asks for was measured before; what has failed is tried again.

    >>> row = new_row("cpu", model="opt-125m")
    >>> is_known(row, {asked_for(row): row}), is_known(row, {asked_for(row): {**row, "error": "no"}})
    (True, False)
    """
    found = (known or {}).get(asked_for(row))
    return found is not None and found["error"] is None


def _words(error: Exception) -> str:
    if out_of_memory(error):
        return "out of memory"
    if isinstance(error, RuntimeError):
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return str(error)
