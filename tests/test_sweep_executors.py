"""Executors of other habits: futures that do not tell, workers interrupted, callers that fail."""

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
from explorer_parts import Runs

import perpkit as pk
from perpkit.experiments import run as running
from perpkit.experiments import sweep as sweeping
from perpkit.experiments.sweep import Cancelled


@pytest.fixture
def store(tmp_path):
    return pk.Store(tmp_path / "rows" / "results.sqlite")


@pytest.fixture
def runs(monkeypatch):
    """Runs that cost nothing and that tests can get in the way of."""
    listed = Runs()
    monkeypatch.setattr(running, "run", listed)
    return listed


def sweep(grid, store, **options):
    return pk.sweep(grid, store=store, progress=False, **options)


def kept(store, grid) -> list[float]:
    return sorted(row["sparsity"] for row in store.get(e.key() for e in grid).values())


class Untold(ThreadPoolExecutor):
    """An executor that does not tell which rows are in work, as dask's: they can still be withdrawn."""

    def submit(self, function, *arguments):
        told = Future()
        real = super().submit(function, *arguments)

        def answer(real):
            if not told.cancelled():
                error = real.exception()
                told.set_exception(error) if error else told.set_result(real.result())

        real.add_done_callback(answer)
        return told


def test_rows_in_work_stop_on_an_executor_that_does_not_tell_them(store, monkeypatch):
    begun, until_told = threading.Event(), []

    def long(experiment, cancelled):
        begun.set()
        until_told.append(wait_for(cancelled))
        raise Cancelled

    monkeypatch.setattr(running, "run", long)
    with Untold(2) as executor, pytest.raises(Cancelled):
        sweep(pk.Grid(sparsity=[0.1, 0.2, 0.3]), store, executor=executor, cancelled=begun.is_set)
    assert until_told
    assert all(until_told)
    assert list(store.path.parent.glob("*stop*")) == []


def wait_for(condition) -> bool:
    """Whether it comes true soon."""
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def test_the_sign_stays_for_rows_in_work_that_may_still_look(store, runs, monkeypatch):
    monkeypatch.setattr(sweeping, "SECONDS_TO_STOP", 0.05)
    go = runs.hold()
    with Untold(1) as executor:
        with pytest.raises(Cancelled):
            sweep(pk.Grid(sparsity=[0.1, 0.2]), store, executor=executor, cancelled=lambda: bool(runs))
        assert len(list(store.path.parent.glob("*stop*"))) == 1
        go.set()
    assert [e.sparsity for e in runs] == [0.1]


def test_a_row_that_is_interrupted_in_its_worker_is_no_failed_row(store, runs):
    def interrupted(experiment):
        if experiment.sparsity == 0.2:
            raise KeyboardInterrupt

    runs.before = interrupted
    grid = pk.Grid(sparsity=[0.1, 0.2])
    with ThreadPoolExecutor(1) as executor, pytest.raises(KeyboardInterrupt):
        sweep(grid, store, executor=executor)
    assert kept(store, grid) == [0.1]


def test_finished_rows_are_kept_when_on_row_fails(store, runs):
    grid = pk.Grid(sparsity=[0.1, 0.2, 0.3])

    def on_row(row):
        raise RuntimeError("the tracker is down")

    executor = ThreadPoolExecutor(1)
    submit, futures = executor.submit, []

    def submit_and_finish(*arguments):
        futures.append(submit(*arguments))
        futures[-1].exception()
        return futures[-1]

    executor.submit = submit_and_finish
    with executor, pytest.raises(RuntimeError, match="the tracker is down"):
        sweep(grid, store, executor=executor, on_row=on_row)
    assert kept(store, grid) == [0.1, 0.2, 0.3]
