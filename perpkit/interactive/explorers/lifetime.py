"""How long an explorer lives: until it is closed, or its notebook cell is run again."""

import sys
import weakref
from typing import Any

import ipywidgets as widgets

# Explorers by the notebook cell that has made them, with the run of the cell.
_MADE: "weakref.WeakKeyDictionary[widgets.Widget, tuple[str, str]]" = weakref.WeakKeyDictionary()


def replace_predecessors(explorer: widgets.Widget) -> None:
    """Close what an earlier run of the notebook cell has made: nobody sees it any more, and it would go on.

    Outside of a notebook, and in one whose page does not name its cells, nothing is closed.
    """
    if (now := _running_cell()) is None:
        return
    for other, (cell, run) in list(_MADE.items()):
        if cell == now[0] and run != now[1]:
            other.close()
            del _MADE[other]
    _MADE[explorer] = now


def close_parts(widget: widgets.Widget) -> None:
    """Close all widgets inside of one: the registry of ipywidgets would keep them, and what they lead to."""
    for child in getattr(widget, "children", ()):
        close_parts(child)
        child.close()


def _running_cell() -> tuple[str, str] | None:
    """The notebook cell that is being run, and a name for this run of it."""
    ipython: Any = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    if shell is None or not hasattr(shell, "get_parent"):
        return None
    asked = shell.get_parent() or {}
    cell = (asked.get("metadata") or {}).get("cellId")
    return None if cell is None else (cell, asked["header"]["msg_id"])
