"""What a soup is compared with on the same budget, and soups of adapter retrainings."""

import copy
import pickle

import pytest
import torch
from soup_parts import TOKENS, cook, same_tensors

import perpkit as pk
from perpkit.retraining.iterative import imp
from perpkit.retraining.soups.average import average
from perpkit.retraining.soups.candidates import VARIED
from perpkit.retraining.soups.comparison import BASELINES
from perpkit.retraining.soups.ensemble import Ensemble

IMP = {"sparsity": 0.7, "cycles": 2, "progress": False}


def retrained(soup, dense, data):
    """The candidates of the only cycle, made anew from their rows."""
    models = []
    for row in soup.candidates.to_dict("records"):
        model = copy.deepcopy(dense)
        masks = pk.prune(model, "magnitude", sparsity=0.7, progress=False)
        varied = {name: row[name] for name in VARIED}
        pk.retrain(model, data, masks=masks, progress=False, **{**TOKENS, **varied})
        models.append(model)
    return models


@pytest.mark.parametrize("vary", ["lr", {"steps": [2, 5, 4]}], ids=str)
def test_iterative_baselines_have_the_same_budget(make_model, windows, vary):
    """IMP takes the steps of one candidate a cycle, IMP of m times those of all of them."""
    dense, seen = make_model("opt", dropout=0.1), []

    def evaluate(model):
        seen.append(copy.deepcopy(model))
        return len(seen)

    soup = cook(dense, windows, vary=vary, seed=3, evaluate=evaluate, baselines=["imp", "imp_m"])
    together = soup.candidates.groupby("cycle")["steps"].sum().tolist()
    assert together[0] == together[1]
    assert soup.comparison[["method", "score", "steps"]].values.tolist() == [
        ["sms", 1, sum(together)],
        ["imp", 2, 2 * 3],
        ["imp_m", 3, sum(together)],
    ]
    assert same_tensors(seen[0], soup.model)
    for model, steps in ((seen[1], 3), (seen[2], together[0])):
        expected = copy.deepcopy(dense)
        imp(expected, "magnitude", windows, seed=3, **IMP, **{**TOKENS, "steps": steps})
        assert same_tensors(model, expected)
    assert soup.comparison["seconds"][0] >= soup.candidates["seconds"].sum()
    assert soup.comparison["seconds"].min() > 0


def test_baselines_of_the_last_candidates(make_model, windows):
    dense = make_model("opt")
    seen = {}

    def evaluate(model):
        return float(pk.perplexity(model, windows))

    def score(model):
        # Likes the second candidate best.
        seen[len(seen)] = copy.deepcopy(model)
        return [1.0, 7.0, 3.0][len(seen) - 1]

    names = ["best", "mean", "ensemble"]
    soup = cook(dense, windows, cycles=1, evaluate=evaluate, score=score, baselines=names)
    models = retrained(soup, dense, windows)
    found = soup.comparison.set_index("method")
    alone = [evaluate(model) for model in models]
    assert found.loc["sms", "score"] == evaluate(average(models, soup.masks))
    assert found.loc["best", "score"] == alone[1]
    assert found.loc["mean", "score"] == pytest.approx(sum(alone) / 3, rel=1e-12)
    assert found.loc["ensemble", "score"] == evaluate(Ensemble(models))
    assert all(same_tensors(seen[i], model) for i, model in enumerate(models))
    assert set(found["steps"]) == {9}
    assert found["seconds"].nunique() == 1


def test_all_of_them_for_images(make_vision, images):
    """The held-out score measures when nothing else is given; an ensemble beats its mean member."""
    data = torch.cat([images, -images]), torch.arange(10)
    soup = cook(make_vision("sequential"), data, validation=data, baselines=BASELINES)
    found = soup.comparison.set_index("method")["score"]
    assert list(found.index) == ["sms", *BASELINES]
    assert found["ensemble"] >= found["mean"]
    assert found["best"] >= found["mean"]
    # It can be sent to a class: everything in it pickles.
    assert same_tensors(pickle.loads(pickle.dumps(soup)).model, soup.model)


# --- adapters -------------------------------------------------------------------------------------


@pytest.mark.parametrize("vary", ["seed", "lr"])
def test_masklora_soups(tiny_opt, text, vary):
    """Several MaskLoRA retrainings of one pruned model, merged and averaged: sparse, and no adapters left."""
    before = copy.deepcopy(tiny_opt)
    settings = {"subset": "lora", "steps": 3, "lr": 1e-2, "batch": 4}
    adapter = {"rank": 4, "alpha": 8.0}
    soup = cook(tiny_opt, text.train[:16], vary=vary, cycles=1, adapter="mask_lora", **adapter, **settings)
    assert same_tensors(tiny_opt, before)
    assert not any("lora_" in name for name, _ in soup.model.named_parameters())
    soup.masks.check(soup.model)
    assert soup.masks.sparsity() == pytest.approx(0.7, abs=1e-4)
    copies = []
    for i in range(3):
        model = copy.deepcopy(before)
        masks = pk.prune(model, "magnitude", sparsity=0.7, progress=False)
        seed, lr = (i, 1e-2) if vary == "seed" else (0, [5e-3, 1e-2, 2e-2][i])
        pk.attach(model, masks, "mask_lora", seed=seed, **adapter)
        told = {**settings, "seed": seed, "lr": lr}
        pk.retrain(model, text.train[:16], masks=masks, progress=False, **told)
        pk.merge(model)
        copies.append(model)
    assert same_tensors(soup.model, average(copies, masks))


def test_adapters_over_cycles_and_in_the_baselines(tiny_opt, text):
    settings = {
        "subset": "lora+biases",
        "steps": 2,
        "lr": 1e-2,
        "batch": 4,
        "adapter": "mask_lora",
        "rank": 2,
    }
    soup = cook(
        tiny_opt,
        text.train[:8],
        m=2,
        baselines=["imp", "imp_m", "ensemble"],
        evaluate=lambda model: pk.perplexity(model, text.test),
        **settings,
    )
    soup.masks.check(soup.model)
    assert soup.masks.sparsity() == pytest.approx(0.7, abs=1e-4)
    assert soup.comparison["steps"].tolist() == [8, 4, 8, 8]
    assert (soup.comparison["score"] > 1).all()
