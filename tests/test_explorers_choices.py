"""The sparsity explorer without a browser: criteria, patterns, accuracy, published numbers, the rows."""

import pandas as pd
import pytest
from explorer_parts import SOON, Runs, made_row, shown, words

import perpkit as pk
from perpkit.experiments import run as running
from perpkit.interactive.explorers import points
from perpkit.interactive.explorers.choices import Choice, Choices

BOTH = {"criterion": ["magnitude", "wanda"], "sparsity": [0.3, 0.5], "retrain": ["none", "biases"]}


@pytest.fixture
def store(tmp_path) -> pk.Store:
    return pk.Store(tmp_path / "results.sqlite")


@pytest.fixture
def runs(monkeypatch) -> Runs:
    runs = Runs()
    monkeypatch.setattr(running, "run", runs)
    return runs


def labels(axes) -> dict:
    return {line.get_label().partition(" (")[0]: line for line in axes.get_lines()}


# --- criterion and pattern ------------------------------------------------------------------------


def test_a_criterion_is_chosen_and_its_curves_are_drawn(store, runs):
    grid = pk.Grid(**BOTH)
    pk.sweep(grid, store=store, progress=False)
    explorer = pk.SparsityExplorer(grid, store=store)
    runs.clear()
    assert explorer.criterion.options == ("magnitude", "wanda")
    explorer.criterion.value = "wanda"
    assert explorer.wait(SOON)
    assert words(explorer) == "wanda, 50 %: perplexity 2.00 dense → 7.00 pruned"
    assert runs == []
    table = explorer.figure().table
    assert set(table["criterion"]) == {"wanda"}
    assert sorted(table["sparsity"]) == [0.3, 0.3, 0.5, 0.5]
    assert explorer.picture.value == explorer.figure().png()


def test_a_missing_point_is_run_with_the_chosen_criterion(store, runs):
    explorer = pk.SparsityExplorer(pk.Grid(criterion=["magnitude", "random"], seed=[4, 5]), store=store)
    explorer.show(0.6, "none", criterion="random")
    assert explorer.wait(SOON)
    assert words(explorer) == "random, 60 %: perplexity 2.00 dense → 8.40 pruned"
    assert [(e.criterion, e.sparsity, e.seed) for e in runs][-1] == ("random", 0.6, 4)


def test_a_pattern_says_the_sparsity_and_stands_beside_the_curves(store, runs):
    grid = pk.Grid(pattern=[None, "2:4", "1:4"], sparsity=[0.3, 0.5], retrain=["none", "biases"])
    pk.sweep(grid, store=store, progress=False)
    explorer = pk.SparsityExplorer(grid, store=store)
    assert explorer.pattern.options == ("unstructured", "2:4", "1:4")
    assert not explorer.sparsity.disabled
    explorer.show(0.3, "biases")
    explorer.show(pattern="1:4")
    assert explorer.wait(SOON)
    assert words(explorer).startswith(
        "1:4: perplexity 2.00 dense → 9.50 pruned → 2.75 after retraining biases"
    )
    assert explorer.sparsity.disabled
    figure = explorer.figure()
    drawn = labels(figure.axes[0])
    assert drawn["none"].get_xdata().tolist() == [0.3, 0.5]
    assert drawn["none, 1:4"].get_xdata().tolist() == [0.75]
    assert "none, 2:4" not in drawn
    # The table behind it has the rows as they are.
    assert set(figure.table["retrain"]) == {"none", "biases"}
    assert set(figure.table["pattern"].dropna()) == {"1:4"}
    explorer.pattern.value = "unstructured"
    assert explorer.wait(SOON)
    assert words(explorer).startswith("30 %: ")
    assert not explorer.sparsity.disabled


def test_a_grid_of_patterns_alone_has_no_sparsity_to_choose(store, runs):
    explorer = pk.SparsityExplorer(pk.Grid(pattern=["2:4", "4:8"]), store=store)
    assert explorer.wait(SOON)
    assert words(explorer) == "2:4: perplexity 2.00 dense → 7.00 pruned"
    assert explorer.sparsity.disabled
    assert [(e.pattern, e.sparsity) for e in runs] == [("2:4", 0.5)]


def test_controls_without_a_choice_are_hidden(store, runs):
    explorer = pk.SparsityExplorer(pk.Grid(sparsity=[0.5]), store=store)
    hidden = [each for each in (explorer.criterion, explorer.pattern) if each.layout.display == "none"]
    assert len(hidden) == 2
    assert explorer.retrain.layout.display is None
    assert pk.SparsityExplorer(pk.Grid(**BOTH), store=store).criterion.layout.display is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"criterion": "random"}, "criterion is 'random'; the explorer offers magnitude, wanda"),
        ({"pattern": "2:4"}, "pattern is '2:4'; the explorer offers unstructured"),
    ],
)
def test_what_is_not_offered_is_refused(store, runs, change, said):
    explorer = pk.SparsityExplorer(pk.Grid(**BOTH), store=store)
    with pytest.raises(ValueError, match=f"^{said}$"):
        explorer.show(0.5, "none", **change)


def test_a_sparsity_beside_a_pattern_is_refused(store, runs):
    explorer = pk.SparsityExplorer(pk.Grid(pattern=[None, "2:4"]), store=store)
    explorer.show(0.5, pattern="2:4")
    for sparsity in (0.6, "60 %"):
        with pytest.raises(
            ValueError, match=r"sparsity is 0\.6, but the pattern is 2:4, which is 0\.5; give"
        ):
            explorer.show(sparsity)
    assert explorer.wait(SOON)
    assert words(explorer).startswith("2:4: ")
    explorer.show(0.6, pattern="unstructured")
    assert explorer.wait(SOON)
    assert words(explorer).startswith("60 %: ")


def test_the_sparsity_of_a_pattern_need_not_be_on_the_slider(store, runs):
    explorer = pk.SparsityExplorer(pk.Grid(pattern=["5:8", "1:3"]), store=store)
    explorer.show(2 / 3, pattern="1:3")
    assert explorer.wait(SOON)
    assert words(explorer).startswith("1:3: ")
    # There is no other way to offer.
    with pytest.raises(ValueError, match=r"which is 0\.666667$"):
        explorer.show(0.5)


def test_a_sparsity_that_was_computed_is_found(store, runs):
    explorer = pk.SparsityExplorer(pk.Grid(sparsity=[0.5]), store=store)
    explorer.show(0.1 + 0.2)
    assert explorer.wait(SOON)
    assert words(explorer).startswith("30 %: ")
    assert runs[-1].sparsity == 0.3
    explorer.show("60 %")
    assert explorer.wait(SOON)
    assert words(explorer).startswith("60 %: ")


def test_show_asks_once(store, runs):
    explorer = pk.SparsityExplorer(pk.Grid(**BOTH), store=store, background=False)
    runs.clear()
    explorer.show(0.7, "biases", criterion="wanda")
    assert [(e.criterion, e.sparsity, e.retrain) for e in runs] == [
        ("wanda", 0.7, "none"),
        ("wanda", 0.7, "biases"),
    ]


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        ({"retrain": "none"}, {"retrain": "biases", "model": "tiny-opt-outliers"}, "'model'"),
        ({"retrain": "none"}, {"retrain": "biases", "unit": "matrix"}, "'unit'"),
        ({"retrain": "none"}, {"retrain": "none", "tasks": "recall"}, "'tasks'"),
        ({"retrain": "norms", "rank": 3}, {"retrain": "mask_lora", "rank": 4}, None),
        ({"retrain": "mask_lora", "rank": 3}, {"retrain": "mask_lora", "rank": 4}, "'rank'"),
    ],
)
def test_what_is_mixed_between_retrainings_is_refused(first, second, said):
    grid = pk.Grid(**first) + pk.Grid(**second)
    if said is None:
        assert Choices(grid).retrainings == ["none", first["retrain"], second["retrain"]]
    else:
        with pytest.raises(ValueError, match=f"one value of {said} at a time"):
            Choices(grid)


# --- accuracy -------------------------------------------------------------------------------------


def test_accuracy_stands_beside_the_perplexity(store, runs):
    grid = pk.Grid(sparsity=[0.5], retrain=["none", "biases"], tasks="recall")
    explorer = pk.SparsityExplorer(grid, store=store)
    said = shown(explorer, 0.5, "biases")
    assert said.endswith("; accuracy 95.0 % → 65.0 % → 87.5 %")
    left, right = explorer.figure().axes
    assert [text.get_text() for text in left.texts] == ["7.00", "2.50"]
    assert [text.get_text() for text in right.texts] == ["65.0 %", "87.5 %"]
    assert shown(explorer, 0.5).endswith("; accuracy 95.0 % → 65.0 %")


def test_without_tasks_there_is_one_panel_and_no_word_of_accuracy(store, runs):
    explorer = pk.SparsityExplorer(pk.Grid(sparsity=[0.5]), store=store)
    assert "accuracy" not in shown(explorer, 0.5)
    assert len(explorer.figure().axes) == 1


# --- published numbers ----------------------------------------------------------------------------


def test_published_numbers_are_drawn_when_asked_for(store, runs):
    grid = pk.Grid(model="facebook/opt-2.7b", text="wikitext2", retrain=["none", "biases"], sparsity=[0.5])
    explorer = pk.SparsityExplorer(grid, store=store)
    shown(explorer, 0.5)
    assert explorer.compare.layout.display is None
    before = explorer.picture.value
    assert "biases, published" not in labels(explorer.figure().axes[0])
    explorer.compare.value = True
    assert explorer.wait(SOON)
    assert explorer.picture.value != before
    drawn = labels(explorer.figure().axes[0])
    assert drawn["biases, published"].get_ydata().tolist() == [13.58, 14.84, 16.86, 22.07, 39.57]
    assert drawn["PERP, published"].get_xdata().tolist() == [0.3, 0.4, 0.5, 0.6, 0.7]


def test_published_points_of_a_pattern_stand_at_its_sparsity(store, runs):
    grid = pk.Grid(model="facebook/opt-2.7b", text="wikitext2", pattern=["2:4"])
    explorer = pk.SparsityExplorer(grid, store=store)
    explorer.compare.value = True
    assert explorer.wait(SOON)
    drawn = labels(explorer.figure().axes[0])
    assert drawn["none, 2:4, published"].get_xydata().tolist() == [[0.5, 1152.92]]
    assert drawn["PERP, 2:4, published"].get_xydata().tolist() == [[0.5, 18.23]]


def test_a_model_of_no_paper_has_nothing_to_compare(store, runs):
    explorer = pk.SparsityExplorer(pk.Grid(sparsity=[0.5]), store=store)
    assert explorer.compare.layout.display == "none"


# --- the rows -------------------------------------------------------------------------------------


def test_the_rows_behind_the_curves_are_a_folded_table(store, runs):
    grid = pk.Grid(sparsity=[0.3, 0.5], retrain=["none", "biases"], seed=[0, 1])
    pk.sweep(grid, store=store, progress=False)
    explorer = pk.SparsityExplorer(grid, store=store)
    assert explorer.wait(SOON)
    assert explorer.rows.selected_index is None
    assert explorer.rows.titles == ("rows behind the curves (6)",)
    assert "● " not in explorer.table.value
    shown(explorer, 0.35)
    assert explorer.rows.titles == ("rows behind the curves (7)",)
    [newest] = [line for line in explorer.table.value.split("<tr>") if "● " in line]
    assert "35 %" in newest
    assert "5.500" in newest


def test_what_rows_hold_is_escaped():
    row = {**made_row(pk.Experiment()), "criterion": "<img src=x onerror=alert(1)>"}
    table = points.rows_table([row], None)
    assert "<img" not in table
    assert "&lt;img src=x" in table


def test_a_long_table_is_cut_and_says_so():
    rows = [made_row(pk.Experiment(sparsity=i / 1000)) for i in range(points.MOST_ROWS + 5)]
    table = points.rows_table(rows, rows[0])
    assert table.count("<tr>") == points.MOST_ROWS + 1
    assert "and 5 more" in table


def test_nothing_is_said_of_a_point_that_is_not_there():
    table = pd.DataFrame([made_row(pk.Experiment(sparsity=0.5))])
    assert points.result(table, Choice(0.7, "none", "magnitude", "unstructured")) == ""
