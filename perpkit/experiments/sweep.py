"""Sweeps: run a grid of experiments, keep every finished row, return one tidy table."""

import warnings
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import BrokenExecutor, Executor, Future, wait
from dataclasses import replace
from pathlib import Path
from queue import Empty, SimpleQueue

import pandas as pd
from tqdm.auto import tqdm

from ..retraining.iterative import latched
from .attempt import attempt, failed_row
from .experiment import Experiment
from .files import check_text
from .progress import Progress
from .run import NotLoaded, prepared_key
from .shared import Cancelled
from .stop import Stop
from .store import Store

__all__ = ["Cancelled", "NothingComputed", "sweep"]

SECONDS_BETWEEN_LOOKS = 0.2
# A training step takes no longer on the models of a lecture; a model being loaded may.
SECONDS_TO_STOP = 3.0


class NothingComputed(ValueError):
    """All rows of a sweep have failed; `first` is the error of the first, as it stands in its row.

    `rows` are all of them, `kept` says whether any is in the store, as those are not whose model, text or
    tasks cannot be loaded.
    """

    def __init__(self, first: str, words: str, rows: pd.DataFrame, kept: bool):
        ways = "\n(retry_failed=True tries again; Store.table(failed=True) has the traceback)"
        super().__init__(f"{words}{ways if kept else ''}")
        self.first, self.rows, self.kept = first, rows, kept


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
    it is tried again with `retry_failed`. Rows whose model, text or tasks cannot be loaded, or have changed
    since the sweep began, are not stored.

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
    experiments = experiments_of(grid)
    _check_executor(executor)
    _check_callable("on_row", on_row)
    _check_callable("cancelled", cancelled)
    store = store if isinstance(store, Store) else Store(store)
    keys = [experiment.key() for experiment in experiments]
    rows = store.get(keys)
    if retry_failed:
        rows = {key: row for key, row in rows.items() if not row.get("error")}
    missing = {key: experiment for key, experiment in zip(keys, experiments, strict=True) if key not in rows}
    if missing and store.readonly:
        raise ValueError(
            f"{len(missing)} rows are missing, and the store was opened readonly=True: open it without"
        )
    for text in dict.fromkeys(experiment.text for experiment in missing.values()):
        check_text(text)
    # Whoever stops within a row and the row itself must agree.
    asked = None if cancelled is None else latched(cancelled)
    failed = sum(1 for row in rows.values() if row.get("error"))
    unkept: set[str] = set()

    def keep(key: str, row: dict, *, stored: bool = True, told: bool = True) -> None:
        if stored:
            store.put(key, row)
        else:
            unkept.add(key)
        rows[key] = row
        bar.add(failed=bool(row.get("error")))
        if told and on_row is not None:
            on_row(row)

    with Progress(len(rows), missing.values(), failed=failed, shown=progress) as bar:
        work = _Work(_together(missing), keep)
        if executor is None:
            work.here(bar, asked)
        else:
            work.on(executor, asked, Stop(store.path))
    return _table([rows[key] for key in keys], kept=not unkept.issuperset(keys))


def experiments_of(grid: object) -> list[Experiment]:
    """The experiments of a grid or a list; anything else is told from them before it does harm.

    Raises ValueError for what is neither.

    >>> len(experiments_of([Experiment()]))
    1
    """
    if isinstance(grid, Experiment):
        raise ValueError("got one experiment; put it in a list: [experiment]")
    if not isinstance(grid, Iterable) or isinstance(grid, str | Mapping):
        raise ValueError(
            f"want a Grid or a list of experiments, got {grid!r}; Grid(**axes) makes one of axes and "
            "Grid.from_file(path) one of a file"
        )
    experiments = list(grid)
    for each in experiments:
        if not isinstance(each, Experiment):
            raise ValueError(f"among the experiments is {each!r}; make it one by Experiment(...)")
    return experiments


def _check_executor(executor: object) -> None:
    if hasattr(executor, "get_executor"):
        raise ValueError("executor is a client of dask; write executor=client.get_executor()")
    if executor is not None and (isinstance(executor, type) or not hasattr(executor, "submit")):
        raise ValueError(
            f"executor is {executor!r}; want one of concurrent.futures, such as ThreadPoolExecutor(2)"
        )


def _check_callable(name: str, given: object) -> None:
    if given is not None and not callable(given):
        raise ValueError(f"{name} is {given!r}; want a function, as the documentation of sweep says, or None")


def _together(missing: dict[str, Experiment]) -> dict[str, Experiment]:
    """The rows in an order that keeps those together that share a pruned, and then a reconstructed model."""
    places: dict[tuple, int] = {}

    def place(experiment: Experiment) -> tuple[int, int]:
        pruned, prepared = prepared_key(replace(experiment, unit=None)), prepared_key(experiment)
        return places.setdefault(pruned, len(places)), places.setdefault(prepared, len(places))

    return dict(sorted(missing.items(), key=lambda item: place(item[1])))


def _table(rows: list[dict], kept: bool) -> pd.DataFrame:
    """The rows as a table; raises when all have failed, warns when some have."""
    failed = [row for row in rows if row.get("error")]
    table = pd.DataFrame(rows).drop(columns=["traceback", "format"], errors="ignore")
    if failed:
        first = failed[0]["error"]
        words = f"{len(failed)} of {len(rows)} rows failed, the first with {first}"
        if len(failed) == len(rows):
            raise NothingComputed(first, first if len(rows) == 1 else words, table, kept)
        warnings.warn(f"{words}; see the column 'error'", stacklevel=3)
    return table


class _Work:
    """The rows that are missing, while they are computed."""

    def __init__(self, missing: dict[str, Experiment], keep: Callable[..., None]):
        self.missing, self.keep = missing, keep
        # What a model and a text that could not be loaded said, and those that could be somewhere.
        self.unloadable: dict[tuple, str] = {}
        self.loaded: set[tuple] = set()

    def here(self, bar: Progress, cancelled: Callable[[], bool] | None) -> None:
        """Compute them in this thread, one after the other."""
        for key, experiment in self.missing.items():
            if not self._known_unloadable(key):
                try:
                    self.keep(key, attempt(experiment, bar.during(experiment, cancelled), key))
                except NotLoaded as error:
                    self._not_loaded(key, error)

    def on(self, executor: Executor, cancelled: Callable[[], bool] | None, stop: Stop) -> None:
        """Compute them on an executor."""
        waiting: dict[Future, str] = {}
        done: SimpleQueue[Future] = SimpleQueue()
        try:
            for key, experiment in self.missing.items():
                future = executor.submit(attempt, experiment, stop, key)
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
                    key = waiting.pop(future)
                    self._take(key, future)
                    self._withdraw(waiting, _source(self.missing[key]))
        except BaseException as reason:
            if isinstance(reason, KeyboardInterrupt):
                tqdm.write("Stopping the rows in work; finished ones are kept.")
            # A caller who has failed over a row is spared the others.
            told = isinstance(reason, KeyboardInterrupt | Cancelled)
            for future in _stopped(waiting, stop):
                self.keep(waiting[future], future.result(), told=told)
            raise

    def _take(self, key: str, future: Future) -> None:
        """Keep what came of a row."""
        if future.cancelled():
            raise Cancelled
        error = future.exception()
        if error is None:
            self.loaded.add(_source(self.missing[key]))
            self.keep(key, future.result())
        elif isinstance(error, NotLoaded):
            self._not_loaded(key, error)
        elif isinstance(error, BrokenExecutor | Cancelled) or not isinstance(error, Exception):
            raise error
        else:
            # The executor's own: a worker that died again and again under this row, say.
            words = f"{type(error).__name__}: {error}"
            self.keep(key, failed_row(self.missing[key], words, words))

    def _not_loaded(self, key: str, error: NotLoaded) -> None:
        """This row, and those of the same model, text and tasks would only wait for the same error."""
        self.unloadable[_source(self.missing[key])] = f"ValueError: {error}"
        self._known_unloadable(key)

    def _known_unloadable(self, key: str) -> bool:
        error = self.unloadable.get(_source(self.missing[key]))
        if error is not None:
            self.keep(key, failed_row(self.missing[key], error, error), stored=False)
        return error is not None

    def _withdraw(self, waiting: dict[Future, str], source: tuple) -> None:
        """Withdraw the rows that wait for what could be loaded nowhere; those in work may yet tell."""
        if source in self.unloadable and source not in self.loaded:
            for future, key in list(waiting.items()):
                if _source(self.missing[key]) == source and future.cancel():
                    self._known_unloadable(waiting.pop(future))


def _stopped(waiting: Iterable[Future], stop: Stop) -> list[Future]:
    """Stop the rows that wait and are in work: those that are finished all the same."""
    stop.set()
    if any(future.running() for future in waiting):
        working = [future for future in waiting if not future.cancel()]
        stop.clear_after(working)
        ended = wait(working, SECONDS_TO_STOP).done
    else:
        # dask's futures do not tell whether they run: withdrawn at once, a row in work would go on unseen.
        # Those that are begun only now see the sign and end.
        stop.clear_at_exit()
        ended, deaf = wait(waiting, SECONDS_TO_STOP)
        for future in deaf:
            future.cancel()
        if not deaf:
            stop.clear_after([])
    return [future for future in ended if not future.cancelled() and future.exception() is None]


def _source(experiment: Experiment) -> tuple:
    e = experiment
    return e.model, e.text, e.dtype, e.length, e.tasks, e.tasks_dir
