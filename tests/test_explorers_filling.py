"""The sparsity explorer without a browser: all rows of a grid, in the background."""

import re
import threading
import time

import pytest
from explorer_parts import SOON, Runs, read, shown, words

import perpkit as pk
from perpkit.experiments import run as running
from perpkit.experiments.run import NotLoaded
from perpkit.interactive.explorers import filling
from perpkit.interactive.explorers.filling import _Progress

GRID = pk.Grid(sparsity=[0.3, 0.5, 0.7], retrain=["none", "biases"], steps=4)


@pytest.fixture
def store(tmp_path) -> pk.Store:
    return pk.Store(tmp_path / "results.sqlite")


@pytest.fixture
def runs(monkeypatch) -> Runs:
    runs = Runs()
    monkeypatch.setattr(running, "run", runs)
    return runs


def until(condition) -> None:
    for _ in range(100 * SOON):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it never came to that")


def test_all_rows_are_computed_and_drawn(store, runs):
    explorer = pk.SparsityExplorer(GRID, store=store)
    shown(explorer, 0.5)
    assert read(explorer.filling.said) == "1 of 6 rows of the grid finished"
    explorer.filling.button.click()
    assert explorer.wait(SOON)
    assert read(explorer.filling.said) == "all 6 rows of the grid finished"
    assert explorer.filling.button.disabled
    assert explorer.cancel.disabled
    assert len(runs) == 6
    assert len(store.get(experiment.key() for experiment in GRID)) == 6
    assert explorer.rows.titles == ("rows behind the curves (6)",)
    assert explorer.picture.value == explorer.figure().png()
    assert words(explorer) == "50 %: perplexity 2.00 dense → 7.00 pruned"


def test_a_filled_grid_has_nothing_to_compute(store, runs):
    pk.sweep(GRID, store=store, progress=False)
    explorer = pk.SparsityExplorer(GRID, store=store)
    assert explorer.filling.button.disabled
    assert read(explorer.filling.said) == "all 6 rows of the grid finished"


def test_a_point_computed_for_itself_counts(store, runs):
    explorer = pk.SparsityExplorer(GRID, store=store)
    shown(explorer, 0.7, "biases")
    assert read(explorer.filling.said) == f"{len(runs)} of 6 rows of the grid finished"
    assert len(runs) in (2, 3)  # the first point may have been left before it began


def test_the_curves_fill_in_while_the_slider_moves(store, runs):
    explorer = pk.SparsityExplorer(GRID, store=store)
    shown(explorer, 0.5)
    go, began = threading.Event(), threading.Event()

    def before(experiment):
        if experiment.sparsity == 0.7:
            began.set()
            assert go.wait(SOON)

    runs.before = before
    explorer.compute_all()
    assert began.wait(SOON)
    # What is there is shown at once, and does not stop the rest.
    explorer.show(0.3, "biases")
    until(lambda: words(explorer).startswith("30 %: perplexity 2.00 dense → 5.00 pruned → 2.30"))
    assert explorer.filling.running
    assert not explorer.cancel.disabled
    assert set(explorer._current().table["sparsity"]) == {0.3, 0.5}
    go.set()
    assert explorer.wait(SOON)
    assert set(explorer._current().table["sparsity"]) == {0.3, 0.5, 0.7}
    assert explorer.cancel.disabled


def test_the_message_counts_the_seeds_that_come(store, runs):
    grid = pk.Grid(sparsity=[0.5], retrain=["none", "biases"], seed=range(3))
    explorer = pk.SparsityExplorer(grid, store=store)
    assert shown(explorer, 0.5, "biases").endswith("biases (1 % of the parameters, 1.0 s)")
    explorer.compute_all()
    assert explorer.wait(SOON)
    assert "→ 2.60 after retraining biases" in words(explorer)
    assert words(explorer).endswith("1.0 s, mean of 3 seeds)")


def test_what_is_shown_is_computed_first_and_pruned_models_are_shared(store, runs):
    grid = pk.Grid(retrain=["biases", "norms"], criterion=["magnitude", "wanda"], sparsity=[0.3, 0.5])
    explorer = pk.SparsityExplorer(grid, store=store)
    explorer.show(0.5, "none", criterion="wanda")
    assert explorer.wait(SOON)
    runs.clear()
    explorer.compute_all()
    assert explorer.wait(SOON)
    order = [(e.criterion, e.sparsity, e.retrain) for e in runs]
    assert [criterion for criterion, *_ in order] == ["wanda"] * 4 + ["magnitude"] * 4
    assert [sparsity for _, sparsity, _ in order] == [0.3, 0.3, 0.5, 0.5] * 2


def test_cancel_stops_it_and_keeps_the_finished_rows(store):
    grid = pk.Grid(sparsity=[0.3, 0.5], retrain=["none", "biases"], steps=100_000)
    explorer = pk.SparsityExplorer(grid, store=store)
    shown(explorer, 0.5)
    explorer.compute_all()
    until(lambda: "biases at 30 %" in read(explorer.filling.said))
    assert re.fullmatch(
        r"2 of 4 rows of the grid finished · 2 left · magnitude biases at 30 % ( about [\d.]+ \w+ left)?",
        read(explorer.filling.said),
    )
    assert "<progress" in explorer.filling.said.value
    assert not explorer.cancel.disabled
    explorer.cancel.click()
    assert read(explorer.filling.said) == "cancelled: 2 of 4 rows of the grid finished"
    assert explorer.cancel.disabled
    assert not explorer.filling.button.disabled
    started = time.perf_counter()
    assert explorer.wait(SOON)
    assert time.perf_counter() - started < 5
    assert words(explorer).startswith("50 %: perplexity"), "the point was not asked to stop"


def test_a_second_click_does_not_begin_again(store, runs):
    explorer = pk.SparsityExplorer(GRID, store=store)
    shown(explorer, 0.5)
    go = runs.hold()
    explorer.compute_all()
    explorer.compute_all()
    go.set()
    assert explorer.wait(SOON)
    assert len(runs) == 6


def test_a_row_that_fails_is_counted_and_the_others_go_on(store, runs):
    explorer = pk.SparsityExplorer(GRID, store=store)
    shown(explorer, 0.5)

    def before(experiment):
        if experiment.retrain == "biases" and experiment.sparsity == 0.3:
            raise RuntimeError("<b>no luck</b>")

    runs.before = before
    explorer.compute_all()
    assert explorer.wait(SOON)
    said = "5 of 6 rows of the grid finished; 1 failed, the first with RuntimeError: <b>no luck</b>"
    assert read(explorer.filling.said) == said
    assert "&lt;b&gt;no luck" in explorer.filling.said.value
    assert not explorer.filling.button.disabled
    runs.before = lambda experiment: None
    explorer.filling.button.click()
    assert explorer.wait(SOON)
    assert read(explorer.filling.said) == "all 6 rows of the grid finished"


def test_a_model_that_cannot_be_loaded_ends_it(store, runs):
    explorer = pk.SparsityExplorer(GRID, store=store)
    shown(explorer, 0.5)
    runs.fail(NotLoaded("it is <gone>"))
    explorer.compute_all()
    assert explorer.wait(SOON)
    assert len(runs) == 2, "one row is enough to know"
    assert read(explorer.filling.said) == "1 of 6 rows of the grid finished; ValueError: it is <gone>"
    assert "<gone>" not in explorer.filling.said.value
    assert "NothingComputed" in explorer.details.value
    assert explorer.error is not None
    assert explorer.cancel.disabled


def test_rows_without_a_finite_number_do_not_end_it(store, runs, monkeypatch):
    made = runs.__call__
    monkeypatch.setattr(running, "run", lambda *given: {**made(*given), "perplexity": float("inf")})
    other = pk.SparsityExplorer(pk.Grid(criterion="wanda", sparsity=[0.3, 0.5]), store=store)
    other.compute_all()
    assert other.wait(SOON)
    assert read(other.filling.said) == "all 2 rows of the grid finished"
    assert words(other) == "ValueError: no value of 'perplexity' is finite"


def test_without_a_background_the_rows_are_there_when_the_click_returns(store, runs):
    explorer = pk.SparsityExplorer(GRID, store=store, background=False)
    explorer.filling.button.click()
    assert len(runs) == 6
    assert explorer.picture.value == explorer.figure().png()
    assert not explorer.filling.running


def test_the_rest_takes_as_long_as_finished_rows_of_its_kind(monkeypatch):
    now = [0.0]

    class Clock:
        def __init__(self):
            self.started = now[0]

        def passed(self):
            return now[0] - self.started

    monkeypatch.setattr(filling, "Pace", Clock)
    progress = _Progress({f"{i}": experiment for i, experiment in enumerate(GRID)})
    kinds = [experiment.retrain for experiment in GRID]
    assert kinds == ["none", "biases"] * 3
    nothing, retrained = progress.left["0"], progress.left["1"]
    assert progress.seconds(0.0, nothing) is None
    now[0] = 2.0
    progress.finished("0")
    assert progress.seconds(0.5, retrained) is None, "too early to tell"
    now[0] = 7.0
    # Half of the first retraining took 5 s: three of 10 s and two of 2 s, less what is over.
    assert progress.seconds(0.5, retrained) == pytest.approx(3 * 10 + 2 * 2 - 5)
    now[0] = 12.0
    progress.finished("1")
    now[0] = 13.0
    assert progress.seconds(0.0, nothing) == pytest.approx(2 * 10 + 2 * 2 - 1)
    now[0] = 99.0
    assert progress.seconds(0.0, nothing) == pytest.approx(22), "a slow row does not count backwards"


def test_what_is_computed_meanwhile_is_left_out():
    progress = _Progress({f"{i}": experiment for i, experiment in enumerate(GRID)})
    progress.skip({"3", "4", "another"})
    assert list(progress.left) == ["0", "1", "2", "5"]
    progress.finished("3")
    assert "· 4 left · magnitude none at 30 %" in progress.words(1, progress.left["0"])
