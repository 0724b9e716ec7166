"""Sparse Model Soups: pruning, retrained copies and averages by turns, for images and language."""

import copy

import pytest
import torch
from soup_parts import TOKENS, cook, same_soup, same_tensors

import perpkit as pk
from perpkit.retraining.iterative import geometric_sparsities, imp
from perpkit.retraining.soups.average import average, greedy
from perpkit.retraining.soups.comparison import held_out


@pytest.fixture
def pictures(images):
    """Images and their classes."""
    return torch.cat([images, -images]), torch.arange(10)


def by_hand(model, data, cycles, settings, choose=None):
    """The algorithm as the paper says it, with what each candidate is told: settings[cycle][candidate]."""
    masks = None
    for sparsity, told in zip(geometric_sparsities(0.7, cycles), settings, strict=True):
        masks = pk.prune(model, "magnitude", sparsity=sparsity, masks=masks, progress=False)
        copies = [copy.deepcopy(model) for _ in told]
        for each, options in zip(copies, told, strict=True):
            pk.retrain(each, data, masks=masks, progress=False, **options)
        model = average(copies, masks) if choose is None else choose(copies, masks)
        if isinstance(data, tuple):
            pk.recalibrate_batchnorm(model, data[0], batch=4)
    return model, masks


@pytest.mark.parametrize(
    ("vary", "name", "values"),
    [
        ("seed", "seed", [[7, 8, 9], [10, 11, 12]]),
        ({"seed": [3, 9, 4]}, "seed", [[3, 9, 4], [10, 16, 11]]),
        ("lr", "lr", [[0.005, 0.01, 0.02]] * 2),
        ("weight_decay", "weight_decay", [[0.05, 0.1, 0.2]] * 2),
        ("steps", "steps", [[2, 4, 6]] * 2),
        ({"lr": [0.1, 1e-3, 0.02]}, "lr", [[0.1, 1e-3, 0.02]] * 2),
    ],
    ids=str,
)
def test_it_is_the_papers_algorithm(make_vision, pictures, vary, name, values):
    """One thing differs between candidates; batch normalisations are re-estimated for each average."""
    dense = make_vision("sequential")
    before = copy.deepcopy(dense)
    soup = cook(dense, pictures, vary=vary, seed=7, steps=4)
    base = {"subset": "full", "steps": 4, "lr": 1e-2, "batch": 4, "optimizer": "sgd", "weight_decay": 0.1}
    told = [[{**base, "seed": 7 + cycle, name: value} for value in each] for cycle, each in enumerate(values)]
    expected, masks = by_hand(copy.deepcopy(dense), pictures, 2, told)
    assert same_tensors(soup.model, expected)
    assert all(torch.equal(soup.masks[layer], masks[layer]) for layer in masks)
    soup.masks.check(soup.model)
    assert soup.masks.sparsity() == pytest.approx(0.7, abs=1e-3)
    assert same_tensors(dense, before)
    assert soup.candidates[name].tolist() == [*values[0], *values[1]]
    assert soup.candidates["chosen"].all()
    assert soup.cycles == 2


def test_language_models_and_what_is_told(any_model, windows, generators_unchanged):
    """All candidates share the masks in every architecture; rows and cycles are told as they are done."""
    rows, cycles = [], []

    def look(cycle):
        cycle.masks.check(cycle.model)
        cycles.append((cycle.cycle, cycle.cycles, cycle.masks.sparsity(), cycle.chosen))

    soup = cook(any_model, windows, m=2, on_candidate=rows.append, on_cycle=look)
    soup.masks.check(soup.model)
    assert soup.masks.sparsity() == pytest.approx(0.7, abs=2e-3)
    assert [(row["cycle"], row["candidate"]) for row in rows] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    assert [row["loss"] for row in rows] == soup.candidates["loss"].tolist()
    assert (soup.candidates["seconds"] > 0).all()
    assert [(cycle, of, chosen) for cycle, of, _, chosen in cycles] == [(1, 2, [1, 2]), (2, 2, [1, 2])]
    assert cycles[0][2] == pytest.approx(1 - 0.3**0.5, abs=2e-3)
    assert soup.history.groupby(["cycle", "candidate"])["step"].apply(list).tolist() == [[1, 2, 3]] * 4
    assert len(soup.comparison) == 0


@pytest.mark.parametrize("language", [True, False])
def test_one_candidate_is_iterative_pruning(make_model, make_vision, windows, pictures, language):
    """To the bit, with the statistics of batch normalisations as training left them."""
    dense, data = (make_model("opt", dropout=0.1), windows) if language else (make_vision("cifar"), pictures)
    settings = {"sparsity": 0.7, "cycles": 2, "seed": 4, **TOKENS}
    soup = cook(
        dense, data, m=1, **({} if language else {"optimizer": "adamw", "weight_decay": 0}), **settings
    )
    masks, history = imp(dense, "magnitude", data, progress=False, **settings)
    assert same_tensors(soup.model, dense)
    assert all(torch.equal(soup.masks[name], mask) for name, mask in masks.items())
    assert soup.history["loss"].tolist() == history["loss"].tolist()


def test_the_seed_decides(make_model, windows):
    dense = make_model("opt", dropout=0.1)
    one, two, other = (cook(dense, windows, seed=seed) for seed in (1, 1, 2))
    assert same_soup(one, two)
    assert not same_tensors(one.model, other.model)


def test_criteria_with_calibration(make_model, windows):
    options = {"calibration": windows, "pruning": {"group": "layer"}}
    soup = pk_sms("wanda", make_model("llama"), windows, **options)
    masks, _ = imp(
        make_model("llama"), "wanda", windows, sparsity=0.6, cycles=1, progress=False, **options, **TOKENS
    )
    assert all(torch.equal(soup.masks[name], mask) for name, mask in masks.items())


def pk_sms(criterion, model, data, **options):
    from perpkit.retraining.soups.sms import sms

    return sms(model, criterion, data, sparsity=0.6, m=2, cycles=1, progress=False, **options, **TOKENS)


@pytest.mark.parametrize("given", ["score", "validation"])
def test_greedy_soups(make_vision, pictures, given):
    """Held-out data or a score of one's own; one candidate is so bad that it is left out."""
    dense = make_vision("sequential")
    held = pictures[0] + 0.1, pictures[1]
    options = {"score": held_out(held, 4)} if given == "score" else {"validation": held}
    vary = {"lr": [1e-4, 5.0, 1e-3]}
    soup = cook(dense, pictures, vary=vary, soup="greedy", cycles=1, **options)
    base = {"subset": "full", "steps": 3, "batch": 4, "optimizer": "sgd", "weight_decay": 0.1, "seed": 0}
    chosen, scores = [], []

    def choose(copies, masks):
        found, *rest = greedy(
            copies, held_out(held, 4), masks, lambda m: pk.recalibrate_batchnorm(m, pictures[0], batch=4)
        )
        chosen.extend(rest[0])
        scores.extend(rest[1])
        return found

    told = [[{**base, "lr": lr} for lr in vary["lr"]]]
    expected, _ = by_hand(copy.deepcopy(dense), pictures, 1, told, choose)
    assert same_tensors(soup.model, expected)
    assert soup.candidates["chosen"].tolist() == [i in chosen for i in range(3)]
    assert 1 not in chosen
    assert soup.candidates["score"].tolist() == scores


def test_a_held_out_score_is_minus_the_loss(make_vision, pictures, make_model, windows):
    model = make_vision("sequential")
    model.train()
    score = held_out(pictures, batch=3)(model)
    assert model.training
    model.eval()
    logits = model(pictures[0])
    assert score == pytest.approx(-torch.nn.functional.cross_entropy(logits, pictures[1]).item(), rel=1e-5)
    model = make_model("opt")
    logits = model(windows).logits[:, :-1].flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, windows[:, 1:].flatten()).item()
    assert held_out(windows, batch=5)(model) == pytest.approx(-loss, rel=1e-5)


@pytest.mark.parametrize("subset", ["head", "biases+norms", "embeddings"])
def test_subsets_and_heads_that_are_tied(tiny_opt, text, subset):
    """What must be untied is untied in the soup, and the caller's model is as it was."""
    before = copy.deepcopy(tiny_opt)
    soup = cook(tiny_opt, text.train[:8], subset=subset, m=2, cycles=1, steps=2)
    assert same_tensors(tiny_opt, before)
    assert tiny_opt.lm_head.weight is tiny_opt.model.decoder.embed_tokens.weight
    tied = soup.model.lm_head.weight is soup.model.model.decoder.embed_tokens.weight
    assert tied == (subset == "biases+norms")
    by_itself = copy.deepcopy(before)
    masks = pk.prune(by_itself, "magnitude", sparsity=0.7, progress=False)
    copies = [copy.deepcopy(by_itself) for _ in range(2)]
    for seed, each in enumerate(copies):
        settings = {**TOKENS, "subset": subset, "steps": 2, "seed": seed, "progress": False}
        pk.retrain(each, text.train[:8], masks=masks, **settings)
    assert same_tensors(soup.model, average(copies, masks))


def moved(images, generator):
    return images + torch.rand(len(images), 1, 1, 1, generator=generator)


def test_the_average_is_normalised_by_what_it_was_trained_on(make_vision, pictures):
    """Augmented inputs, whose statistics are others."""
    soup = cook(make_vision("sequential"), pictures, cycles=1, augment=moved).model
    again = copy.deepcopy(soup)
    seen = moved(pictures[0], torch.Generator().manual_seed(0))
    pk.recalibrate_batchnorm(again, seen, batch=4)
    assert same_tensors(soup, again)
    pk.recalibrate_batchnorm(again, pictures[0], batch=4)
    assert not same_tensors(soup, again)


def test_the_average_is_normalised_by_a_random_part_of_many_inputs(make_vision, pictures, monkeypatch):
    """Of data in the order of their classes the first would say nothing of the others."""
    inputs, labels = pictures
    first, second = inputs + 5, inputs - 5
    ordered = torch.cat([first, second]), torch.cat([labels, labels])
    monkeypatch.setattr("perpkit.retraining.soups.statistics.REESTIMATED", 8)
    dense = make_vision("sequential")
    soup = cook(dense, ordered, steps=2, cycles=1).model
    stem = next(module for module in soup.modules() if isinstance(module, torch.nn.Conv2d))
    statistics = next(module for module in soup.modules() if isinstance(module, torch.nn.BatchNorm2d))
    chosen = torch.randperm(20, generator=torch.Generator().manual_seed(0))[:8]
    assert {int(index) < 10 for index in chosen} == {True, False}
    with torch.no_grad():
        values = stem(ordered[0][chosen]).double().transpose(0, 1).flatten(1)
    assert torch.allclose(statistics.running_mean.double(), values.mean(1), atol=1e-5)
    assert torch.allclose(statistics.running_var.double(), values.var(1), rtol=1e-4)


@pytest.mark.parametrize("soup", ["uniform", "greedy"])
@pytest.mark.parametrize("subset", ["head", "lora"])
def test_frozen_statistics_stay_those_that_the_weights_were_trained_to(make_vision, pictures, subset, soup):
    dense = make_vision("sequential")
    adapter = {"adapter": "mask_lora", "rank": 2} if subset == "lora" else {}
    made = cook(dense, pictures, subset=subset, m=2, soup=soup, validation=pictures, **adapter).model
    norms = [name for name, module in dense.named_modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert norms
    for name in norms:
        before, after = dense.get_submodule(name).state_dict(), made.get_submodule(name).state_dict()
        assert all(torch.equal(value, after[key]) for key, value in before.items()), name
    assert not same_tensors(made, dense)
