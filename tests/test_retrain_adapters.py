"""Retraining adapters, and the schedules that adapt to the pruning."""

import copy
from functools import partial

import pytest
import torch

from perpkit.pruning.masks import Masks
from perpkit.pruning.prune import prune
from perpkit.retraining.adapters.attach import attach
from perpkit.retraining.adapters.merge import merge
from perpkit.retraining.loop.retrain import retrain
from perpkit.retraining.schedules import allr, allr_start, llr


def train(model, windows, masks, subset, **changes):
    options = {"steps": 5, "lr": 1e-2, "batch": 4, "progress": False, **changes}
    return retrain(model, windows, masks=masks, subset=subset, **options)


@pytest.mark.parametrize("kind", ["mask_lora", "lora_prune", "scale_lora"])
@pytest.mark.parametrize("architecture", ["opt", "gpt2", "mixtral"])
def test_adapters_are_trained_and_nothing_beneath_them(make_model, windows, architecture, kind):
    # weights large enough that scaling them tells, and no dropout that would hide it
    quiet = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "initializer_range": 0.2}
    model = make_model(architecture, **(quiet if architecture == "gpt2" else {}))
    masks = prune(model, "magnitude", sparsity=0.5)
    attach(model, masks, kind, rank=2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    history = train(model, windows, masks, "lora", batch=12, steps=15)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if "lora_" in name}
    assert history.loss.iloc[-1] < history.loss.iloc[0]
    merge(model)
    masks.check(model)


def test_a_union_trains_what_it_names(make_model, windows):
    model = make_model("opt")
    masks = prune(model, "magnitude", sparsity=0.5)
    attach(model, masks, "mask_lora", rank=2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, windows, masks, "norms+lora")
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != ("lora_" in name or "layer_norm" in name), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_adapters_on_a_model_of_another_dtype(make_model, windows, dtype):
    model = make_model("llama", dtype=dtype)
    masks = prune(model, "magnitude", sparsity=0.5)
    attach(model, masks, "mask_lora", rank=2)
    history = train(model, windows, masks, "lora", batch=12, steps=15)
    assert history.loss.iloc[-1] < history.loss.iloc[0]


def test_bimp_is_llr_then_pruning_then_allr(make_model, windows):
    model = make_model("llama")
    train(model, windows, Masks({}), "full", schedule="llr", lr=3e-3)
    dense = copy.deepcopy(model)
    masks = prune(model, "magnitude", sparsity=0.6)
    start = allr_start(model, masks, dense, share=0.2)
    assert 0.2 < start < 1
    history = train(model, windows, masks, "full", steps=10, lr=1e-2, schedule=partial(allr, start=start))
    assert history.lr.tolist() == pytest.approx([1e-2 * start * llr(step, 10) for step in range(10)])
    masks.check(model)


@pytest.mark.parametrize("kind", ["mask_lora", "lora_prune", "scale_lora"])
def test_adapters_that_keep_what_the_masks_prune_are_refused(make_model, windows, kind):
    model = make_model("opt")
    masks = prune(model, "magnitude", sparsity=0.5)
    attach(model, None, kind, rank=2)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=f"the {kind} adapter of '.*' keeps weights that the masks prune"):
        train(model, windows, masks, "lora")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_lora_without_masks_stays_beside_a_pruned_model(make_model, windows):
    model = make_model("opt")
    masks = prune(model, "magnitude", sparsity=0.5)
    attach(model, None, "lora", rank=2)
    assert len(train(model, windows, masks, "lora")) == 5
