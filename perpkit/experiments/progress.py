"""How far a sweep is: rows done, failed and left, and the row that is in work."""

import time
from collections.abc import Callable, Iterable

from tqdm.auto import tqdm

from .experiment import Experiment

SECONDS_BETWEEN_NEWS = 1.0
# Named where they differ from row to row.
ALSO = ("model", "text", "group", "allocation", "rank")


class Progress:
    """A bar of rows, some of them done at the start; it counts those that failed.

    >>> with Progress(1, [Experiment()], shown=False) as progress:
    ...     progress.add(failed=True)
    """

    def __init__(self, done: int, missing: Iterable[Experiment], *, failed: int = 0, shown: bool = True):
        rows = list(missing)
        self._bar = tqdm(total=done + len(rows), initial=done, unit="row", disable=not shown)
        self._failed = failed
        self._varied = [name for name in ALSO if len({getattr(row, name) for row in rows}) > 1]
        self._say()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        self._bar.close()

    def add(self, *, failed: bool) -> None:
        """Count a row."""
        self._failed += failed
        self._say()
        self._bar.update()

    def during(self, experiment: Experiment, cancelled: Callable[[], bool] | None) -> Callable[[], bool]:
        """A `cancelled` for the row in work, asked before every step: the bar names a row that takes long."""
        said = time.monotonic()

        def ask() -> bool:
            nonlocal said
            if time.monotonic() - said > SECONDS_BETWEEN_NEWS:
                said = time.monotonic()
                self._say(named(experiment, self._varied))
                self._bar.refresh()
            return cancelled is not None and cancelled()

        return ask

    def _say(self, row: str = "") -> None:
        failed = f"failed={self._failed}" if self._failed else ""
        self._bar.set_postfix_str(", ".join(filter(None, [failed, row])), refresh=False)


def named(experiment: Experiment, also: Iterable[str] = ()) -> str:
    """A row in a few words, and those of its inputs that are asked for.

    >>> named(Experiment(pattern="2:4", retrain="biases", seed=3), ["model"])
    'now: magnitude 2:4, biases, seed 3, model tiny-opt'
    """
    pruned = experiment.pattern or f"{100 * experiment.sparsity:g} %"
    unit = f", reconstructed by {experiment.unit}" if experiment.unit else ""
    retrained = f", {experiment.retrain}" if experiment.retrain != "none" else ""
    more = "".join(f", {name} {getattr(experiment, name)}" for name in also)
    return f"now: {experiment.criterion} {pruned}{unit}{retrained}, seed {experiment.seed}{more}"
