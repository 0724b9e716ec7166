"""The soup explorer: what it says of a point is what the calls give, and nothing is computed twice."""

import copy
import re
import threading

import pytest
import torch
from explorer_parts import SOON, words

import perpkit as pk
from perpkit.interactive.explorers import soups
from perpkit.interactive.explorers.soups import OWN, SoupExplorer
from perpkit.retraining.soups.comparison import held_out

SAID = re.compile(r"loss ([\d.]+), accuracy ([\d.]+) %, sparsity ([\d.]+) %")


@pytest.fixture(scope="module")
def explorer():
    return SoupExplorer(steps=3, background=False)


@pytest.fixture(scope="module")
def candidates():
    """The three by hand, and the test text."""
    dense, tokenizer = pk.load_model("tiny-opt")
    text = pk.load_text("storyworld", tokenizer, windows={"train": 256, "test": 32})
    masks = pk.prune(dense, "magnitude", sparsity=0.7)
    models = [copy.deepcopy(dense) for _ in range(3)]
    for seed, model in enumerate(models):
        told = {"masks": masks, "subset": "full", "steps": 3, "lr": 3e-3, "seed": seed, "progress": False}
        pk.retrain(model, text.train, **told)
    return models, text.test


def numbers(explorer) -> list[float]:
    found = SAID.search(words(explorer))
    assert found, words(explorer)
    return [float(value) for value in found.groups()]


@pytest.mark.parametrize("shares", [[0.4, 0.1, 0.5], [1, 0, 0], [0, 1, 0], [0, 0, 1]], ids=str)
def test_a_point_is_the_weighted_average(explorer, candidates, shares):
    models, test = candidates
    up = shares[2]
    explorer.show(0 if up == 1 else shares[1] / (1 - up), up)
    mixture = pk.average(models, weights=shares)
    expected = -held_out(test, 64)(mixture), 100 * pk.token_accuracy(mixture, test), 70
    assert numbers(explorer) == pytest.approx(expected, abs=0.051)
    assert numbers(explorer)[0] == pytest.approx(expected[0], abs=6e-4)
    assert explorer.error is None


def test_an_edge_shows_its_barrier(explorer, candidates):
    models, test = candidates
    explorer.show(view="edge A–C")
    score = held_out(test, 64)
    table = pk.segment(models[0], models[2], lambda model: -score(model), points=9)
    assert words(explorer).endswith(f"barrier of edge A–C: {pk.barrier(table):.4f}")
    drawn = explorer.figure().table
    assert drawn["loss"].tolist() == pytest.approx(table["loss"].tolist(), rel=1e-5)
    explorer.show(view="triangle")
    table = explorer.figure().table
    assert len(table) == 9 * 9 + 3
    # What it is of.
    assert table[["parent", "sparsity", "masks"]].drop_duplicates().values.tolist() == [
        ["tiny-opt", 0.7, soups.COMMON]
    ]
    assert "tiny-opt pruned to 70 %, one mask for all" in explorer.figure().get_supxlabel()


def test_masks_of_their_own_do_not_survive_the_average(explorer):
    explorer.show(0.5, 1 / 3, masks=OWN)
    sparsity = numbers(explorer)[2]
    assert sparsity == pytest.approx(100 * 0.7**3, abs=1.5)
    assert words(explorer).endswith("(each of the three: 70.0 %)")
    explorer.show(0, 0)
    assert numbers(explorer)[2] == pytest.approx(70, abs=0.1)
    explorer.show(masks=soups.COMMON)
    assert numbers(explorer)[2] == pytest.approx(70, abs=0.1)


def test_nothing_is_retrained_twice(explorer, monkeypatch):
    explorer.show(0.5, 0.5, sparsity=0.7, masks=soups.COMMON)
    monkeypatch.setattr(soups, "retrain", lambda *_, **__: pytest.fail("retrained again"))
    monkeypatch.setattr(soups, "plane", lambda *_, **__: pytest.fail("drawn again"))
    before = bytes(explorer.picture.value)
    explorer.show(0.1, 0.1)
    assert explorer.error is None
    assert bytes(explorer.picture.value) != before


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"sparsity": 0.55}, "sparsity is 0.55; the explorer offers 0.5, 0.6"),
        ({"masks": "none"}, "masks is 'none'; the explorer offers one mask for all, a mask for each"),
        ({"along": 1.5}, "along is 1.5; the explorer offers 0 to 1"),
        ({"up": float("nan")}, "up is nan; the explorer offers 0 to 1"),
    ],
    ids=str,
)
def test_what_is_not_offered_is_refused(explorer, asked, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        explorer.show(**asked)


def test_cancel_stops_the_retraining_and_a_new_choice_starts_it_again():
    explorer = SoupExplorer(steps=100_000)
    try:
        while "retraining A" not in words(explorer):
            threading.Event().wait(0.05)
        explorer.cancel.click()
        assert explorer.wait(SOON)
        assert words(explorer) == "cancelled; what was finished before is kept"
        with pytest.raises(ValueError, match="what was asked for last was stopped"):
            explorer.figure()
        explorer.again.click()
        assert not explorer.cancel.disabled
    finally:
        explorer.cancel.click()
        assert explorer.wait(SOON)


@pytest.mark.slow
def test_images_have_their_statistics_re_estimated():
    """Averaged batch statistics do not fit averaged weights."""
    explorer = SoupExplorer("shapes-resnet", steps=2, background=False)
    loss, accuracy, sparsity = numbers(explorer)
    assert sparsity == pytest.approx(70, abs=0.1)
    assert accuracy > 60
    assert loss < 2
    assert torch.isfinite(torch.tensor(explorer.figure().table["loss"].to_numpy())).all()
