"""Where adapters go, and what attaching refuses, leaving the model as it was."""

import copy

import pytest
import torch
from adapter_parts import RANK, pruned
from torch import nn

from perpkit.pruning.masks import Masks
from perpkit.retraining.adapters.attach import attach
from perpkit.retraining.adapters.modules import adapted_modules


@pytest.fixture
def small(make_model):
    """A pruned OPT and its masks."""
    return pruned(make_model("opt"))


def unchanged(model, before):
    """Whether the model is as its copy: classes, parameters, buffers and values."""
    same = [type(m) for m in model.modules()] == [type(m) for m in before.modules()]
    now, then = (dict((*m.named_parameters(), *m.named_buffers())) for m in (model, before))
    return same and list(now) == list(then) and all(torch.equal(now[name], then[name]) for name in now)


# --- targets ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "wanted"),
    [
        (["fc1"], ["0.fc1", "1.fc1"]),
        ("fc1", ["0.fc1", "1.fc1"]),
        (["self_attn.q_proj", "layers.1.fc2"], ["0.self_attn.q_proj", "1.self_attn.q_proj", "1.fc2"]),
        (["model.decoder.layers.0.fc2.weight"], ["0.fc2"]),
    ],
)
def test_targets(small, targets, wanted):
    model, masks = small
    attach(model, masks, "mask_lora", RANK, targets=targets)
    assert list(adapted_modules(model)) == [f"model.decoder.layers.{name}" for name in wanted]


def test_targets_among_experts(make_model):
    model, masks = pruned(make_model("mixtral"))
    added = attach(model, masks, "mask_lora", RANK, targets=["experts.down_proj"])
    assert [name.rpartition(".")[2] for name in added] == ["down_proj_lora_A", "down_proj_lora_B"] * 2
    assert {p.shape[0] for p in added.values()} == {4}


def test_without_masks_every_prunable_matrix_and_with_some_those(small):
    model, masks = small
    assert len(attach(copy.deepcopy(model), None, "lora", RANK)) == 2 * len(masks)
    some = Masks(dict(list(masks.items())[:2]))
    assert len(attach(model, some, "mask_lora", RANK)) == 4
    # The rest can still get others.
    assert len(attach(model, masks, "lora", RANK, targets=["fc1"])) == 4


def test_the_head_and_embeddings_are_never_adapted(any_model):
    model, masks = pruned(any_model)
    attach(model, masks, "mask_lora", RANK)
    special = {model.get_input_embeddings(), model.get_output_embeddings()}
    assert not special & set(adapted_modules(model).values())


# --- mistakes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "dora"}, "unknown kind of adapter 'dora'; the kinds are lora, lora_prune, scale_lora"),
        ({"kind": "lora", "start": "published"}, "only scale_lora has a choice"),
        ({"kind": "scale_lora", "start": "ones"}, "start='ones'.*published or symmetry_breaking"),
        ({"rank": 0}, "rank is 0"),
        ({"rank": 2.0}, "rank is 2.0"),
        ({"rank": 33}, "rank is 33, larger than the 32 x 32 matrix 'model.decoder.*at most 32"),
        ({"alpha": 0}, "alpha is 0; it must be positive"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"targets": ["fc3"]}, "'fc3'.*the layers end in fc1, fc2, k_proj"),
        ({"targets": ["lm_head"]}, "'lm_head'"),
        ({"targets": ["embed_tokens"]}, "'embed_tokens'"),
        ({"targets": [""]}, "''"),
        ({"targets": []}, "nothing to put adapters on"),
        ({"masks": Masks({})}, "nothing to put adapters on"),
    ],
)
def test_mistakes_leave_the_model_as_it_was(small, arguments, message):
    model, masks = small
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=message):
        attach(model, **{"masks": masks, "kind": "mask_lora", "rank": RANK, **arguments})
    assert unchanged(model, before)


def test_masks_of_another_model_are_refused(small, make_model):
    model, masks = small
    before = copy.deepcopy(model)
    _, llama = pruned(make_model("llama"))
    _, wide = pruned(make_model("opt", ffn_dim=64))
    name = "model.decoder.layers.0.fc1.weight"
    for foreign, message in (
        (llama, "belong to another model"),
        (wide, "belong to another model"),
        (Masks({name: ~masks[name]}), "no longer sparse"),
        (Masks({"model.decoder.embed_positions.weight": torch.ones(18, 32) > 0}), "no prunable matrix"),
    ):
        with pytest.raises(ValueError, match=message):
            attach(model, foreign, "mask_lora", RANK)
        assert unchanged(model, before)


def test_attaching_twice_is_refused(small):
    model, masks = small
    attach(model, masks, "mask_lora", RANK, targets=["fc1"])
    before = copy.deepcopy(model)
    for targets in (None, ["fc1"], ["fc2", "fc1"]):
        with pytest.raises(ValueError, match=r"already has adapters; merge\(model\) first"):
            attach(model, masks, "lora", RANK, targets=targets)
        assert unchanged(model, before)


def test_a_tied_matrix_is_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=r"0\.weight and 2\.weight are one tied matrix"):
        attach(model, None, "lora", RANK)
    assert unchanged(model, before)
    assert len(attach(model, None, "lora", RANK, targets=["1"])) == 2
