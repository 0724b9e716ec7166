"""What the rows of one process share: dense models with their texts, and pruned models."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Value = TypeVar("Value")
Cancel = Callable[[], bool] | None

SECONDS_BETWEEN_LOOKS = 0.1


class Cancelled(Exception):
    """The sweep was cancelled; finished rows are in the store."""


def check(cancelled: Cancel) -> None:
    """Raise Cancelled when `cancelled()` says so."""
    if cancelled is not None and cancelled():
        raise Cancelled


class Shared(Generic[Value]):
    """The latest few values of a kind, each made once, whichever thread asks first.

    Values are kept while there are at most `count` of them and their `size` (bytes) is at most `limit`
    together, or one alone. Room is made before a value is made: two large models never lie side by side.

    >>> shared = Shared[str](count=2, limit=10, size=len)
    >>> shared.get("a", lambda: "first"), shared.get("a", lambda: "never made")
    ('first', 'first')
    """

    def __init__(self, count: int, limit: int, size: Callable[[Value], int]):
        self._count, self._limit, self._size = count, limit, size
        self._values: OrderedDict[Hashable, Value] = OrderedDict()
        self._sizes: dict[Hashable, int] = {}
        self._making: set[Hashable] = set()
        self._changed = threading.Condition()

    def get(
        self, key: Hashable, make: Callable[[], Value], cancelled: Callable[[], bool] | None = None
    ) -> Value:
        """The value of a key, made now when it is not there.

        Raises Cancelled when `cancelled()` says so while another thread makes it, and what `make` raises.
        """
        with self._changed:
            while key in self._making:
                self._changed.wait(SECONDS_BETWEEN_LOOKS)
                check(cancelled)
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
            self._making.add(key)
            self._make_room()
        try:
            value = make()
            with self._changed:
                self._values[key], self._sizes[key] = value, self._size(value)
            return value
        finally:
            with self._changed:
                self._making.discard(key)
                self._changed.notify_all()

    def clear(self) -> None:
        """Forget everything."""
        with self._changed:
            self._values.clear()
            self._sizes.clear()

    def _make_room(self) -> None:
        """Drop the oldest until one more, as large as the latest, would fit."""
        sizes = {key: self._sizes[key] for key in self._values}
        while sizes and (
            len(sizes) >= self._count or sum(sizes.values()) + [*sizes.values()][-1] > self._limit
        ):
            oldest = next(iter(sizes))
            del self._values[oldest], self._sizes[oldest], sizes[oldest]
