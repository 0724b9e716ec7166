"""Sweeps: run a grid of experiments, keep every finished row, return one tidy table."""

import copy
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future, as_completed
from functools import lru_cache
from pathlib import Path

import pandas as pd
from tqdm.auto import tqdm

from ..evaluation.perplexity import perplexity
from ..pruning.prune import prune
from ..retraining.retrain import retrain
from ..retraining.subsets import trainable_share, untie_head
from ..sources.models import load_model
from ..sources.text import load_text
from .grid import Experiment, Grid
from .store import Store


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
    `concurrent.futures.Executor`; without one the rows are computed here, one after the other, and
    `cancelled()` takes effect within one training step. The dense model, the text and the dense perplexity
    are loaded and measured once in each process.

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
            _run_on(executor, missing, keep, cancelled)
    return pd.DataFrame([rows[key] for key in keys])


def _run_on(executor: Executor, missing: dict[str, Experiment], keep, cancelled) -> None:
    futures: dict[Future, str] = {
        executor.submit(run, experiment): key for key, experiment in missing.items()
    }
    waiting = dict(futures)
    try:
        for future in as_completed(futures):
            keep(waiting.pop(future), future.result())
            if cancelled is not None and cancelled():
                raise Cancelled
    except KeyboardInterrupt:
        tqdm.write("Stopping; the rows in work are finished first.")
        raise
    finally:
        for future in waiting:
            future.cancel()
        # What is in work is waited for and kept: it cannot be stopped, and not be thrown away either.
        for future, key in waiting.items():
            if not future.cancelled() and future.exception() is None:
                keep(key, future.result())


def run(experiment: Experiment, cancelled: Callable[[], bool] | None = None) -> dict:
    """Prune, retrain and measure one experiment: its row.

    Raises Cancelled when `cancelled()` said so before the row was finished.
    """
    dense, text, dense_perplexity = _dense(
        experiment.model, experiment.text, experiment.length, experiment.files()
    )
    model = copy.deepcopy(dense)
    started = time.perf_counter()
    masks = prune(model, experiment.criterion, sparsity=experiment.sparsity, seed=experiment.seed)
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
    if cancelled is not None and cancelled():
        raise Cancelled
    return {
        **experiment.asdict(),
        "perplexity": reached,
        "dense_perplexity": dense_perplexity,
        "floor": text.floor,
        "trainable_share": share,
        "seconds": seconds,
        "protocol": text.protocol,
    }


@lru_cache(maxsize=2)
def _dense(model_name: str, text_name: str, length: int | None, _files: tuple[str, str]):
    """The dense model, its text and its perplexity: shared by the rows of a process while no file changes."""
    model, tokenizer = load_model(model_name)
    text = load_text(text_name, tokenizer, length=length)
    return model, text, perplexity(model, text.test)
