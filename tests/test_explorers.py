"""Explorers without a browser: what the widgets hold after a hand has moved them."""

import threading

import matplotlib
import pytest
from explorer_parts import SOON, Runs, shown, words

import perpkit as pk
from perpkit.experiments import run as running
from perpkit.interactive.explorers import explorer as base
from perpkit.interactive.explorers import points, sparsity
from perpkit.interactive.explorers.controls import SPARSITIES


@pytest.fixture
def store(tmp_path) -> pk.Store:
    return pk.Store(tmp_path / "results.sqlite")


@pytest.fixture
def runs(monkeypatch) -> Runs:
    runs = Runs()
    monkeypatch.setattr(running, "run", runs)
    return runs


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
        held.setattr(base.Job, "submit", lambda *_: None)
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
    monkeypatch.setattr(base, "SECONDS_BETWEEN_NEWS", 0)
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


@pytest.mark.parametrize("tasks", [None, "storyworld"])
def test_a_move_between_rows_that_are_there_draws_the_mark_alone(store, runs, monkeypatch, tasks):
    drawn = []
    curves = sparsity.draw_curves
    monkeypatch.setattr(sparsity, "draw_curves", lambda *given: drawn.append(given) or curves(*given))
    grid = pk.Grid(sparsity=[0, 0.3, 0.5, 0.9], retrain=["none", "biases"], tasks=tasks)
    pk.sweep(grid, store=store, progress=False)
    explorer = pk.SparsityExplorer(grid, store=store, background=False)
    for place, retrain in ((0.9, "biases"), (0, "none"), (0.3, "none"), (0.3, "biases"), (0.9, "none")):
        explorer.show(place, retrain)
        assert explorer.picture.value == explorer.figure().png()
    assert len(drawn) == 1
    explorer.show(0.4, "none")
    assert len(drawn) == 2
    assert explorer.picture.value == explorer.figure().png() == explorer._current().png()


def test_a_drawing_that_is_broken_off_leaves_nothing_behind(store, runs, monkeypatch):
    grid = pk.Grid(sparsity=[0.3, 0.5, 0.9], retrain=["none", "biases"], tasks="storyworld")
    pk.sweep(grid, store=store, progress=False)
    explorer = pk.SparsityExplorer(grid, store=store, background=False)
    mark, marked = points._mark, []

    def broken(*given):
        if len(marked) == 1:
            raise KeyboardInterrupt
        return marked.append(mark(*given)) or marked[-1]

    with monkeypatch.context() as torn:
        torn.setattr(points, "_mark", broken)
        with pytest.raises(KeyboardInterrupt):
            explorer.show(0.3, "biases")
    explorer.show(0.9, "biases")
    assert explorer.picture.value == explorer.figure().png()


@pytest.mark.parametrize(
    "settings",
    [
        {"font.size": 18},
        {"image.origin": "lower"},
        {"savefig.bbox": "tight"},
        {"savefig.transparent": True},
        {"savefig.facecolor": "black", "text.color": "white"},
        {"figure.dpi": 50, "savefig.dpi": 50},
    ],
)
def test_what_is_set_in_between_is_set_for_the_whole_picture(store, runs, settings):
    grid = pk.Grid(sparsity=[0.3, 0.5])
    pk.sweep(grid, store=store, progress=False)
    explorer = pk.SparsityExplorer(grid, store=store, background=False)
    with matplotlib.rc_context(settings):
        explorer.show(0.3, "none")
        assert explorer.picture.value == explorer.figure().png()
    explorer.show(0.5, "none")
    assert explorer.picture.value == explorer.figure().png()


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
        explorer.sparsity.value = SPARSITIES[(7 * move + 1) % len(SPARSITIES)]
    explorer.sparsity.value = 0.35
    assert explorer.wait(SOON)
    assert words(explorer) == "35 %: perplexity 2.00 dense → 5.50 pruned"
    assert explorer.picture.value == explorer.figure().png()
    assert [text.get_text() for text in explorer.figure().axes[0].texts] == ["5.50"]


def test_hands_in_many_threads_leave_one_consistent_point(store, runs):
    explorer = pk.SparsityExplorer(pk.Grid(sparsity=[0.5], retrain=["none", "biases"]), store=store)

    def move(offset):
        for step in range(10):
            explorer.show(SPARSITIES[(step * offset) % 19], ["none", "biases"][step % 2])

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
