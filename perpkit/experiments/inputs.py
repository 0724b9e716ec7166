"""Values of inputs as they are compared and kept: plain numbers and text."""

from pathlib import PurePath

from ..pruning.allocation import ALLOCATIONS
from ..pruning.method import CRITERIA, GROUPS
from ..retraining.adapters.modules import KINDS, STARTS
from ..retraining.subsets import ALL_SUBSETS
from ..sources.embedded import EMBEDDED_MODELS
from ..sources.models import DTYPES
from ..sources.text import TEXTS

RETRAININGS = ("none", *dict.fromkeys((*ALL_SUBSETS, *KINDS)))

_TYPES = {
    "sparsity": float,
    "unit_steps": int,
    "unit_lr": float,
    "rank": int,
    "alpha": float,
    "steps": int,
    "lr": float,
    "batch": int,
    "accumulate": int,
    "weight_decay": float,
    "length": int,
    "seed": int,
}
# What a text may say, where its values can be told.
_VALID = {
    "model": f"{', '.join(EMBEDDED_MODELS)}, a local folder or an id of the Hub",
    "text": f"{', '.join(TEXTS)} or the path of a file",
    "dtype": ", ".join(DTYPES),
    "criterion": ", ".join(CRITERIA),
    "pattern": "N:M, such as 2:4",
    "group": ", ".join(GROUPS),
    "allocation": ", ".join(ALLOCATIONS),
    "unit": "matrix, submodule, block or window:2",
    "retrain": ", ".join(RETRAININGS),
    "start": ", ".join(STARTS),
}


def in_order(retrain: str) -> str:
    """A union of retrainings in the order of `RETRAININGS`, so that it is one, however it is written.

    >>> in_order("norms+biases")
    'biases+norms'
    """
    return "+".join(sorted({*retrain.split("+")}, key=RETRAININGS.index))


def plain(name: str, value: object, default: object) -> object:
    """The value of an input as it is kept: the same, whether it came as 1, 1.0, "1" or numpy's.

    Raises ValueError for None where the default is not, and for what is no such number or text.

    >>> plain("steps", "100", 100), plain("sparsity", 0, 0.5), plain("model", PurePath("mine"), "tiny-opt")
    (100, 0.0, 'mine')
    """
    kind = _TYPES.get(name, str)
    if value is None:
        if default is not None:
            raise ValueError(f"{name} is None; leave it out for {default!r}, or give it a value")
        return None
    if kind is str:
        return _words(name, value)
    if type(value) is kind:
        return value
    found: object = None
    try:
        found = kind(value)
        same = found == (float(value) if isinstance(value, str) else value) or found != found
    except (TypeError, ValueError, OverflowError):
        same = False
    if isinstance(value, bool) or not same:
        article = "a whole number" if kind is int else "a number"
        raise ValueError(f"{name} is {value!r}; it must be {article}")
    return found


def _words(name: str, value: object) -> str:
    valid = f": {_VALID[name]}" if name in _VALID else ""
    if isinstance(value, bool):
        word = "yes" if value else "no"
        raise ValueError(
            f"{name} is {value!r}; it must be text{valid}. A YAML file's no, off and false, and yes, on and "
            f'true, are read as False and True unless quoted, as "{word}"'
        )
    if not isinstance(value, str | PurePath):
        raise ValueError(f"{name} is {value!r}; it must be text{valid}")
    if name in ("model", "text") and not str(value).strip():
        raise ValueError(f"{name} is {value!r}; it must not be empty{valid}")
    return str(value)
