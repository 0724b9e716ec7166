"""Sweeps: run a grid of experiments, keep every finished row, return one tidy table."""

import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import BrokenExecutor, Executor, Future, wait
from dataclasses import replace
from pathlib import Path
from queue import Empty, SimpleQueue

import pandas as pd
from tqdm.auto import tqdm

from .experiment import Experiment
from .run import NotLoaded, attempt, failed_row, prepared_key
from .shared import Cancelled
from .stop import Stop
from .store import Store

__all__ = ["Cancelled", "NothingComputed", "sweep"]

SECONDS_BETWEEN_LOOKS = 0.2
# A training step takes no longer on the models of a lecture; a model being loaded may.
SECONDS_TO_STOP = 3.0


class NothingComputed(ValueError):
    """All rows of a sweep have failed; `first` is the error of the first, as it stands in its row."""

    def __init__(self, first: str, words: str):
        super().__init__(
            f"{words}\n(retry_failed=True tries again; Store.table(failed=True) has the traceback)"
        )
        self.first = first


def sweep(
    grid: Iterable[Experiment],
    *,
    store: Store | str | Path | None = None,
    executor: Executor | None = None,
    retry_failed: bool = False,
    progress: bool = True,
    on_row: Callable[[dict], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> pd.DataFrame:
    """Run every experiment of a grid that is not in the store and return one row each, in the grid's order.

    A row holds the experiment's inputs; `perplexity`, `dense_perplexity` and `floor` (None where unknown);
    with tasks `accuracy`, their mean, `accuracy_stderr`, `accuracy_<task>` and `dense_accuracy`;
    `reached_sparsity`, `trainable_share`; `seconds` (pruning, reconstruction and retraining) and
    `seconds_<phase>`, `tokens_per_second` of the retraining, `peak_memory` in bytes, `device`, `protocol`,
    and `error`, None when the row is finished.

    Each row is stored as soon as it is finished, so a sweep that was interrupted goes on where it stopped. A
    row that fails is stored as failed, with its traceback (`Store.table(failed=True)`), and the others go on;
    it is tried again with `retry_failed`. Rows whose model or text cannot be loaded are not stored.

    Shared by the rows that one process computes, and so loaded or computed once: the dense model, its text
    and what it reaches; the pruned model and with it the calibration statistics (each pruned block shapes the
    statistics of the next, so they belong to one pruning); the reconstructed model. Rows are taken in the
    order that keeps those together; the seconds of what is shared stand in every row.

    `executor` is any `concurrent.futures.Executor`; without one the rows are computed here, one after the
    other. `on_row(row)` is called here for every new row. `cancelled()` and Ctrl-C stop the rows in work
    within one training step (those on an executor get three seconds to say so).

    Raises ValueError for bad inputs, a store that cannot be used and when no row at all could be computed;
    Cancelled; and BrokenExecutor when the executor has lost its workers.

    >>> import tempfile
    >>> import perpkit as pk
    >>> grid = pk.Grid(sparsity=[0.3, 0.5], retrain="none")
    >>> results = sweep(grid, store=Path(tempfile.mkdtemp()) / "results.sqlite", progress=False)
    >>> bool(results.perplexity[0] < results.perplexity[1])
    True
    """
    store = store if isinstance(store, Store) else Store(store)
    experiments = list(grid)
    keys = [experiment.key() for experiment in experiments]
    rows = store.get(keys)
    if retry_failed:
        rows = {key: row for key, row in rows.items() if not row.get("error")}
    missing = {key: experiment for key, experiment in zip(keys, experiments, strict=True) if key not in rows}

    def keep(key: str, row: dict, *, stored: bool = True) -> None:
        if stored:
            store.put(key, row)
        rows[key] = row
        bar.update()
        failed = sum(1 for each in rows.values() if each.get("error"))
        if failed:
            bar.set_postfix(failed=failed)
        if on_row is not None:
            on_row(row)

    with tqdm(total=len(rows) + len(missing), initial=len(rows), unit="row", disable=not progress) as bar:
        work = _Work(_together(missing), keep)
        if executor is None:
            work.here(cancelled)
        else:
            work.on(executor, cancelled, Stop(store.path))
    return _table([rows[key] for key in keys])


def _together(missing: dict[str, Experiment]) -> dict[str, Experiment]:
    """The rows in an order that keeps those together that share a pruned, and then a reconstructed model."""
    places: dict[tuple, int] = {}

    def place(experiment: Experiment) -> tuple[int, int]:
        pruned, prepared = prepared_key(replace(experiment, unit=None)), prepared_key(experiment)
        return places.setdefault(pruned, len(places)), places.setdefault(prepared, len(places))

    return dict(sorted(missing.items(), key=lambda item: place(item[1])))


def _table(rows: list[dict]) -> pd.DataFrame:
    """The rows as a table; raises when all have failed, warns when some have."""
    failed = [row for row in rows if row.get("error")]
    if failed:
        first = failed[0]["error"]
        words = f"{len(failed)} of {len(rows)} rows failed, the first with {first}"
        if len(failed) == len(rows):
            raise NothingComputed(first, first if len(rows) == 1 else words)
        warnings.warn(f"{words}; see the column 'error'", stacklevel=3)
    return pd.DataFrame(rows).drop(columns=["traceback", "format"], errors="ignore")


class _Work:
    """The rows that are missing, while they are computed."""

    def __init__(self, missing: dict[str, Experiment], keep: Callable[..., None]):
        self.missing, self.keep = missing, keep
        self.unloadable: dict[tuple, str] = {}

    def here(self, cancelled: Callable[[], bool] | None) -> None:
        """Compute them in this thread, one after the other."""
        for key, experiment in self.missing.items():
            if not self._known_unloadable(key):
                try:
                    self.keep(key, attempt(experiment, cancelled))
                except NotLoaded as error:
                    self._not_loaded(key, error)

    def on(self, executor: Executor, cancelled: Callable[[], bool] | None, stop: Stop) -> None:
        """Compute them on an executor."""
        waiting: dict[Future, str] = {}
        done: SimpleQueue[Future] = SimpleQueue()
        try:
            for key, experiment in self.missing.items():
                future = executor.submit(attempt, experiment, stop)
                waiting[future] = key
                future.add_done_callback(done.put)
            while waiting:
                if cancelled is not None and cancelled():
                    raise Cancelled
                try:
                    future = done.get(timeout=SECONDS_BETWEEN_LOOKS)
                except Empty:
                    continue
                # One that was withdrawn has its row already.
                if future in waiting:
                    self._take(waiting.pop(future), future)
                    for other in self._hopeless(waiting):
                        other.cancel()
                        self._known_unloadable(waiting.pop(other))
        except BaseException as reason:
            if isinstance(reason, KeyboardInterrupt):
                tqdm.write("Stopping the rows in work; finished ones are kept.")
            stop.set()
            running = [future for future in waiting if not future.cancel()]
            stop.clear_after(running)
            for future in wait(running, SECONDS_TO_STOP).done:
                if not future.cancelled() and future.exception() is None:
                    self.keep(waiting[future], future.result())
            raise

    def _take(self, key: str, future: Future) -> None:
        """Keep what came of a row."""
        if future.cancelled():
            raise Cancelled
        error = future.exception()
        if error is None:
            self.keep(key, future.result())
        elif isinstance(error, NotLoaded):
            self._not_loaded(key, error)
        elif isinstance(error, BrokenExecutor | Cancelled):
            raise error
        else:
            # The executor's own: a worker that died again and again under this row, say.
            words = f"{type(error).__name__}: {error}"
            self.keep(key, failed_row(self.missing[key], words, words))

    def _not_loaded(self, key: str, error: NotLoaded) -> None:
        """This row and all of the same model and text, which would only wait for the same error."""
        self.unloadable[_source(self.missing[key])] = f"ValueError: {error}"
        self._known_unloadable(key)

    def _known_unloadable(self, key: str) -> bool:
        error = self.unloadable.get(_source(self.missing[key]))
        if error is not None:
            self.keep(key, failed_row(self.missing[key], error, error), stored=False)
        return error is not None

    def _hopeless(self, waiting: dict[Future, str]) -> list[Future]:
        return [f for f, key in waiting.items() if _source(self.missing[key]) in self.unloadable]


def _source(experiment: Experiment) -> tuple:
    return experiment.model, experiment.text, experiment.dtype, experiment.length
