"""Sweeps: run a grid of experiments, keep every finished row, return one tidy table."""

import copy
import time
import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future, wait
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

import pandas as pd
from tqdm.auto import tqdm

from ..evaluation.perplexity import perplexity
from ..pruning.prune import CALIBRATED, prune
from ..retraining.loop.retrain import retrain
from ..retraining.subsets import trainable_share, untie_head
from ..sources.models import load_model
from ..sources.text import Text, load_text
from .grid import Experiment, Grid
from .store import Store

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SECONDS_BETWEEN_LOOKS = 0.2
# A training step takes no longer on the models of a lecture; a model being loaded may.
SECONDS_TO_STOP = 3.0


class Cancelled(Exception):
    """The sweep was cancelled; finished rows are in the store."""


def sweep(
    grid: Grid | Iterable[Experiment],
    *,
    store: Store | str | Path | None = None,
    executor: Executor | None = None,
    progress: bool = True,
    on_row: Callable[[dict], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> pd.DataFrame:
    """Run every experiment of a grid that is not in the store and return one row each, in the grid's order.

    A row holds the experiment's inputs, `perplexity`, `dense_perplexity`, `floor` (None where unknown),
    `trainable_share`, `seconds` (pruning and retraining), and `protocol`. Each row is stored as soon as it is
    finished, so a sweep that was interrupted goes on where it stopped. `executor` is any
    `concurrent.futures.Executor`; without one the rows are computed here, one after the other. `cancelled()`
    and Ctrl-C stop the rows in work within one training step (those on an executor get three seconds to say
    so); an error in one row lets the others in work finish. The dense model, the text and the dense
    perplexity are loaded and measured once in each process.

    Raises ValueError for bad inputs or a store that cannot be used, and Cancelled.

    >>> import tempfile
    >>> grid = Grid(sparsity=[0.3, 0.5], retrain="none")
    >>> results = sweep(grid, store=Path(tempfile.mkdtemp()) / "results.sqlite", progress=False)
    >>> bool(results.perplexity[0] < results.perplexity[1])
    True
    """
    store = store if isinstance(store, Store) else Store(store)
    experiments = list(grid)
    keys = [experiment.key() for experiment in experiments]
    rows = store.get(keys)
    missing = {key: experiment for key, experiment in zip(keys, experiments, strict=True) if key not in rows}

    def keep(key: str, row: dict) -> None:
        store.put(key, row)
        rows[key] = row
        bar.update()
        if on_row is not None:
            on_row(row)

    with tqdm(total=len(rows) + len(missing), initial=len(rows), unit="row", disable=not progress) as bar:
        if executor is None:
            for key, experiment in missing.items():
                keep(key, run(experiment, cancelled))
        else:
            _run_on(executor, missing, keep, cancelled, _Stop(store.path))
    return pd.DataFrame([rows[key] for key in keys])


def _run_on(
    executor: Executor,
    missing: dict[str, Experiment],
    keep: Callable[[str, dict], None],
    cancelled: Callable[[], bool] | None,
    stop: "_Stop",
) -> None:
    """Run the missing rows on an executor; an error is raised once those in work have ended."""
    waiting: dict[Future, str] = {}
    done: SimpleQueue[Future] = SimpleQueue()
    failed: BaseException | None = None
    try:
        for key, experiment in missing.items():
            future = executor.submit(run, experiment, stop)
            waiting[future] = key
            future.add_done_callback(done.put)
        while waiting:
            if cancelled is not None and cancelled():
                raise Cancelled
            try:
                future = done.get(timeout=SECONDS_BETWEEN_LOOKS)
            except Empty:
                continue
            if _succeeded(future):
                keep(waiting[future], future.result())
            elif failed is None:
                failed = Cancelled() if future.cancelled() else future.exception()
                _withdraw(waiting)
            del waiting[future]
    except BaseException as reason:
        if isinstance(reason, KeyboardInterrupt):
            tqdm.write("Stopping the rows in work; finished ones are kept.")
        stop.set()
        running = _withdraw(waiting)
        stop.clear_after(running)
        for future in wait(running, SECONDS_TO_STOP).done:
            if _succeeded(future):
                keep(waiting[future], future.result())
        raise
    if failed is not None:
        raise failed


def _withdraw(futures: Iterable[Future]) -> list[Future]:
    """Cancel what is not in work yet and return what is."""
    return [future for future in futures if not future.cancel()]


def _succeeded(future: Future) -> bool:
    return not future.cancelled() and future.exception() is None


class _Stop:
    """Tells the rows in work to stop: by a file, which the workers of any executor can look for."""

    def __init__(self, store: Path):
        # Beside the store: the temporary folder is another one on another machine.
        self._file = store.with_name(f"{store.name}.stop-{uuid.uuid4().hex[:8]}")

    def __call__(self) -> bool:
        return self._file.exists()

    def set(self) -> None:
        # On a full disk the rows in work are not told and finish.
        with suppress(OSError):
            self._file.touch()

    def clear_after(self, running: list[Future]) -> None:
        """Tidy up when the last of them has ended, which may be after the sweep."""

        def clear(_: Future | None = None) -> None:
            if all(future.done() for future in running):
                self._file.unlink(missing_ok=True)

        for future in running:
            future.add_done_callback(clear)
        clear()


def run(experiment: Experiment, cancelled: Callable[[], bool] | None = None) -> dict:
    """Prune, retrain and measure one experiment: its row.

    Raises Cancelled when `cancelled()` said so before the row was finished.
    """
    _check(cancelled)
    dense = _dense(experiment.model, experiment.text, experiment.length, experiment.files())
    dense_perplexity, text = dense.measure(cancelled), dense.text
    model = copy.deepcopy(dense.model)
    started = time.perf_counter()
    masks = prune(
        model,
        experiment.criterion,
        sparsity=experiment.sparsity,
        calibration=text.calibration if experiment.criterion in CALIBRATED else None,
        seed=experiment.seed,
        progress=False,
        cancelled=cancelled,
    )
    _check(cancelled)
    share = 0.0
    if experiment.retrain != "none":
        if "head" in experiment.retrain:
            untie_head(model)
        share = trainable_share(model, experiment.retrain)
        retrain(
            model,
            text.train,
            masks=masks,
            subset=experiment.retrain,
            steps=experiment.steps,
            lr=experiment.lr or 0.0,
            batch=experiment.batch,
            seed=experiment.seed,
            progress=False,
            cancelled=cancelled,
        )
    seconds = time.perf_counter() - started
    reached = perplexity(model, text.test, cancelled=cancelled)
    _check(cancelled)
    return {
        **experiment.asdict(),
        "perplexity": reached,
        "dense_perplexity": dense_perplexity,
        "floor": text.floor,
        "trainable_share": share,
        "seconds": seconds,
        "protocol": text.protocol,
    }


def _check(cancelled: Callable[[], bool] | None) -> None:
    if cancelled is not None and cancelled():
        raise Cancelled


@dataclass
class _Dense:
    """The dense model, its text and, once measured, its perplexity."""

    model: "PreTrainedModel"
    text: Text
    perplexity: float | None = None

    def measure(self, cancelled: Callable[[], bool] | None) -> float:
        if self.perplexity is None:
            reached = perplexity(self.model, self.text.test, cancelled=cancelled)
            _check(cancelled)
            self.perplexity = reached
        return self.perplexity


@lru_cache(maxsize=2)
def _dense(model_name: str, text_name: str, length: int | None, _files: tuple[str, str]) -> _Dense:
    """What the rows of a process share while no file changes."""
    model, tokenizer = load_model(model_name)
    return _Dense(model, load_text(text_name, tokenizer, length=length))
