"""Merging adapters: what the weights become, what the report says, and what is refused."""

import copy

import pytest
import torch
from adapter_parts import (
    RANK,
    VARIANTS,
    attach_random,
    effective,
    names_of_factors,
    outputs,
    pruned,
    update_of,
)
from torch import nn

from perpkit.pruning.layers import prunable_matrices
from perpkit.pruning.masks import Masks
from perpkit.retraining.adapters.attach import adapter_parameters, attach
from perpkit.retraining.adapters.merge import merge

MERGEABLE = [variant for variant in VARIANTS if variant[0] != "lora"]


def check_merged(model, inputs):
    """Every kind: plain again, sparse, the formula's weights, and a report that tells the truth."""
    plain, masks = pruned(model)
    for kind, start in MERGEABLE:
        merged = copy.deepcopy(plain)
        added = {name: p.detach().clone() for name, p in attach_random(merged, masks, kind, start).items()}
        before = outputs(merged, inputs).detach()
        report = merge(merged, inputs)
        after = outputs(merged, inputs).detach()
        assert [type(module) for module in merged.modules()] == [type(module) for module in plain.modules()]
        assert [vars(module).keys() for module in merged.modules()] == [
            vars(module).keys() for module in plain.modules()
        ]
        assert list(merged.state_dict()) == list(plain.state_dict())
        masks.check(merged)
        for name, mask in masks.items():
            a, b = (added[factor] for factor in names_of_factors(name))
            trained = effective(kind, start, plain.get_parameter(name), mask, update_of(plain, name, a, b))
            torch.testing.assert_close(merged.get_parameter(name), mask * trained, rtol=1e-5, atol=1e-6)
        *layers, logits = report.itertuples(index=False)
        assert [row.matrix for row in layers] == list(prunable_matrices(plain))
        assert {row.kind for row in layers} == {kind}
        assert logits.matrix == "logits"
        assert logits.change == pytest.approx(
            float((after - before).norm() / before.norm()), rel=1e-3, abs=1e-8
        )
        if kind == "lora_prune":
            assert all(row.change > 0.01 for row in report.itertuples())
        else:
            assert all(row.change == 0 for row in layers)
            assert logits.change < 1e-5


def test_every_language_model(any_model, windows):
    check_merged(any_model, windows)


def test_every_vision_model(any_vision, images):
    check_merged(any_vision, images)


def test_the_report_by_hand():
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[3.0, 0.0], [0.0, 0.0]]))
    masks = Masks({"0.weight": torch.tensor([[True, False], [False, True]])})
    added = attach(model, masks, "lora_prune", rank=1, alpha=1.0)
    with torch.no_grad():
        added["0.lora_A"].copy_(torch.tensor([[1.0, 2.0]]))
        added["0.lora_B"].copy_(torch.tensor([[1.0], [1.0]]))
    # In training [[4, 2], [1, 2]], merged [[4, 0], [0, 2]]: lost are 2 and 1.
    report = merge(model)
    assert model[0].weight.tolist() == [[4.0, 0.0], [0.0, 2.0]]
    assert report.to_dict("records") == [
        {"matrix": "0.weight", "kind": "lora_prune", "change": pytest.approx((5 / 25) ** 0.5)}
    ]


def test_merging_keeps_the_parameters_and_their_flags(make_model):
    model, masks = pruned(make_model("opt"))
    model.requires_grad_(False)
    before = dict(model.named_parameters())
    attach_random(model, masks, "mask_lora")
    merge(model)
    assert all(before[name] is p and not p.requires_grad for name, p in model.named_parameters())
    with pytest.raises(ValueError, match="no adapters to merge"):
        merge(model)
    assert adapter_parameters(model) == {}


def test_in_sixteen_bits_only_rounding_changes(make_model, windows):
    model, masks = pruned(make_model("opt", dtype=torch.bfloat16), dtype=torch.bfloat16)
    attach_random(model, masks, "mask_lora")
    *layers, logits = merge(model, windows).change
    assert all(0 < change < 2**-8 for change in layers)
    assert logits < 0.05


def test_a_probe_leaves_modes_as_they_were_and_runs_without_dropout(make_model, windows):
    model, masks = pruned(make_model("opt", dropout=0.5))
    attach_random(model, masks, "mask_lora")
    model.train()
    assert merge(model, windows).change.iloc[-1] < 1e-5
    assert all(module.training for module in model.modules())


def test_after_training_the_merged_function_is_the_trained_one(make_model, windows):
    model, masks = pruned(make_model("qwen3_moe"))
    added = attach(model, masks, "mask_lora", RANK)
    optimizer = torch.optim.SGD(added.values(), lr=0.1)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        losses.append(model(windows, labels=windows).loss)
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    trained = model(windows, labels=windows).loss
    merge(model)
    masks.check(model)
    torch.testing.assert_close(model(windows, labels=windows).loss, trained)


# --- lora -------------------------------------------------------------------------------------------


def test_lora_on_a_pruned_layer_is_refused_and_explained(make_model):
    model, masks = pruned(make_model("opt"))
    attach_random(model, masks, "mask_lora", targets=["fc2"])
    attach_random(model, masks, "lora", targets=["fc1"])
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(
        ValueError, match=r"fc1\.weight' is pruned.*would be dense.*'mask_lora' or 'lora_prune'"
    ):
        merge(model)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert len(adapter_parameters(model)) == 8


def test_lora_on_a_dense_layer_merges(make_model, windows):
    model = make_model("gpt2")
    attach_random(model, None, "lora")
    assert merge(model, windows).change.max() < 1e-5


def test_weights_that_are_no_longer_sparse_are_refused(make_model):
    model, masks = pruned(make_model("opt"))
    attach_random(model, masks, "mask_lora")
    name = next(iter(masks))
    with torch.no_grad():
        dict(model.named_parameters())[name][~masks[name]] = 1.0
    with pytest.raises(ValueError, match="no longer sparse"):
        merge(model)
    assert adapter_parameters(model)


@pytest.mark.parametrize("probe", [torch.zeros(2, 17).long(), torch.full((2, 4), 64), torch.zeros(4).long()])
def test_a_probe_that_does_not_fit_is_refused_before_anything_changes(make_model, probe):
    model, masks = pruned(make_model("opt"))
    attach_random(model, masks, "mask_lora")
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"window|token|vocabulary"):
        merge(model, probe)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
