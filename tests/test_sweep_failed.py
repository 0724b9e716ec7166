"""Rows that fail: kept as failed, passed by, tried again on request; models that cannot be loaded."""

import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from explorer_parts import Runs, made_row

import perpkit as pk
from perpkit.experiments import run as running

GRID = {"sparsity": [0.1, 0.2, 0.3], "retrain": "biases"}
WORDS = r"1 of 3 rows failed, the first with RuntimeError: the third wheel"


@pytest.fixture
def store(tmp_path):
    return pk.Store(tmp_path / "results.sqlite")


@pytest.fixture
def runs(monkeypatch):
    """Runs that cost nothing; that at sparsity 0.2 fails."""
    listed = Runs()

    def fails(experiment):
        if experiment.sparsity == 0.2:
            raise RuntimeError("the third wheel")

    listed.before = fails
    monkeypatch.setattr(running, "run", listed)
    return listed


def sweep(grid, store, **options):
    return pk.sweep(grid, store=store, progress=False, **options)


@pytest.fixture(params=[None, 2], ids=["here", "on an executor"])
def executor(request):
    if request.param is None:
        yield None
        return
    with ThreadPoolExecutor(request.param) as made:
        yield made


def test_a_failed_row_is_stored_and_the_others_go_on(store, runs, executor):
    told = []
    with pytest.warns(UserWarning, match=WORDS):
        results = sweep(pk.Grid(**GRID), store, executor=executor, on_row=told.append)
    assert results.error.isna().tolist() == [True, False, True]
    assert results.error[1] == "RuntimeError: the third wheel"
    assert results.perplexity.isna().tolist() == [False, True, False]
    assert "traceback" not in results
    assert sorted(row["sparsity"] for row in told) == [0.1, 0.2, 0.3]
    failed = store.table(failed=True)
    assert failed.sparsity.tolist() == [0.2]
    assert "in fails" in failed.traceback[0]
    assert "raise RuntimeError" in failed.traceback[0]


def test_a_failed_row_is_tried_again_only_on_request(store, runs, executor):
    with pytest.warns(UserWarning, match=WORDS):
        sweep(pk.Grid(**GRID), store, executor=executor)
    with pytest.warns(UserWarning, match=WORDS):
        sweep(pk.Grid(**GRID), store, executor=executor)
    assert len(runs) == 3
    runs.before = lambda experiment: None
    results = sweep(pk.Grid(**GRID), store, executor=executor, retry_failed=True)
    assert [e.sparsity for e in runs[3:]] == [0.2]
    assert results.perplexity.notna().all()
    assert sweep(pk.Grid(**GRID), store).equals(results)


def test_when_no_row_could_be_computed_it_is_an_error(store, runs, executor):
    with pytest.raises(ValueError, match=r"RuntimeError: the third wheel\n.*retry_failed"):
        sweep(pk.Grid(sparsity=0.2, retrain="biases"), store, executor=executor)
    runs.fail(RuntimeError("never"))
    with pytest.raises(ValueError, match=r"2 of 2 rows failed, the first with RuntimeError: never"):
        sweep(pk.Grid(sparsity=[0.4, 0.5]), store, executor=executor)


def test_the_bar_counts_the_failed_rows(store, runs, capsys):
    with pytest.warns(UserWarning, match=WORDS):
        pk.sweep(pk.Grid(**GRID), store=store)
    assert "3/3" in capsys.readouterr().err.rpartition("failed=1")[0]


def test_a_row_that_really_fails_tells_why(store):
    grid = pk.Grid(retrain=["none", "perp_v1:bn_recalibrate"], lr=0.1, length=16)
    with pytest.warns(UserWarning, match="no batch normalisation"):
        results = sweep(grid, store)
    assert results.error[1].startswith("ValueError: a OPTForCausalLM has no batch normalisation")


def test_a_row_that_diverges_is_a_failed_row(store):
    grid = pk.Grid(retrain="full", lr=[1e-3, 1e30], steps=3, batch=2, length=16)
    with pytest.warns(UserWarning, match="Try lr="):
        results = sweep(grid, store)
    assert results.error.isna().tolist() == [True, False]


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("no room"),
        torch.OutOfMemoryError("no room"),
        # As torch says it on a CPU.
        RuntimeError("no room: DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
def test_memory_that_runs_out_is_freed_for_the_next_row(store, runs, error):
    kept = SimpleNamespace(model=torch.nn.Linear(1, 1))
    running._dense.get("something", lambda: kept)
    runs.fail(error)
    with pytest.raises(ValueError, match="no room"):
        sweep(pk.Grid(), store)
    made = []
    running._dense.get("something", lambda: made.append(True) or kept)
    running.forget()
    assert made


# --- models and texts that cannot be loaded ---------------------------------------------------------


def test_a_model_that_cannot_be_loaded_fails_its_rows_at_once_and_is_not_kept(
    store, monkeypatch, tmp_path, executor
):
    asked = []
    load_model = running.load_model

    def loading(name, **options):
        asked.append(name)
        if name == missing:
            # Long enough for the sweep to hear of the first before all have asked.
            time.sleep(0.3)
        return load_model(name, **options)

    monkeypatch.setattr(running, "load_model", loading)
    missing = str(tmp_path / "nowhere")
    grid = pk.Grid(model=[missing, "tiny-opt"], sparsity=[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8], length=16)
    with pytest.warns(UserWarning, match=r"8 of 16 rows failed.*there is no folder"):
        results = sweep(grid, store, executor=executor)
    assert results.error.notna().tolist() == [True] * 8 + [False] * 8
    # Threads may have asked before the sweep has heard the first answer.
    assert asked.count(missing) == 1 if executor is None else asked.count(missing) < 8
    assert len(store.table(failed=None)) == 8


def test_when_nothing_can_be_loaded_the_error_is_that_of_loading(store, executor):
    with pytest.raises(ValueError, match=r"there is no folder '\./nowhere'") as error:
        sweep(pk.Grid(model="./nowhere", sparsity=[0.1, 0.2]), store, executor=executor)
    # There is nothing in the store to be tried again.
    assert "retry_failed" not in str(error.value)
    with pytest.raises(ValueError, match=r"did you mean 'storyworld'|unknown text"):
        sweep(pk.Grid(text="storyworlds"), store, executor=executor)
    assert store.table(failed=None).empty


# --- executors that fail themselves -------------------------------------------------------------------


def test_an_error_of_the_executor_itself_is_a_failed_row(store):
    class Losing(ThreadPoolExecutor):
        def submit(self, function, experiment, *arguments):
            if experiment.sparsity == 0.2:
                return super().submit(self.lose)
            return super().submit(made_row, experiment)

        def lose(self):
            raise RuntimeError("the worker died three times")

    with Losing(1) as executor, pytest.warns(UserWarning, match="the worker died three times"):
        results = sweep(pk.Grid(**GRID), store, executor=executor)
    assert results.error.notna().tolist() == [False, True, False]


def _die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_a_pool_that_is_broken_is_an_error_and_its_finished_rows_are_kept(store):
    """Python's own pool cannot go on without one of its processes."""

    class Breaking(ProcessPoolExecutor):
        def submit(self, function, experiment, *arguments):
            function = _die if experiment.sparsity == 0.3 else function
            return super().submit(function, experiment, *arguments)

    grid = pk.Grid(sparsity=[0.1, 0.3], length=16)
    with Breaking(1, multiprocessing.get_context("spawn")) as executor, pytest.raises(BrokenExecutor):
        sweep(grid, store, executor=executor)
    assert store.table(failed=None).sparsity.tolist() == [0.1]


def test_a_row_that_is_finished_is_not_lost_when_another_thread_fails(store, monkeypatch):
    failed = threading.Event()

    def one_fails(experiment, cancelled):
        if experiment.sparsity == 0.1:
            failed.set()
            raise ValueError("the third wheel")
        assert failed.wait(60)
        return made_row(experiment)

    monkeypatch.setattr(running, "run", one_fails)
    grid = pk.Grid(sparsity=[0.1, *(round(0.3 + 0.01 * i, 2) for i in range(20))])
    with ThreadPoolExecutor(2) as executor, pytest.warns(UserWarning, match="the third wheel"):
        results = sweep(grid, store, executor=executor)
    assert results.error.notna().tolist() == [True] + [False] * 20
