"""Pruning what is pruned already: masks nest, zeros stay, and less than before is refused."""

import copy

import pytest
import torch
from pruning_parts import snapshot, unchanged

from perpkit.pruning.layers import prunable_matrices
from perpkit.pruning.masks import Masks
from perpkit.pruning.method import CRITERIA
from perpkit.pruning.prune import prune


def retrained(model, masks):
    """Move the kept weights, as retraining does; some of them to zero."""
    with torch.no_grad():
        for name, mask in masks.items():
            weight = model.get_parameter(name)
            weight.copy_(torch.where(mask, weight.roll(1, -1) + 0.01, 0))


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("architecture", ["gpt2", "qwen3_moe"])
def test_from_half_to_seventy_percent(make_model, windows, architecture, criterion, given):
    model = make_model(architecture)
    options = {"calibration": windows[:4], "progress": False}
    first = prune(model, criterion, sparsity=0.5, **options)
    retrained(model, first)
    second = prune(model, criterion, sparsity=0.7, masks=first if given else None, **options)
    for name, mask in second.items():
        assert not (mask & ~first[name]).any()
    for matrix in prunable_matrices(model).values():
        mask = matrix.view(second[matrix.parameter])
        if criterion in ("wanda", "ria", "sparsefw"):
            assert ((~mask).sum(1) == round(0.7 * mask.shape[1])).all()
        else:
            assert int((~mask).sum()) == round(0.7 * mask.numel())
    second.check(model)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_vision_models_prune_on(make_vision, images, criterion):
    model = make_vision("sequential")
    options = {"calibration": images[:3, :, ::2, ::2], "group": "layer", "progress": False}
    first = prune(model, criterion, sparsity=0.5, **options)
    second = prune(model, criterion, sparsity=0.8, **options)
    for name, mask in second.items():
        assert not (mask & ~first[name]).any()
        assert int((~mask).sum()) == round(0.8 * mask.numel())


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_pattern_over_an_unstructured_mask(make_model, windows, criterion, given):
    """A group of four that had lost more than two keeps its zeros, the others lose exactly two."""
    model = make_model("llama")
    options = {"calibration": windows[:4], "progress": False}
    first = prune(model, criterion, sparsity=0.4, **options)
    second = prune(model, criterion, pattern="2:4", masks=first if given else None, **options)
    for name, mask in second.items():
        before, after = (each.unflatten(1, (-1, 4)).sum(-1) for each in (first[name], mask))
        assert not (mask & ~first[name]).any()
        assert torch.equal(after, before.clamp(max=2)), name
    second.check(model)


def test_rows_after_a_whole_layer(make_model):
    """A row that had lost more than its share keeps its zeros."""
    model = make_model("opt")
    first = prune(model, "magnitude", sparsity=0.5)
    second = prune(model, "magnitude", sparsity=0.55, group="row", masks=first)
    for name, mask in second.items():
        width = mask.shape[1]
        lost = (~first[name]).sum(1).clamp(min=round(0.55 * width))
        assert torch.equal((~mask).sum(1), lost)


def test_globally_and_by_other_allocations(make_vision):
    for allocation in ("global", "lamp"):
        model = make_vision("cifar")
        first = prune(model, "magnitude", sparsity=0.5, allocation=allocation)
        second = prune(model, "magnitude", sparsity=0.8, allocation=allocation, masks=first)
        assert second.sparsity() == pytest.approx(0.8, abs=1e-5)
        assert all(not (second[name] & ~first[name]).any() for name in first)


def test_given_masks_are_not_changed_and_other_masks_are_carried_on(make_model):
    model = make_model("opt")
    layer = "model.decoder.layers.0.fc1.weight"
    first = prune(model, "magnitude", sparsity={layer: 0.5})
    kept = {name: mask.clone() for name, mask in first.items()}
    second = prune(model, "magnitude", sparsity={layer: 0.75}, masks=first)
    assert all(torch.equal(kept[name], mask) for name, mask in first.items())
    assert second is not first
    assert int((~second[layer]).sum()) == 0.75 * 48 * 32


def test_masks_decide_which_zeros_are_pruned(make_model):
    """With masks a kept weight may be zero and is not counted; it goes first."""
    model = make_model("opt")
    layer = "model.decoder.layers.0.fc1.weight"
    with torch.no_grad():
        model.get_parameter(layer)[:24] = 0
    ones = {
        name: torch.ones_like(p, dtype=torch.bool) for name, p in model.named_parameters() if name == layer
    }
    masks = prune(copy.deepcopy(model), "magnitude", sparsity=0.25, masks=Masks(ones))
    assert int((~masks[layer]).sum()) == 0.25 * 48 * 32
    assert not masks[layer][:12].any()
    with pytest.raises(ValueError, match="is pruned already: 50"):
        prune(model, "magnitude", sparsity=0.25)


def test_a_few_zeros_are_not_an_earlier_pruning(make_model):
    model = make_model("opt", dtype=torch.bfloat16)
    layer = "model.decoder.layers.0.fc1.weight"
    with torch.no_grad():
        model.get_parameter(layer).view(-1)[:15] = 0
    masks = prune(model, "random", sparsity=0, progress=False)
    assert masks.sparsity() == 0


def test_layers_that_a_mapping_does_not_name_stay_as_they_are(make_model):
    for options in ({}, {"masks": None}):
        model = make_model("opt")
        first = prune(model, "magnitude", sparsity=0.5)
        options = {"masks": first} if "masks" in options else {}
        layer = "model.decoder.layers.1.fc2.weight"
        second = prune(model, "magnitude", sparsity={layer: 0.75}, **options)
        assert int((~second[layer]).sum()) == 0.75 * 48 * 32
        assert all(torch.equal(second[name], first[name]) for name in first if name != layer)


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_to_less_is_refused_by_name(make_model, windows, criterion, given):
    model = make_model("opt")
    options = {"calibration": windows[:4], "progress": False}
    first = prune(model, criterion, sparsity=0.5, **options)
    before = snapshot(model)
    words = r"k_proj\.weight' is pruned already: 50\.00% of its weights are zero, and a sparsity of 40\.00%"
    with pytest.raises(ValueError, match=words):
        prune(model, criterion, sparsity=0.4, masks=first if given else None, **options)
    with pytest.raises(ValueError, match="Prune to more, start from the dense model, or"):
        prune(model, criterion, pattern="3:4", masks=first if given else None, **options)
    assert unchanged(model, before)
    assert prune(model, criterion, sparsity=0.5, **options).sparsity() == 0.5


def test_masks_that_the_model_does_not_obey_are_refused(make_model):
    model = make_model("opt")
    first = prune(model, "magnitude", sparsity=0.5)
    dense = make_model("opt")
    before = snapshot(dense)
    with pytest.raises(ValueError, match=r"k_proj\.weight' is no longer sparse: 512 pruned weights are not"):
        prune(dense, "magnitude", sparsity=0.7, masks=first)
    with pytest.raises(ValueError, match="the masks belong to another model"):
        prune(make_model("opt", ffn_dim=40), "magnitude", sparsity=0.7, masks=first)
    with pytest.raises(ValueError, match="the masks belong to another model"):
        prune(make_model("llama"), "magnitude", sparsity=0.7, masks=first)
    assert unchanged(dense, before)
