"""Sweeps that are cancelled, interrupted or fail: what is finished is kept, the rest is left at once."""

import pickle
import threading
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
from explorer_parts import Runs, made_row

import perpkit as pk
from perpkit.experiments import retraining
from perpkit.experiments import run as running
from perpkit.experiments import sweep as sweeping
from perpkit.experiments.run import run
from perpkit.experiments.stop import Stop
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


# --- here, one row after the other ----------------------------------------------------------------


def test_an_interrupted_sweep_keeps_its_rows_and_goes_on_from_there(store, runs):
    grid = pk.Grid(sparsity=[0.1, 0.2, 0.3, 0.4])

    def fails_at_the_third(experiment):
        if len(runs) == 3:
            raise KeyboardInterrupt

    runs.before = fails_at_the_third
    with pytest.raises(KeyboardInterrupt):
        sweep(grid, store)
    assert kept(store, grid) == [0.1, 0.2]
    runs.before = lambda experiment: None
    results = sweep(grid, store)
    assert [e.sparsity for e in runs] == [0.1, 0.2, 0.3, 0.3, 0.4]
    assert list(results.sparsity) == [0.1, 0.2, 0.3, 0.4]


def test_cancel_takes_effect_within_one_training_step(store, monkeypatch):
    done = []
    retrain = retraining.retrain
    monkeypatch.setattr(
        retraining,
        "retrain",
        lambda *args, **kwargs: retrain(*args, **kwargs, on_step=lambda step, loss: done.append(step)),
    )
    grid = pk.Grid(retrain="biases", length=16, steps=50, batch=2)
    with pytest.raises(Cancelled):
        sweep(grid, store, cancelled=lambda: len(done) >= 3)
    assert done == [1, 2, 3]
    assert kept(store, grid) == []


@pytest.mark.parametrize("measured_before", [True, False], ids=["pruned", "dense"])
def test_cancel_during_the_evaluation_keeps_no_row(store, monkeypatch, measured_before):
    evaluating = []
    perplexity = running.perplexity

    def watched(*args, **kwargs):
        evaluating.append(True)
        return perplexity(*args, **kwargs)

    running.forget()
    if measured_before:
        run(pk.Experiment(length=16))
    grid = pk.Grid(length=16)
    monkeypatch.setattr(running, "perplexity", watched)
    with pytest.raises(Cancelled):
        sweep(grid, store, cancelled=lambda: bool(evaluating))
    assert kept(store, grid) == []
    # What was left in the middle is not taken for the dense model's perplexity.
    assert sweep(grid, store).dense_perplexity[0] > 1


def test_a_cancel_that_is_taken_back_is_still_one(store, monkeypatch):
    """Asked once by the evaluation, which stops with NaN, and once more by the row."""
    evaluating = []
    perplexity = running.perplexity

    def watched(*args, **kwargs):
        evaluating.append(True)
        return perplexity(*args, **kwargs)

    running.forget()
    monkeypatch.setattr(running, "perplexity", watched)
    grid = pk.Grid(length=16)
    with pytest.raises(Cancelled):
        sweep(grid, store, cancelled=lambda: bool(evaluating) and evaluating.pop())
    assert kept(store, grid) == []
    assert sweep(grid, store).dense_perplexity[0] > 1


def test_a_cancelled_sweep_keeps_the_rows_before(store, runs):
    grid = pk.Grid(sparsity=[0.1, 0.2, 0.3, 0.4], retrain="biases")
    with pytest.raises(Cancelled):
        sweep(grid, store, cancelled=lambda: len(runs) == 3)
    assert kept(store, grid) == [0.1, 0.2]


# --- on an executor -------------------------------------------------------------------------------


class LastFirst(ThreadPoolExecutor):
    """An executor that has finished the last experiment and not yet begun the others."""

    def __init__(self, ready: int):
        super().__init__(1)
        self.ready, self.futures = ready, []

    def submit(self, function, *arguments):
        future = Future()
        self.futures.append(future)
        if len(self.futures) == self.ready:
            future.set_result(function(*arguments))
        return future


def test_cancelling_keeps_what_is_finished_and_withdraws_the_rest(store, runs, monkeypatch):
    monkeypatch.setattr(sweeping, "SECONDS_TO_STOP", 0.05)
    grid = pk.Grid(sparsity=[0.1, 0.2, 0.3])
    executor = LastFirst(3)
    with pytest.raises(Cancelled):
        sweep(grid, store, executor=executor, cancelled=lambda: True)
    assert kept(store, grid) == [0.3]
    assert [future.cancelled() for future in executor.futures] == [True, True, False]


@pytest.fixture
def at_work(monkeypatch):
    """Rows that go on until they are told to stop; the event says that one has begun."""
    begun = threading.Event()

    def endless(experiment, cancelled):
        begun.set()
        while not cancelled():
            pass
        raise Cancelled

    monkeypatch.setattr(running, "run", endless)
    return begun


def test_cancelling_stops_the_rows_in_work(store, at_work):
    grid = pk.Grid(sparsity=[0.1, 0.2, 0.3])
    with ThreadPoolExecutor(2) as executor, pytest.raises(Cancelled):
        sweep(grid, store, executor=executor, cancelled=at_work.is_set)
    assert kept(store, grid) == []
    assert [file.name for file in store.path.parent.glob("*stop*")] == []


def test_ctrl_c_stops_the_rows_in_work_and_says_so(store, at_work, capsys):
    def pressed():
        if at_work.is_set():
            raise KeyboardInterrupt

    with ThreadPoolExecutor(2) as executor, pytest.raises(KeyboardInterrupt):
        sweep(pk.Grid(sparsity=[0.1, 0.2, 0.3]), store, executor=executor, cancelled=pressed)
    assert "Stopping the rows in work" in capsys.readouterr().out


def test_a_row_that_does_not_listen_is_not_waited_for(store, runs, monkeypatch):
    monkeypatch.setattr(sweeping, "SECONDS_TO_STOP", 0.05)
    go = runs.hold()
    grid = pk.Grid(sparsity=[0.1, 0.2])
    with ThreadPoolExecutor(1) as executor:
        with pytest.raises(Cancelled):
            sweep(grid, store, executor=executor, cancelled=lambda: bool(runs))
        # It may still look for the sign, which goes when it has ended.
        assert len(list(store.path.parent.glob("*stop*"))) == 1
        go.set()
    assert [e.sparsity for e in runs] == [0.1]
    assert list(store.path.parent.glob("*stop*")) == []


def test_a_row_that_is_finished_while_the_sweep_stops_is_kept(store, runs):
    go = runs.hold()
    grid = pk.Grid(sparsity=[0.1, 0.2])

    def cancelled():
        if runs:
            threading.Timer(0.05, go.set).start()
        return bool(runs)

    with ThreadPoolExecutor(1) as executor, pytest.raises(Cancelled):
        sweep(grid, store, executor=executor, cancelled=cancelled)
    assert kept(store, grid) == [0.1]


def test_the_sign_to_stop_is_seen_in_another_process(tmp_path):
    stop = Stop(tmp_path / "results.sqlite")
    elsewhere = pickle.loads(pickle.dumps(stop))
    assert not elsewhere()
    stop.set()
    assert elsewhere()
    stop.clear_after([])
    assert not elsewhere()


def test_an_executor_that_is_shut_down_elsewhere_cancels_the_sweep(store, runs):
    go = runs.hold()
    executor = ThreadPoolExecutor(1)

    def shut_down():
        if runs:
            executor.shutdown(wait=False, cancel_futures=True)
            go.set()
        return False

    grid = pk.Grid(sparsity=[0.1, 0.2, 0.3])
    with pytest.raises(Cancelled):
        sweep(grid, store, executor=executor, cancelled=shut_down)
    assert kept(store, grid) == [0.1]


def test_a_store_that_fails_is_told_and_the_rows_in_work_stop(store, monkeypatch):
    def put(key, row):
        raise ValueError("the disk is full")

    monkeypatch.setattr(store, "put", put)

    def one_ends(experiment, cancelled):
        while experiment.sparsity != 0.1 and not cancelled():
            pass
        return made_row(experiment)

    monkeypatch.setattr(running, "run", one_ends)
    with ThreadPoolExecutor(2) as executor, pytest.raises(ValueError, match="the disk is full"):
        sweep(pk.Grid(sparsity=[0.1, 0.2]), store, executor=executor)
