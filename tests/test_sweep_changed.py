"""Sweeps whose files change under them, or whose workers do not all have them: no row under a wrong name."""

import threading
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
from explorer_parts import Runs, made_row
from task_parts import write

import perpkit as pk
from perpkit.experiments import run as running
from perpkit.experiments.run import NotLoaded


@pytest.fixture
def store(tmp_path):
    return pk.Store(tmp_path / "rows" / "results.sqlite")


@pytest.fixture
def runs(monkeypatch):
    listed = Runs()
    monkeypatch.setattr(running, "run", listed)
    return listed


@pytest.fixture(params=[None, 2], ids=["here", "on an executor"])
def executor(request):
    if request.param is None:
        yield None
        return
    with ThreadPoolExecutor(request.param) as made:
        yield made


def sweep(grid, store, **options):
    return pk.sweep(grid, store=store, progress=False, **options)


def test_a_row_of_a_text_that_has_changed_meanwhile_is_not_kept(store, runs, executor, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("one\n")

    def edited(experiment):
        if experiment.text == str(text):
            text.write_text("another\n")

    runs.before = edited
    grid = pk.Grid(text=[str(text), "storyworld"], sparsity=[0.1, 0.2])
    with pytest.warns(UserWarning, match=r"2 of 4 rows failed.* has changed since the sweep began"):
        results = sweep(grid, store, executor=executor)
    assert results.error.notna().tolist() == [True, True, False, False]
    assert store.table(failed=None).text.tolist() == ["storyworld"] * 2
    # What the file held before is no longer to be had, and what it holds now has a name of its own.
    runs.before = lambda experiment: None
    assert sweep(pk.Grid(text=str(text), sparsity=[0.1, 0.2]), store).perplexity.notna().all()


def test_a_row_that_waits_until_its_text_has_changed_is_not_even_begun(store, runs, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("one\n")
    grid = pk.Grid(text=["storyworld", str(text)], sparsity=0.1)
    with pytest.warns(UserWarning, match="start the sweep again"):
        sweep(grid, store, on_row=lambda row: text.write_text("another\n"))
    assert [experiment.text for experiment in runs] == ["storyworld"]


# --- tasks ----------------------------------------------------------------------------------------


@pytest.fixture
def silent(monkeypatch):
    """A Hub that does not answer, and no task in its cache."""

    def absent(*_, **__):
        raise ConnectionError("offline")

    monkeypatch.setattr("datasets.load_dataset", absent)
    monkeypatch.setattr("perpkit.evaluation.zero_shot.hub_reachable", lambda: False)


def test_rows_whose_tasks_cannot_be_loaded_fail_before_the_work_and_are_not_kept(
    store, silent, executor, monkeypatch, tmp_path
):
    running.forget()
    pruned = []
    prune = running.prune
    monkeypatch.setattr(running, "prune", lambda *a, **k: pruned.append(k["sparsity"]) or prune(*a, **k))
    grid = pk.Grid(tasks=["rte", None], sparsity=[0.1, 0.2], length=16)
    with pytest.warns(UserWarning, match=r"2 of 4 rows failed, the first with .*task 'rte' is not in the"):
        results = sweep(grid, store, executor=executor)
    assert results.error.notna().tolist() == [True, True, False, False]
    assert store.table(failed=None).tasks.isna().tolist() == [True, True]
    assert sorted(pruned) == [0.1, 0.2]
    # With the questions at hand they are computed without being asked to try again.
    write(tmp_path, "rte")
    done = sweep(pk.Grid(tasks="rte", tasks_dir=tmp_path, sparsity=0.1, length=16), store)
    assert done.accuracy.notna().all()


# --- workers that differ --------------------------------------------------------------------------


class Scripted:
    """An executor without threads: what each row comes to, in the order it does."""

    def __init__(self, outcomes):
        self.outcomes, self.futures = outcomes, {}

    def submit(self, function, experiment, *arguments):
        future = self.futures[experiment.sparsity] = Future()
        if len(self.futures) == len(self.outcomes):
            for sparsity, error in self.outcomes.items():
                if error == "in work":
                    self.futures[sparsity].set_running_or_notify_cancel()
            threading.Thread(target=self.answer).start()
        return future

    def answer(self):
        for sparsity, error in self.outcomes.items():
            future = self.futures[sparsity]
            if future.cancelled():
                continue
            if isinstance(error, Exception):
                future.set_exception(error)
            else:
                future.set_result(made_row(pk.Experiment(sparsity=sparsity)))


def errors(outcomes, store) -> list[bool]:
    grid = pk.Grid(sparsity=list(outcomes))
    with pytest.warns(UserWarning, match="rows failed"):
        return sweep(grid, store, executor=Scripted(outcomes)).error.notna().tolist()


def test_one_worker_without_the_model_does_not_stop_those_that_have_it(store):
    missing = NotLoaded("no such model on this machine")
    assert errors({0.1: None, 0.2: missing, 0.3: None, 0.4: None}, store) == [False, True, False, False]
    assert store.table(failed=None).sparsity.tolist() == [0.1, 0.3, 0.4]


def test_a_row_in_work_may_find_what_the_first_could_not(store):
    missing = NotLoaded("no such model on this machine")
    assert errors({0.1: missing, 0.2: "in work"}, store) == [True, False]
    assert store.table(failed=None).sparsity.tolist() == [0.2]
