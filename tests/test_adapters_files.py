"""Adapters in files and memory: safetensors, state dictionaries, pickles and copies."""

import copy
import pickle

import pytest
import torch
from adapter_parts import RANK, VARIANTS, attach_random, outputs, pruned
from safetensors.torch import load_file, save_file

from perpkit.retraining.adapters.attach import adapter_parameters, attach
from perpkit.retraining.adapters.files import load_adapters, save_adapters
from perpkit.retraining.adapters.merge import merge


@pytest.mark.parametrize("architecture", ["opt", "gpt2", "mixtral"])
@pytest.mark.parametrize(("kind", "start"), VARIANTS)
def test_saved_and_loaded(make_model, windows, tmp_path, architecture, kind, start):
    plain, masks = pruned(make_model(architecture))
    model = copy.deepcopy(plain)
    added = attach_random(model, masks, kind, start)
    save_adapters(model, tmp_path / "adapters.safetensors")
    stored = load_file(tmp_path / "adapters.safetensors")
    assert set(stored) == set(added)
    loaded = load_adapters(plain, masks, tmp_path / "adapters.safetensors")
    assert all(torch.equal(p, added[name]) and p.requires_grad for name, p in loaded.items())
    assert torch.equal(outputs(plain, windows), outputs(model, windows))


def test_a_mixture_of_kinds_and_ranks(make_model, windows, tmp_path):
    plain, masks = pruned(make_model("opt"))
    model = copy.deepcopy(plain)
    attach_random(model, masks, "mask_lora", targets=["fc1"])
    attach(model, masks, "scale_lora", 2, targets=["fc2"], start="symmetry_breaking")
    save_adapters(model, tmp_path / "adapters.safetensors")
    load_adapters(plain, masks, tmp_path / "adapters.safetensors")
    assert torch.equal(outputs(plain, windows), outputs(model, windows))
    assert sorted(set(merge(plain).kind)) == ["mask_lora", "scale_lora"]


@pytest.mark.parametrize("architecture", ["opt", "gpt2", "mixtral"])
@pytest.mark.parametrize("kind", ["lora", "mask_lora", "scale_lora"])
def test_copies_and_pickles(make_model, windows, architecture, kind):
    model, masks = pruned(make_model(architecture))
    attach_random(model, masks, kind)
    wanted = outputs(model, windows)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(outputs(twin, windows), wanted)
        twin_parameters = adapter_parameters(twin)
        assert not {id(p) for p in twin_parameters.values()} & {id(p) for p in model.parameters()}
        if kind != "lora":
            merge(twin)
            masks.check(twin)
    assert torch.equal(outputs(model, windows), wanted)


def test_the_whole_state_goes_into_a_model_with_fresh_adapters(make_model, windows):
    model, masks = pruned(make_model("qwen3_moe"))
    fresh = copy.deepcopy(model)
    attach_random(model, masks, "mask_lora")
    attach(fresh, masks, "mask_lora", RANK, 7.5)
    assert fresh.load_state_dict(model.state_dict()).missing_keys == []
    assert torch.equal(outputs(fresh, windows), outputs(model, windows))


@pytest.mark.parametrize("architecture", ["opt", "gpt2"])
def test_a_model_moves_to_another_type(make_model, windows, architecture):
    model, masks = pruned(make_model(architecture))
    attach_random(model, masks, "mask_lora")
    wanted = outputs(model, windows)
    torch.testing.assert_close(outputs(model.double(), windows).float(), wanted, rtol=1e-4, atol=1e-4)
    merge(model)
    masks.check(model)


# --- mistakes ---------------------------------------------------------------------------------------


def test_nothing_to_save(make_model, tmp_path):
    with pytest.raises(ValueError, match="no adapters to save"):
        save_adapters(make_model("opt"), tmp_path / "adapters.safetensors")
    assert not list(tmp_path.iterdir())


def test_files_that_hold_no_adapters(make_model, tmp_path):
    model, masks = pruned(make_model("opt"))
    broken, other = tmp_path / "broken", tmp_path / "other"
    broken.write_bytes(b"no tensors")
    save_file({"a": torch.ones(1)}, other)
    for path, message in (
        (tmp_path / "missing", "cannot read adapters from .*missing"),
        (broken, "cannot read adapters from .*broken"),
        (other, "other' holds no perpkit adapters"),
    ):
        with pytest.raises(ValueError, match=message):
            load_adapters(model, masks, path)
    assert not adapter_parameters(model)


def test_adapters_of_another_model(make_model, tmp_path):
    plain, masks = pruned(make_model("opt"))
    for foreign in (make_model("llama"), make_model("opt", ffn_dim=64)):
        model, foreign_masks = pruned(foreign)
        attach_random(model, foreign_masks, "mask_lora")
        save_adapters(model, tmp_path / "adapters.safetensors")
        with pytest.raises(ValueError, match="the adapters belong to another model"):
            load_adapters(plain, masks, tmp_path / "adapters.safetensors")
        assert not adapter_parameters(plain)


def test_loading_onto_adapters(make_model, tmp_path):
    model, masks = pruned(make_model("opt"))
    attach_random(model, masks, "mask_lora")
    save_adapters(model, tmp_path / "adapters.safetensors")
    with pytest.raises(ValueError, match="already has adapters"):
        load_adapters(model, masks, tmp_path / "adapters.safetensors")


@pytest.mark.parametrize("kind", ["mask_lora", "lora_prune", "scale_lora", "lora"])
@pytest.mark.parametrize("other", ["none", "another"])
def test_adapters_go_only_onto_their_masks(make_model, windows, tmp_path, kind, other):
    plain, masks = pruned(make_model("opt"))
    model = copy.deepcopy(plain)
    attach_random(model, masks, kind)
    save_adapters(model, tmp_path / "adapters.safetensors")
    masks = None if other == "none" else pruned(plain, sparsity=0.7)[1]
    if kind == "lora":
        load_adapters(plain, masks, tmp_path / "adapters.safetensors")
        return
    with pytest.raises(ValueError, match=r"'.*' were trained with another mask; load"):
        load_adapters(plain, masks, tmp_path / "adapters.safetensors")
    assert not adapter_parameters(plain)


def test_a_missing_folder_is_named(make_model, tmp_path):
    model, masks = pruned(make_model("opt"))
    attach_random(model, masks, "mask_lora")
    with pytest.raises(ValueError, match=r"cannot write adapters to .*nowhere"):
        save_adapters(model, tmp_path / "nowhere" / "adapters.safetensors")
