"""Explorers without a browser: cancelled, broken and asked for what they do not offer."""

import re
import time

import pandas as pd
import pytest
from explorer_parts import SOON, Runs, read, shown, words

import perpkit as pk
from perpkit.experiments import run as running
from perpkit.interactive.explorers import explorer as base


@pytest.fixture
def store(tmp_path) -> pk.Store:
    return pk.Store(tmp_path / "results.sqlite")


@pytest.fixture
def runs(monkeypatch) -> Runs:
    runs = Runs()
    monkeypatch.setattr(running, "run", runs)
    return runs


# --- cancel ---------------------------------------------------------------------------------------


def test_cancel_takes_effect_within_a_training_step(store):
    grid = pk.Grid(sparsity=[0.5], retrain=["none", "biases"], steps=100_000)
    explorer = pk.SparsityExplorer(grid, store=store)
    explorer.show(0.5, "biases")
    while "step" not in words(explorer):
        assert not explorer.wait(0.05), words(explorer)
    started = time.perf_counter()
    explorer.cancel.click()
    assert words(explorer) == "cancelled; finished rows are kept"
    assert explorer.cancel.disabled
    assert explorer.wait(SOON)
    assert time.perf_counter() - started < 5
    assert words(explorer) == "cancelled; finished rows are kept"
    assert len(store.get(experiment.key() for experiment in grid)) == 1
    assert shown(explorer, 0.3).startswith("30 %: perplexity")


def test_a_cancelled_run_that_does_not_listen_shows_nothing(store, runs):
    go = runs.hold()
    explorer = pk.SparsityExplorer(pk.Grid(sparsity=[0.5]), store=store)
    while not runs:
        time.sleep(0.01)
    explorer.cancel.click()
    go.set()
    assert explorer.wait(SOON)
    assert words(explorer) == "cancelled; finished rows are kept"
    assert explorer.picture.value == b""


def test_a_cancel_that_comes_too_late_hides_nothing(store, runs):
    explorer = pk.SparsityExplorer(pk.Grid(sparsity=[0.5]), store=store)
    said = shown(explorer, 0.5)
    explorer._on_cancel(explorer.cancel)
    assert words(explorer) == said


def test_without_a_finished_row_there_is_no_figure(store, runs):
    runs.fail(ValueError("no luck"))
    explorer = pk.SparsityExplorer(pk.Grid(sparsity=[0.5]), store=store)
    with pytest.raises(ValueError, match="this has failed: ValueError: no luck"):
        explorer.figure()


# --- errors ---------------------------------------------------------------------------------------


def test_an_error_is_shown_escaped_and_the_controls_go_on(store, runs):
    explorer = pk.SparsityExplorer(pk.Grid(sparsity=[0.5]), store=store)
    shown(explorer, 0.5)
    picture = explorer.picture.value
    runs.fail(RuntimeError("<script>alert(1)</script> & co"))
    shown(explorer, 0.6)
    assert "<b>RuntimeError</b>: &lt;script&gt;alert(1)&lt;/script&gt; &amp; co" in explorer.message.value
    assert "<script>alert(1)</script> & co" in str(explorer.error)
    assert explorer.picture.value == picture
    assert explorer.cancel.disabled
    runs.before = lambda experiment: None
    explorer.again.click()
    assert explorer.wait(SOON)
    assert words(explorer) == "60 %: perplexity 2.00 dense → 8.00 pruned"
    assert explorer.again.disabled


def test_a_pruned_model_without_a_finite_perplexity_is_retrained_all_the_same(store, runs, monkeypatch):
    def run(experiment, cancelled=None):
        row = runs(experiment, cancelled)
        return {**row, "perplexity": float("inf")} if experiment.retrain == "none" else row

    monkeypatch.setattr(running, "run", run)
    explorer = pk.SparsityExplorer(pk.Grid(sparsity=[0.5], retrain=["none", "biases"]), store=store)
    said = shown(explorer, 0.5, "biases")
    assert said.startswith("50 %: perplexity 2.00 dense → inf pruned → 2.50 after retraining biases")
    assert [text.get_text() for text in explorer.figure().axes[0].texts] == ["2.50"]
    assert shown(explorer, 0.5, "none") == "50 %: perplexity 2.00 dense → inf pruned"


def test_a_store_that_becomes_unusable_is_an_error_in_words(store, runs):
    explorer = pk.SparsityExplorer(pk.Grid(sparsity=[0.5]), store=store)
    shown(explorer, 0.5)
    for file in store.path.parent.glob("results.sqlite*"):
        file.unlink()
    store.path.mkdir()
    assert "is a folder" in shown(explorer, 0.6)
    store.path.rmdir()
    pk.Store(store.path)
    assert shown(explorer, 0.6) == "60 %: perplexity 2.00 dense → 8.00 pruned"


def test_a_missing_model_is_an_error_in_words(store, tmp_path):
    grid = pk.Grid(model=str(tmp_path / "gone"), sparsity=[0.5])
    explorer = pk.SparsityExplorer(grid, store=store)
    assert explorer.wait(SOON)
    assert words(explorer) == f"ValueError: there is no folder {str(tmp_path / 'gone')!r}"


@pytest.mark.parametrize("callback", ["submit", "cancel"])
def test_an_error_in_a_callback_is_shown(store, runs, monkeypatch, callback):
    explorer = pk.SparsityExplorer(pk.Grid(sparsity=[0.5]), store=store)
    assert explorer.wait(SOON)

    def broken(*_):
        raise RuntimeError("the callback broke")

    monkeypatch.setattr(base.Job, callback, broken)
    if callback == "submit":
        explorer.sparsity.value = 0.6
    else:
        go = runs.hold()
        explorer.sparsity.value = 0.6
        explorer.cancel.click()
        # What runs goes on, and so do its news.
        assert read(explorer.exported) == "RuntimeError: the callback broke"
        assert not explorer.cancel.disabled
        go.set()
        assert explorer.wait(SOON)
        assert words(explorer).startswith("60 %: perplexity")
        return
    assert words(explorer) == "RuntimeError: the callback broke"
    assert explorer.cancel.disabled


@pytest.mark.parametrize(
    ("axes", "said"),
    [
        (
            {"unit": [None, "matrix"]},
            "one value of 'unit' at a time, the grid has None and 'matrix'",
        ),
        ({"model": ["tiny-opt", "tiny-opt-outliers"]}, "one value of 'model'"),
        ({"retrain": "biases", "steps": [5, 6]}, "one value of 'steps' at a time, the grid has 5 and 6"),
        ({"retrain": "biases", "lr": [0.1, 0.2]}, "one value of 'lr'"),
    ],
)
def test_a_grid_without_controls_for_it_is_refused(store, axes, said):
    with pytest.raises(ValueError, match=said):
        pk.SparsityExplorer(pk.Grid(**axes), store=store)


@pytest.mark.parametrize(
    ("sparsity", "retrain", "said"),
    [
        (0.51, "none", "sparsity is 0.51; the explorer offers 0.0, 0.05, "),
        (0.5, "full", "retrain is 'full'; the explorer offers none, biases"),
        (0.5, "bias", "did you mean 'biases'?"),
        ([0.5], "none", r"sparsity is [0.5]; the explorer offers 0.0"),
        (True, "none", "sparsity is True; the explorer offers 0.0"),
        # Not the end of 0.5.
        ("5", "none", "sparsity is '5'; the explorer offers 0.0"),
    ],
)
def test_a_point_that_is_not_offered_is_refused(store, runs, sparsity, retrain, said):
    explorer = pk.SparsityExplorer(pk.Grid(sparsity=[0.5], retrain=["biases"]), store=store)
    with pytest.raises(ValueError, match=re.escape(said)):
        explorer.show(sparsity, retrain)


def test_rows_of_another_explorer_are_not_drawn(store, runs):
    pk.sweep(pk.Grid(criterion="random", sparsity=[0.1]), store=store, progress=False)
    explorer = pk.SparsityExplorer(pk.Grid(sparsity=[0.5]), store=store)
    table = explorer.figure().table
    pd.testing.assert_series_equal(table["sparsity"], pd.Series([0.5], name="sparsity"))
