"""Explorers without a browser: what the widgets hold after a hand has moved them."""

import html
import re
import threading
import time

import pandas as pd
import pytest

import perpkit as pk
from perpkit.experiments import sweep as sweeping
from perpkit.experiments.sweep import Cancelled
from perpkit.interactive import explorers

SOON = 60


@pytest.fixture
def store(tmp_path) -> pk.Store:
    return pk.Store(tmp_path / "results.sqlite")


class Runs(list):
    """What was run; a run costs nothing, its perplexity follows a formula, and tests can get in its way."""

    def __init__(self):
        self.before = lambda experiment: None

    def __call__(self, experiment, cancelled=None) -> dict:
        self.append(experiment)
        self.before(experiment)
        for _ in range(experiment.steps):
            if cancelled is not None and cancelled():
                raise Cancelled
        return made_row(experiment)

    def fail(self, error: Exception) -> None:
        def raise_it(experiment):
            raise error

        self.before = raise_it

    def hold(self) -> threading.Event:
        """Let runs wait, deaf to a cancel, until the event is set."""
        go = threading.Event()
        self.before = lambda experiment: go.wait(SOON)
        return go


@pytest.fixture
def runs(monkeypatch) -> Runs:
    runs = Runs()
    monkeypatch.setattr(sweeping, "run", runs)
    return runs


def made_row(experiment) -> dict:
    trained = experiment.retrain != "none"
    reached = 2 + (1 if trained else 10) * experiment.sparsity + 0.1 * experiment.seed
    return {
        **experiment.asdict(),
        "perplexity": reached,
        "dense_perplexity": 2.0,
        "floor": 1.5,
        "trainable_share": 0.01 * trained,
        "seconds": 1.0,
        "protocol": "story world",
    }


def words(explorer) -> str:
    """The message as it is read."""
    return html.unescape(re.sub("<[^>]*>", "", explorer.message.value))


def shown(explorer, sparsity, retrain="none") -> str:
    explorer.show(sparsity, retrain)
    assert explorer.wait(SOON)
    return words(explorer)


# --- what is shown --------------------------------------------------------------------------------


def test_the_message_holds_the_numbers_of_a_sweep(store):
    grid = pk.Grid(sparsity=[0.5], retrain=["none", "biases"], steps=3)
    explorer = pk.SparsityExplorer(grid, store=store)
    said = shown(explorer, 0.5, "biases")
    pruned, retrained = pk.sweep(grid, store=store, progress=False).itertuples()
    assert said.startswith(
        f"50 %: perplexity {pruned.dense_perplexity:.2f} dense → {pruned.perplexity:.2f} pruned → "
        f"{retrained.perplexity:.2f} after retraining biases ({100 * retrained.trainable_share:.3g} % of"
    )
    assert explorer.error is None
    assert explorer.cancel.disabled


def test_a_filled_store_is_shown_at_once_and_nothing_is_run(store, runs, monkeypatch):
    grid = pk.Grid(sparsity=[0.3, 0.5, 0.7], retrain=["none", "biases"], seed=range(3))
    pk.sweep(grid, store=store, progress=False)
    runs.clear()
    with monkeypatch.context() as held:
        held.setattr(explorers.Job, "submit", lambda *_: None)
        explorer = pk.SparsityExplorer(grid, store=store)
        assert bytes(explorer.picture.value).startswith(b"\x89PNG")
    explorer = pk.SparsityExplorer(grid, store=store)
    assert shown(explorer, 0.7, "biases") == (
        "70 %: perplexity 2.00 dense → 9.00 pruned → 2.80 after retraining biases "
        "(1 % of the parameters, 1.0 s, mean of 3 seeds)"
    )
    assert runs == []


def test_an_empty_store_does_not_hold_up_the_page(store, runs):
    go = runs.hold()
    explorer = pk.SparsityExplorer(pk.Grid(sparsity=[0.5]), store=store)
    assert explorer.picture.value == b""
    assert explorer.picture.layout.display == "none"
    assert not explorer.cancel.disabled
    assert "spinner" in explorer.message.value
    go.set()
    assert explorer.wait(SOON)
    assert words(explorer) == "50 %: perplexity 2.00 dense → 7.00 pruned"
    assert explorer.picture.layout.display == "block"
    assert bytes(explorer.picture.value).startswith(b"\x89PNG")


def test_a_point_is_run_as_the_grid_says_and_kept(store, runs):
    grid = pk.Grid(sparsity=[0.5, 0.6], retrain="biases", steps=7, lr=0.5, batch=3, seed=[4, 5])
    explorer = pk.SparsityExplorer(grid, store=store)
    shown(explorer, 0.6, "biases")
    asked = [(e.sparsity, e.retrain, e.steps, e.lr, e.batch, e.seed) for e in runs]
    assert asked == [(0.6, "none", 0, 0.0, 0, 0), (0.6, "biases", 7, 0.5, 3, 4)]
    assert len(store.get(experiment.key() for experiment in grid)) == 1


def test_the_pruned_model_is_shown_before_the_retraining_begins(store, runs):
    explorer = pk.SparsityExplorer(pk.Grid(sparsity=[0.5], retrain=["none", "biases"]), store=store)
    seen = {}
    runs.before = lambda experiment: seen.update({experiment.retrain: words(explorer)})
    shown(explorer, 0.7, "biases")
    assert seen["biases"] == "70 %: perplexity 2.00 dense → 9.00 pruned"


def test_the_news_tell_the_training_step(store, runs, monkeypatch):
    monkeypatch.setattr(explorers, "SECONDS_BETWEEN_NEWS", 0)
    told = []
    grid = pk.Grid(sparsity=[0.5], retrain=["none", "biases"], steps=3)
    explorer = pk.SparsityExplorer(grid, store=store)
    explorer.message.observe(lambda _: told.append(words(explorer)), names="value")
    shown(explorer, 0.5, "biases")
    steps = [line.partition("pruned → ")[2] for line in told if "step" in line]
    assert [line.strip() for line in steps] == [f"retraining biases, step {n} of 3" for n in (1, 2, 3)]


def test_the_figure_is_the_picture(store, runs):
    explorer = pk.SparsityExplorer(pk.Grid(sparsity=[0.3, 0.5], retrain=["none", "biases"]), store=store)
    explorer.show(0.3, "biases")
    figure = explorer.figure()
    assert figure.png() == explorer.picture.value
    assert [text.get_text() for text in figure.axes[0].texts] == ["5.00", "2.30"]
    assert set(figure.table.columns) >= {"sparsity", "retrain", "perplexity"}
    assert pk.plot_curves(figure.table).axes[0].get_lines()


def test_a_curve_keeps_its_colour_when_another_comes(store, runs):
    grid = pk.Grid(sparsity=[0.5], retrain=["none", "biases", "full"])
    explorer = pk.SparsityExplorer(grid, store=store)

    def colour():
        curves = {line.get_label(): line.get_color() for line in explorer.figure().axes[0].get_lines()}
        return curves["full (1 %)"]

    explorer.show(0.5, "full")
    before = colour()
    explorer.show(0.5, "biases")
    assert colour() == before


def test_sparsities_of_the_grid_are_on_the_slider(store, runs):
    explorer = pk.SparsityExplorer(pk.Grid(sparsity=[0.125, 0.95]), store=store)
    labels = [label for label, _ in explorer.sparsity.options]
    assert labels[:4] == ["0 %", "5 %", "10 %", "12.5 %"]
    assert labels[-2:] == ["90 %", "95 %"]
    assert shown(explorer, 0.125) == "12.5 %: perplexity 2.00 dense → 3.25 pruned"


def test_without_a_kernel_it_is_a_sentence(store, runs):
    explorer = pk.SparsityExplorer(pk.Grid(sparsity=[0.5]), store=store)
    assert "figure()" in explorer._repr_mimebundle_()["text/plain"]


# --- the latest request wins ----------------------------------------------------------------------


def test_twenty_quick_moves_leave_the_last(store, runs):
    grid = pk.Grid(sparsity=[0.5], retrain=["none", "biases"])
    explorer = pk.SparsityExplorer(grid, store=store)
    for move in range(20):
        explorer.sparsity.value = explorers.SPARSITIES[(7 * move + 1) % len(explorers.SPARSITIES)]
    explorer.sparsity.value = 0.35
    assert explorer.wait(SOON)
    assert words(explorer) == "35 %: perplexity 2.00 dense → 5.50 pruned"
    assert explorer.picture.value == explorer.figure().png()
    assert [text.get_text() for text in explorer.figure().axes[0].texts] == ["5.50"]


def test_hands_in_many_threads_leave_one_consistent_point(store, runs):
    explorer = pk.SparsityExplorer(pk.Grid(sparsity=[0.5], retrain=["none", "biases"]), store=store)

    def move(offset):
        for step in range(10):
            explorer.show(explorers.SPARSITIES[(step * offset) % 19], ["none", "biases"][step % 2])

    threads = [threading.Thread(target=move, args=[offset]) for offset in (1, 5, 7, 11)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    explorer.show(0.4, "none")
    assert explorer.wait(SOON)
    assert words(explorer) == "40 %: perplexity 2.00 dense → 6.00 pruned"
    assert explorer.picture.value == explorer.figure().png()
    assert explorer.error is None


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
    with pytest.raises(ValueError, match="nothing is computed yet"):
        explorer.figure()


# --- errors ---------------------------------------------------------------------------------------


def test_an_error_is_shown_escaped_and_the_controls_go_on(store, runs):
    explorer = pk.SparsityExplorer(pk.Grid(sparsity=[0.5]), store=store)
    shown(explorer, 0.5)
    picture = explorer.picture.value
    runs.fail(RuntimeError("<script>alert(1)</script> & co"))
    shown(explorer, 0.6)
    assert "<b>RuntimeError</b>: &lt;script&gt;alert(1)&lt;/script&gt; &amp; co" in explorer.message.value
    assert isinstance(explorer.error, RuntimeError)
    assert explorer.picture.value == picture
    assert explorer.cancel.disabled
    runs.before = lambda experiment: None
    explorer.again.click()
    assert explorer.wait(SOON)
    assert words(explorer) == "60 %: perplexity 2.00 dense → 8.00 pruned"
    assert explorer.again.disabled


def test_a_store_that_becomes_unusable_is_an_error_in_words(store, runs):
    explorer = pk.SparsityExplorer(pk.Grid(sparsity=[0.5]), store=store)
    shown(explorer, 0.5)
    for file in store.path.parent.glob("results.sqlite*"):
        file.unlink()
    store.path.mkdir()
    assert "cannot be used" in shown(explorer, 0.6)
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

    monkeypatch.setattr(explorers.Job, callback, broken)
    if callback == "submit":
        explorer.sparsity.value = 0.6
    else:
        explorer.cancel.disabled = False
        explorer.cancel.click()
    assert words(explorer) == "RuntimeError: the callback broke"
    assert explorer.cancel.disabled


@pytest.mark.parametrize(
    ("axes", "said"),
    [
        (
            {"criterion": ["magnitude", "random"]},
            "one value of 'criterion' at a time, the grid has 'magnitude' and 'random'",
        ),
        ({"model": ["tiny-opt", "tiny-opt-outliers"]}, "one value of 'model'"),
        ({"retrain": "biases", "steps": [5, 6]}, "one value of 'steps' at a time, the grid has 5 and 6"),
        ({"retrain": "biases", "lr": [0.1, 0.2]}, "one value of 'lr'"),
    ],
)
def test_a_grid_without_controls_for_it_is_refused(store, axes, said):
    with pytest.raises(ValueError, match=said):
        pk.SparsityExplorer(pk.Grid(**axes), store=store)


@pytest.mark.parametrize(("sparsity", "retrain"), [(0.51, "none"), (0.5, "full")])
def test_a_point_that_is_not_offered_is_refused(store, runs, sparsity, retrain):
    explorer = pk.SparsityExplorer(pk.Grid(sparsity=[0.5], retrain=["biases"]), store=store)
    with pytest.raises(ValueError, match=f"cannot show '{retrain}' at {sparsity}: .* none, biases and"):
        explorer.show(sparsity, retrain)


def test_rows_of_another_explorer_are_not_drawn(store, runs):
    pk.sweep(pk.Grid(criterion="random", sparsity=[0.1]), store=store, progress=False)
    explorer = pk.SparsityExplorer(pk.Grid(sparsity=[0.5]), store=store)
    table = explorer.figure().table
    pd.testing.assert_series_equal(table["sparsity"], pd.Series([0.5], name="sparsity"))
