"""What a soup is compared with has batch statistics of the same kind, and what a soup hands out."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from soup_parts import IMAGES, cook, same_tensors
from torch import nn

import perpkit as pk
from perpkit.retraining.iterative import imp
from perpkit.retraining.soups import sms as module
from perpkit.retraining.soups.average import average
from perpkit.retraining.soups.comparison import BASELINES, held_out
from perpkit.retraining.soups.ensemble import Ensemble


@pytest.fixture
def pictures(images):
    """Images and their classes."""
    return torch.cat([images, -images]), torch.arange(10)


@pytest.fixture
def dense(make_vision):
    return make_vision("sequential")


class Looks:
    """An evaluation that keeps what it has measured."""

    def __init__(self, data):
        self.score, self.seen = held_out(data, 4), []

    def __call__(self, model):
        self.seen.append(copy.deepcopy(model))
        return self.score(model)


def renewed(model, pictures):
    model = copy.deepcopy(model)
    pk.recalibrate_batchnorm(model, pictures[0], batch=4)
    return model


def test_all_are_scored_with_statistics_of_one_kind(dense, pictures):
    """After few steps running averages still hold much of the dense model's statistics."""
    looks = Looks(pictures)
    soup = cook(dense, pictures, evaluate=looks, score=held_out(pictures, 4), baselines=BASELINES)
    members = [renewed(model, pictures) for model in soup.models]
    expected = [soup.model]
    for steps in (3, 9):
        iterated = copy.deepcopy(dense)
        options = {**IMAGES, "steps": steps, "progress": False}
        imp(iterated, "magnitude", pictures, sparsity=0.7, cycles=2, **options)
        expected.append(renewed(iterated, pictures))
        assert not same_tensors(expected[-1], iterated)
    expected += [*members, Ensemble(members)]
    assert len(looks.seen) == len(expected)
    assert all(same_tensors(*pair) for pair in zip(looks.seen, expected, strict=True))
    found = soup.comparison.set_index("method")["score"]
    alone = [looks.score(model) for model in members]
    assert found[["best", "mean"]].tolist() == [max(alone), pytest.approx(sum(alone) / 3, rel=1e-12)]


def test_the_best_is_that_of_a_greedy_soups_table(dense, pictures):
    soup = cook(dense, pictures, vary="lr", soup="greedy", validation=pictures, baselines=["best"])
    last = soup.candidates[soup.candidates["cycle"] == 2]
    assert soup.comparison.set_index("method").loc["best", "score"] == last["score"].max()


@pytest.mark.parametrize("options", [{"m": 1}, {"subset": "head"}], ids=str)
def test_statistics_that_the_soup_keeps_are_everybodys(dense, pictures, options):
    """One candidate is iterative pruning to the bit; and a head was trained to frozen statistics."""
    looks = Looks(pictures)
    soup = cook(dense, pictures, cycles=1, evaluate=looks, baselines=["imp", "ensemble"], **options)
    iterated = copy.deepcopy(dense)
    told = {**IMAGES, **options, "progress": False}
    told.pop("m", None)
    imp(iterated, "magnitude", pictures, sparsity=0.7, cycles=1, **told)
    assert same_tensors(looks.seen[1], iterated)
    assert same_tensors(looks.seen[0], soup.model)
    assert same_tensors(looks.seen[2], Ensemble(soup.models))


# --- what it hands out ----------------------------------------------------------------------------


def test_its_candidates_and_their_parent(make_model, windows):
    dense = make_model("opt")
    soup = cook(dense, windows, cycles=1)
    parent = copy.deepcopy(dense)
    masks = pk.prune(parent, "magnitude", sparsity=0.7, progress=False)
    assert same_tensors(soup.parent, parent)
    for row, model in zip(soup.candidates.to_dict("records"), soup.models, strict=True):
        again = copy.deepcopy(parent)
        told = {"subset": "full", "batch": 4, "lr": 1e-3, "steps": 3, "seed": row["seed"]}
        pk.retrain(again, windows, masks=masks, progress=False, **told)
        assert same_tensors(model, again)
    assert same_tensors(average(soup.models, soup.masks), soup.model)
    assert (pk.distances(soup.models, soup.parent)["distance"] > 0).all()
    assert repr(soup) == f"Soup(1 cycle, 3 candidates, {soup.masks!r})"


def test_those_of_the_last_finished_cycle(make_model, windows):
    cancelled = []
    rows = {"on_candidate": lambda row: cancelled.append(row["cycle"] == 2)}
    soup = cook(make_model("opt"), windows, cancelled=lambda: any(cancelled), **rows)
    assert soup.cycles == 1
    assert same_tensors(average(soup.models, soup.masks), soup.model)
    soup = cook(make_model("opt"), windows, cancelled=lambda: True)
    assert (soup.models, soup.parent) == ([], None)


# --- what is refused, and the bar -----------------------------------------------------------------


@pytest.mark.parametrize("name", ["evaluate", "score"])
def test_a_score_that_is_no_function(dense, pictures, name):
    with pytest.raises(ValueError, match=rf"{name} is 0\.9; give a function of the model"):
        cook(dense, pictures, **{name: 0.9})


def test_a_score_that_gives_no_number(dense, pictures):
    for given, what in ((None, "NoneType"), ("high", "str"), (torch.zeros(2), "Tensor")):
        with pytest.raises(ValueError, match=f"returned a {what}; it must return one number"):
            cook(dense, pictures, cycles=1, m=1, steps=1, evaluate=lambda model, given=given: given)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_bar_moves_with_the_steps(dense, pictures, tmp_path, monkeypatch, workers):
    """With the candidates on an executor, and at once for what is found in the folder; never past its end."""
    bars = []

    class Bar(nn.Identity):
        def __init__(self, total, **options):
            super().__init__()
            self.total, self.moves = total, []
            bars.append(self)

        def update(self, steps):
            self.moves.append(steps)

        __enter__ = lambda self: self  # noqa: E731
        __exit__ = lambda self, *_: None  # noqa: E731

    monkeypatch.setattr(module, "tqdm", Bar)
    options = {"vary": "steps", "steps": 4, "baselines": ["imp"], "evaluate": lambda model: 0.0}
    if workers:
        with ThreadPoolExecutor(workers) as executor:
            cook(dense, pictures, folder=tmp_path, executor=executor, **options)
    else:
        cook(dense, pictures, folder=tmp_path, **options)
    cook(dense, pictures, folder=tmp_path, **options)
    assert [bar.total for bar in bars] == [2 * (2 + 4 + 6 + 4)] * 2
    assert [sum(bar.moves) for bar in bars] == [32, 32]
    if not workers:
        assert max(bars[0].moves) == 1
