"""What a control offers, looked up by what a program gives."""

import difflib
import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

from ...pruning.selection import parse_pattern
from ...retraining.loop.settings import check_whole

# No pattern, in words.
UNSTRUCTURED = "unstructured"
# So many offers are named; of a large model there are hundreds of layers.
NAMED = 12


def offered(control: Any, name: str, given: object) -> Any:
    """The control's value for what is given: a value, its label, a float next to one, or the end of a name.

    Raises ValueError, naming what is offered, for anything else.

    >>> from ipywidgets import Dropdown, FloatSlider
    >>> layers = Dropdown(options=["layers.0.fc1.weight", "layers.1.fc1.weight"])
    >>> offered(layers, "layer", "1.fc1"), offered(FloatSlider(max=1), "sparsity", 0.1 + 0.2)
    ('layers.1.fc1.weight', 0.30000000000000004)
    >>> offered(layers, "layer", "fc1")
    Traceback (most recent call last):
    ValueError: layer is 'fc1'; it could be layers.0.fc1.weight, layers.1.fc1.weight
    """
    if hasattr(control, "options"):
        return _one_of(control.options, name, given)
    if hasattr(control, "max"):
        return within(name, given, control.min, control.max)
    if not isinstance(given, str):
        raise ValueError(f"{name} is {given!r}; want a text")
    return given


def within(name: str, given: object, low: float, high: float) -> Any:
    """A number that lies between two, whole if they are.

    Raises ValueError for anything else.

    >>> within("filter", 3, 0, 15)
    3
    """
    if isinstance(high, int):
        check_whole(**{name: given})
    if not isinstance(given, Real) or isinstance(given, bool):
        raise ValueError(f"{name} is {given!r}; want a number")
    number = float(given)
    # 0.99 in single precision is larger than 0.99.
    number = next((end for end in (low, high) if _is_same(number, end)), number)
    if not low <= number <= high:
        raise ValueError(f"{name} is {given}; the explorer offers {low:g} to {high:g}")
    return type(high)(number)


def _one_of(options: tuple, name: str, given: object) -> Any:
    pairs = [each if isinstance(each, tuple) else (str(each), each) for each in options]
    values = [value for _, value in pairs]
    ways = [
        [value for value in values if _is_same(given, value)],
        [value for label, value in pairs if given == label],
        [value for value in values if _is_end(given, value)],
    ]
    found = next(filter(None, ways), [])
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"{name} is {given!r}; it could be {_listed(found)}")
    near = {each.lower(): value for label, value in pairs for each in (label, str(value))}
    word = given.lower() if isinstance(given, str) else ""
    likely = difflib.get_close_matches(word, near, n=1, cutoff=0.75)
    hint = f"; did you mean {near[likely[0]]!r}?" if likely else ""
    raise ValueError(f"{name} is {given!r}; the explorer offers {_listed(values)}{hint}")


def _is_same(given: object, value: object) -> bool:
    if isinstance(given, bool) or not isinstance(given, Real) or not isinstance(value, Real):
        return isinstance(given, str) and given == value
    # A number that was computed, or in single precision: 0.1 + 0.2 is not 0.3.
    return math.isclose(given, value, rel_tol=1e-6, abs_tol=1e-9)


def _is_end(given: object, value: object) -> bool:
    if not isinstance(given, str) or not isinstance(value, str):
        return False
    return f".{value.removesuffix('.weight')}".endswith(f".{given.removesuffix('.weight')}")


def _listed(values: list) -> str:
    named = ", ".join(map(str, values[:NAMED]))
    return named if len(values) <= NAMED else f"{named} and {len(values) - NAMED} more"


def check_sparsity(sparsity: object, pattern: str, patterns: Sequence[str]) -> None:
    """Raise ValueError for a sparsity that is not the pattern's own; "unstructured" has none.

    `patterns` are those that are offered.

    >>> check_sparsity(0.6, UNSTRUCTURED, ["2:4"]), check_sparsity(0.5, "2:4", ["2:4"])
    (None, None)
    >>> check_sparsity(0.6, "2:4", ["2:4", UNSTRUCTURED])
    Traceback (most recent call last):
    ValueError: sparsity is 0.6, but the pattern is 2:4, which is 0.5; give pattern='unstructured' with it
    """
    if sparsity is None or pattern == UNSTRUCTURED:
        return
    n, m = parse_pattern(pattern)
    if not _is_same(sparsity, 1 - n / m):
        hint = f"; give pattern={UNSTRUCTURED!r} with it" if UNSTRUCTURED in patterns else ""
        raise ValueError(
            f"sparsity is {sparsity!r}, but the pattern is {pattern}, which is {1 - n / m:g}{hint}"
        )
