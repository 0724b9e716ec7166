"""Pruning a model: exactly as many weights as asked for, the right ones, in any architecture."""

import copy
import math

import pytest
import torch
import transformers

from perpkit.pruning.layers import prunable_weights
from perpkit.pruning.masks import keep_highest
from perpkit.pruning.prune import prune


def snapshot(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def unchanged(model, before):
    return all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@torch.no_grad()
def test_every_architecture_loses_exactly_what_was_asked_and_still_runs(any_model, windows):
    dense = copy.deepcopy(any_model)
    masks = prune(any_model, "magnitude", sparsity=0.37)
    assert list(masks) == list(prunable_weights(dense))
    for (name, new), old in zip(any_model.named_parameters(), dense.parameters(), strict=True):
        if name not in masks:
            assert torch.equal(new, old), name
            continue
        assert int((~masks[name]).sum()) == round(0.37 * old.numel())
        assert torch.count_nonzero(new) == int(masks[name].sum())
        assert torch.equal(new, old * masks[name])
        assert old[~masks[name]].abs().max() <= old[masks[name]].abs().min()
    masks.check(any_model)
    logits = any_model(windows[:2]).logits
    assert logits.shape == (2, 16, 64)
    assert logits.isfinite().all()
    assert not torch.equal(logits, dense(windows[:2]).logits)


def test_zeros_survive_saving_and_loading(any_model, tmp_path):
    masks = prune(any_model, "magnitude", sparsity=0.5)
    any_model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    masks.check(again)
    assert unchanged(again, snapshot(any_model))


@pytest.mark.parametrize("criterion", ["magnitude", "random"])
def test_no_sparsity_changes_nothing_and_all_of_it_leaves_nothing(make_model, criterion):
    model = make_model("opt")
    before = snapshot(model)
    masks = prune(model, criterion, sparsity=0)
    assert masks.sparsity() == 0
    assert unchanged(model, before)
    masks = prune(model, criterion, sparsity=1)
    assert masks.sparsity() == 1
    for name, parameter in model.named_parameters():
        assert torch.count_nonzero(parameter) == 0 if name in masks else torch.equal(parameter, before[name])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("criterion", ["magnitude", "random"])
def test_any_precision_is_pruned_exactly(make_model, dtype, criterion):
    model = make_model("llama", dtype=dtype)
    masks = prune(model, criterion, sparsity=0.61)
    for name, weight in prunable_weights(model).items():
        assert weight.dtype == dtype
        assert int((~masks[name]).sum()) == round(0.61 * weight.numel())
    masks.check(model)


def test_magnitude_looks_at_each_matrix_alone(make_model):
    model = make_model("opt")
    weights = {name: weight.detach().clone() for name, weight in prunable_weights(model).items()}
    for name, mask in prune(model, "magnitude", sparsity=0.5, seed=3).items():
        assert torch.equal(mask, keep_highest(weights[name].abs(), 0.5))


def test_random_follows_the_seed_and_magnitude_does_not(make_model, generators_unchanged):
    model = make_model("opt")

    def masks(criterion, seed):
        found = prune(copy.deepcopy(model), criterion, sparsity=0.5, seed=seed)
        return torch.cat([mask.flatten() for mask in found.values()])

    assert torch.equal(masks("random", 0), masks("random", 0))
    assert torch.equal(masks("magnitude", 0), masks("magnitude", 1))
    # independent: two halves agree on half of the weights
    n = masks("random", 0).numel()
    agreement = (masks("random", 0) == masks("random", 1)).double().mean()
    assert abs(agreement - 0.5) < 5 * 0.5 / n**0.5
    agreement = (masks("random", 0) == masks("magnitude", 0)).double().mean()
    assert abs(agreement - 0.5) < 5 * 0.5 / n**0.5


def test_random_prunes_every_matrix_differently(make_model):
    masks = list(prune(make_model("opt"), "random", sparsity=0.5).values())
    for one, other in ((masks[0], masks[1]), (masks[0], masks[6])):
        assert one.shape == other.shape
        assert 0.4 < (one == other).double().mean() < 0.6


def test_the_default_seed_is_zero(make_model):
    one, other = (prune(make_model("opt"), "random", sparsity=0.5, **given) for given in ({}, {"seed": 0}))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_pruning_further_keeps_what_was_pruned(make_model):
    model = make_model("opt")
    first = prune(model, "magnitude", sparsity=0.4)
    second = prune(model, "magnitude", sparsity=0.7)
    first.check(model)
    for name, mask in second.items():
        assert not (mask & ~first[name]).any()
        assert int((~mask).sum()) == round(0.7 * mask.numel())


def test_parameters_stay_the_same_objects_and_trainable(make_model):
    model = make_model("opt")
    before = dict(model.named_parameters())
    prune(model, "magnitude", sparsity=0.5)
    for name, parameter in model.named_parameters():
        assert parameter is before[name]
        assert parameter.requires_grad


# --- errors leave the model alone -------------------------------------------------------------------


def test_nan_weights_are_named_and_nothing_is_pruned(make_model):
    model = make_model("opt")
    name = "model.decoder.layers.1.fc1.weight"
    with torch.no_grad():
        model.get_parameter(name)[3, 4] = math.nan
    before = {key: value.nan_to_num(7.0) for key, value in snapshot(model).items()}
    with pytest.raises(ValueError, match=f"cannot prune '{name}': a score is NaN"):
        prune(model, "magnitude", sparsity=0.5)
    assert all(torch.equal(before[key], value.nan_to_num(7.0)) for key, value in model.state_dict().items())


@torch.no_grad()
def test_infinite_weights_are_kept(make_model):
    model = make_model("opt")
    weight = model.model.decoder.layers[0].fc1.weight
    weight[0, 0], weight[0, 1] = math.inf, -math.inf
    masks = prune(model, "magnitude", sparsity=0.9)
    assert masks["model.decoder.layers.0.fc1.weight"][0, :2].all()


@pytest.mark.parametrize("sparsity", [-0.1, 1.01, 60, math.nan])
def test_bad_sparsities_are_refused(make_model, sparsity):
    model = make_model("opt")
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"sparsity is {sparsity}"):
        prune(model, "magnitude", sparsity=sparsity)
    assert unchanged(model, before)


@pytest.mark.parametrize("criterion", ["wander", "", "Magnitude"])
def test_unknown_criteria_are_refused_with_the_known_ones(make_model, criterion):
    model = make_model("opt")
    before = snapshot(model)
    with pytest.raises(
        ValueError, match=f"unknown criterion '{criterion}'; the criteria are magnitude, random"
    ):
        prune(model, criterion, sparsity=0.5)
    assert unchanged(model, before)


def test_a_model_without_decoder_blocks_is_refused():
    with pytest.raises(ValueError, match="found no decoder blocks in a Linear"):
        prune(torch.nn.Linear(3, 3), "magnitude", sparsity=0.5)
