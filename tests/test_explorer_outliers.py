"""The outlier explorer: the function stays, magnitude pruning collapses, Wanda does not move."""

import html
import re

import numpy as np
import pytest
import torch
from explorer_parts import SOON, words

import perpkit as pk
from perpkit.interactive.explorers import explorer as base
from perpkit.interactive.explorers import outliers as explored
from perpkit.interactive.explorers.outliers import DENSE, OutlierExplorer


@pytest.fixture(scope="module")
def finished():
    explorer = OutlierExplorer(strengths=[0, 1, 2], seeds=[0, 1])
    assert explorer.wait(SOON)
    assert explorer.error is None
    return explorer


def test_magnitude_collapses_and_wanda_does_not_move(finished):
    table = finished.figure().table
    assert len(table) == 3 * 2 * 3
    values = table.groupby(["criterion", "strength"], observed=True)["perplexity"].mean()
    for name in (DENSE, "wanda"):
        assert values[name].to_numpy() == pytest.approx(values[name, 0], rel=1e-4)
    assert values["magnitude", 1] > 2 * values["magnitude", 0]
    assert values["magnitude", 2] > 10 * values["magnitude", 0]
    # Logits of up to forty, in float32.
    assert table["logits_change"].max() < 1e-4
    assert table[table["strength"] == 0]["logits_change"].max() == 0


def test_the_numbers_are_those_of_a_cell(finished):
    model, tokenizer = pk.load_model("tiny-opt")
    text = pk.load_text("storyworld", tokenizer, windows={"train": 1, "calibration": 16, "test": 32})
    pk.plant_outliers(model, sigma=2, seed=1)
    dense = pk.perplexity(model, text.test)
    pk.prune(model, "magnitude", sparsity=0.5, progress=False)
    table = finished.figure().table.set_index(["strength", "seed", "criterion"])["perplexity"]
    assert table[2, 1, DENSE] == pytest.approx(dense)
    assert table[2, 1, "magnitude"] == pytest.approx(pk.perplexity(model, text.test))


def test_the_message_holds_the_means(finished):
    finished.show(2)
    assert finished.wait(SOON)
    means = finished.figure().table.groupby(["criterion", "strength"], observed=True)["perplexity"].mean()
    said = words(finished)
    assert said.startswith("σ = 2: the function is the same up to rounding")
    for name, called in ((DENSE, DENSE), ("magnitude", "magnitude"), ("wanda", "Wanda")):
        assert f"{called} {means[name, 0]:.2f} → {means[name, 2]:.2f}" in said
    assert said.endswith("(means of 2 seeds)")


def test_a_position_that_is_there_is_shown_without_computing(finished, monkeypatch):
    monkeypatch.setattr(finished, "_measured", None)
    for strength in (1, 0, 2):
        finished.show(strength)
        assert finished.wait(SOON)
        assert finished.error is None
        assert words(finished).startswith(f"σ = {strength}:")
        assert finished.picture.value == finished.figure().png()


def measured(point, cancelled):
    strength, sparsity, seed = point
    row = {"strength": strength, "seed": seed, "sparsity": sparsity, "logits_change": 0.0, "logits": 1.0}
    return [{**row, "criterion": name, "perplexity": 2 + strength + seed} for name in explored.CURVES]


def test_the_chosen_position_comes_first_and_its_neighbours_next(monkeypatch):
    asked = []
    monkeypatch.setattr(
        OutlierExplorer,
        "_measured",
        lambda self, point, cancelled: asked.append(point) or measured(point, cancelled),
    )
    explorer = OutlierExplorer(strengths=[0, 1, 2, 3], seeds=[0, 5], background=False)
    explorer.show(3)
    asked.clear()
    explorer.show(sparsity=0.6)
    assert [(strength, seed) for strength, sparsity, seed in asked if sparsity == 0.6][:4] == [
        (3, 0),
        (2, 0),
        (1, 0),
        (0, 0),
    ]
    assert [point for point in asked if point[1:] == (0.6, 5)] == [(s, 0.6, 5) for s in (3, 2, 1, 0)]
    assert len(asked) == len(set(asked))


def test_the_curves_fill_in(monkeypatch):
    monkeypatch.setattr(
        OutlierExplorer, "_measured", lambda self, point, cancelled: measured(point, cancelled)
    )
    pictures, told = [], []
    explorer = OutlierExplorer(strengths=[0, 1], seeds=[0], background=False)
    explorer.picture.observe(lambda change: pictures.append(change.new), names="value")
    explorer.message.observe(lambda change: told.append(change.new), names="value")
    explorer.show(sparsity=0.3)
    assert len(pictures) == 2
    assert sum("the other positions <progress" in each for each in told) == 1
    assert explorer.cancel.disabled


def test_cancel_stops_between_two_matrices_and_the_rest_comes_later(monkeypatch):
    monkeypatch.setattr(base, "SECONDS_BETWEEN_NEWS", 0)
    explorer = OutlierExplorer(strengths=[0, 1, 2], seeds=[0, 1])
    while "other positions" not in words(explorer):
        assert not explorer.wait(0.01)
    explorer.cancel.click()
    assert explorer.wait(5)
    assert words(explorer).startswith("cancelled")
    finished = len(explorer._rows)
    assert 1 <= finished < 6
    explorer.again.click()
    assert explorer.wait(SOON)
    assert len(explorer._rows) == 6


def test_an_error_is_told_escaped_and_tried_again(monkeypatch):
    explorer = OutlierExplorer(strengths=[0, 1], seeds=[0], background=False)

    def fail(*_, **__):
        raise RuntimeError("<b>no</b>")

    monkeypatch.setattr(explored, "plant_outliers", fail)
    explorer.show(sparsity=0.6)
    assert words(explorer) == "RuntimeError: <b>no</b>"
    assert html.escape("<b>no</b>") in explorer.message.value
    monkeypatch.undo()
    explorer.again.click()
    assert re.match("σ = 1: the function", words(explorer))


def test_the_dial_may_come_from_numpy_and_has_each_position_once():
    explorer = OutlierExplorer(strengths=np.array([2.0, 0.0, 2.0]), seeds=[0, 0], background=False)
    assert [value for _, value in explorer.strength.options] == [0.0, 2.0]
    assert len(explorer.figure().table) == 2 * 3


def test_what_is_not_offered_is_refused(finished):
    with pytest.raises(ValueError, match=r"strength is 9; the explorer offers 0, 1, 2"):
        finished.show(9)
    with pytest.raises(ValueError, match=r"sparsity is 0.99; the explorer offers 0.3, 0.4"):
        finished.show(sparsity=0.99)


def test_a_model_without_known_normalisations_is_told(make_model, monkeypatch):
    model, (_, tokenizer) = make_model("gpt2", vocab_size=1024, n_positions=128), pk.load_model("tiny-opt")
    monkeypatch.setattr(explored, "load_model", lambda name: (model, tokenizer))
    explorer = OutlierExplorer("mine", background=False)
    assert words(explorer) == "ValueError: cannot plant outliers in a 'gpt2' model; known are opt, llama"
    assert not any(p.grad is not None for p in model.parameters())
    assert torch.is_grad_enabled()
