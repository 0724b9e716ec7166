"""Masks: exact, explicit, checkable, and the same after a trip to the disk."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from perpkit.pruning.masks import Masks
from perpkit.pruning.prune import prune

# --- the collection ---------------------------------------------------------------------------------


@pytest.fixture
def pruned(make_model):
    """A pruned model and its masks."""
    model = make_model("opt")
    return model, prune(model, "magnitude", sparsity=0.37)


def test_masks_are_a_mapping(pruned):
    model, masks = pruned
    assert list(masks) == [name for name in dict(model.named_parameters()) if name in masks]
    assert len(masks) == 12
    assert set(masks) == set(masks.keys())
    assert "model.decoder.embed_tokens.weight" not in masks
    with pytest.raises(KeyError):
        masks["lm_head.weight"]


def test_sparsity_is_that_of_all_weights_together():
    masks = Masks({"a": torch.tensor([[True, False]]), "b": torch.tensor([True] * 5 + [False])})
    assert masks.sparsity() == pytest.approx(2 / 8)
    assert repr(masks) == "Masks(2 matrices, sparsity 0.2500)"
    assert Masks({}).sparsity() == 0


def test_sparsity_by_layer_and_by_block_worked_by_hand():
    masks = Masks(
        {
            "m.layers.0.a.weight": torch.tensor([[True, False, False]]),
            "m.layers.0.experts.up": torch.tensor([[[True, True]], [[True, False]]]),
            "m.layers.10.a.weight": torch.zeros(2, 2, dtype=torch.bool),
            "conv1.weight": torch.ones(2, 1, 1, 1, dtype=torch.bool),
        }
    )
    assert masks.sparsity() == 7 / 13
    layers = masks.sparsity(by="layer")
    assert layers.columns.tolist() == ["layer", "weights", "pruned", "sparsity"]
    assert layers["layer"].tolist() == list(masks)
    assert layers["weights"].tolist() == [3, 4, 4, 2]
    assert layers["pruned"].tolist() == [2, 1, 4, 0]
    assert layers["sparsity"].tolist() == [2 / 3, 1 / 4, 1, 0]
    blocks = masks.sparsity(by="block")
    assert blocks.columns.tolist() == ["block", "weights", "pruned", "sparsity"]
    assert blocks["block"].tolist() == ["m.layers.0", "m.layers.10", "conv1"]
    assert blocks["sparsity"].tolist() == [3 / 7, 1, 0]
    for by in ("layer", "block"):
        assert len(Masks({}).sparsity(by=by)) == 0
        # a matrix without weights has lost none
        assert Masks({"0.weight": torch.ones(0, 3) > 0}).sparsity(by=by)["sparsity"].tolist() == [0]
    with pytest.raises(ValueError, match="cannot show the sparsity by 'row'; valid are 'layer' and 'block'"):
        masks.sparsity(by="row")


@pytest.mark.parametrize("architecture", ["mixtral", "gpt2"])
def test_the_tables_add_up_to_the_whole(make_model, architecture):
    model = make_model(architecture)
    masks = prune(model, "magnitude", sparsity=0.37)
    for by, rows in (("layer", len(masks)), ("block", 2)):
        table = masks.sparsity(by=by)
        assert len(table) == rows
        assert table["pruned"].sum() / table["weights"].sum() == masks.sparsity()


# --- two masks ----------------------------------------------------------------------------------------


def test_overlap_worked_by_hand():
    one = torch.tensor([[True, True, False, False, False]])
    two = torch.tensor([[True, False, True, False, False]])
    none = torch.zeros(1, 5, dtype=torch.bool)
    found = Masks({"a": one, "b": one, "c": none}).overlap(Masks({"c": none, "b": none, "a": two}))
    assert found.columns.tolist() == ["layer", "agreement", "overlap"]
    assert found.to_numpy().tolist() == [["a", 3 / 5, 1 / 3], ["b", 3 / 5, 0], ["c", 1, 1]]


@given(st.integers(0, 99), st.floats(0, 1), st.floats(0, 1))
def test_overlap_is_that_of_sets(seed, one, two):
    draw = torch.Generator().manual_seed(seed)
    masks = [Masks({"w": torch.rand(3, 4, 2, generator=draw) < share}) for share in (one, two)]
    kept = [{i for i, each in enumerate(mask["w"].flatten().tolist()) if each} for mask in masks]
    _, agreement, overlap = masks[0].overlap(masks[1]).to_numpy()[0]
    assert agreement == (24 - len(kept[0] ^ kept[1])) / 24
    assert overlap == (len(kept[0] & kept[1]) / len(kept[0] | kept[1]) if kept[0] | kept[1] else 1)
    assert masks[1].overlap(masks[0]).to_numpy().tolist() == [["w", agreement, overlap]]
    assert masks[0].overlap(masks[0]).to_numpy().tolist() == [["w", 1, 1]]


def test_only_masks_of_one_model_are_compared():
    one = Masks({"a": torch.ones(1, 2) > 0, "b": torch.ones(1, 2) > 0})
    with pytest.raises(ValueError, match="only one of the two has a mask of 'b'"):
        one.overlap(Masks({"a": one["a"]}))
    with pytest.raises(ValueError, match="only one of the two has a mask of 'b'"):
        Masks({"a": one["a"]}).overlap(one)
    with pytest.raises(
        ValueError, match=r"masks of 'b' have the shapes \(1, 2\) and \(2, 1\); they are of two"
    ):
        one.overlap(Masks({"a": one["a"], "b": one["b"].T}))


# --- kinds ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.int64])
def test_masks_are_boolean(dtype):
    with pytest.raises(ValueError, match=f"the mask of 'w' is {dtype}; masks are boolean, True = kept"):
        Masks({"w": torch.ones(2, 2, dtype=dtype)})


def test_apply_zeroes_the_pruned_and_leaves_the_kept(make_model, pruned):
    _, masks = pruned
    model, dense = make_model("opt", seed=5), make_model("opt", seed=5)
    masks.apply(model)
    masks.check(model)
    for (name, new), old in zip(model.named_parameters(), dense.parameters(), strict=True):
        if name in masks:
            assert torch.equal(new[masks[name]], old[masks[name]])
            assert torch.count_nonzero(new[~masks[name]]) == 0
        else:
            assert torch.equal(new, old)


@torch.no_grad()
def test_fused_experts_and_convolutions_have_masks_in_the_shape_of_their_parameter(
    make_model, make_vision, tmp_path
):
    for model, copy, name in (
        (make_model("mixtral"), make_model("mixtral"), "model.layers.1.mlp.experts.down_proj"),
        (
            make_vision("convnext"),
            make_vision("convnext"),
            "convnext.encoder.stages.1.layers.0.dwconv.weight",
        ),
    ):
        masks = prune(model, "magnitude", sparsity=0.5)
        assert masks[name].shape == model.get_parameter(name).shape
        masks.save(tmp_path / "masks.safetensors")
        again = Masks.load(tmp_path / "masks.safetensors")
        again.apply(copy)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), copy.parameters(), strict=True))
        place = tuple((~masks[name]).nonzero()[-1])
        model.get_parameter(name)[place] = 1e-9
        with pytest.raises(ValueError, match=f"'{name}' is no longer sparse: 1 pruned weights are not zero"):
            again.check(model)


@torch.no_grad()
def test_apply_zeroes_what_is_not_finite(pruned):
    model, masks = pruned
    name = next(iter(masks))
    model.get_parameter(name)[~masks[name]] = math.nan
    masks.apply(model)
    masks.check(model)


@torch.no_grad()
@pytest.mark.parametrize("value", [1e-30, -1.0, math.nan])
def test_check_names_the_matrix_and_the_count(pruned, value):
    model, masks = pruned
    masks.check(model)
    name = list(masks)[7]
    weight = model.get_parameter(name)
    alive = (~masks[name]).nonzero()[:3]
    weight[alive[:, 0], alive[:, 1]] = value
    with pytest.raises(ValueError, match=f"'{name}' is no longer sparse: 3 pruned weights are not zero"):
        masks.check(model)


@torch.no_grad()
def test_kept_weights_may_be_zero(pruned):
    model, masks = pruned
    for name in masks:
        model.get_parameter(name).zero_()
    masks.check(model)


@pytest.mark.parametrize("method", ["apply", "check"])
def test_masks_of_another_architecture_are_refused(make_model, pruned, method):
    other = make_model("llama")
    before = [parameter.clone() for parameter in other.parameters()]
    with pytest.raises(ValueError, match=r"another model: this one has no 'model\.decoder\.layers\.0"):
        getattr(pruned[1], method)(other)
    assert all(torch.equal(a, b) for a, b in zip(before, other.parameters(), strict=True))


@pytest.mark.parametrize("method", ["apply", "check"])
def test_masks_of_another_width_are_refused_before_anything_changes(make_model, pruned, method):
    other = make_model("opt", ffn_dim=40)
    before = [parameter.clone() for parameter in other.parameters()]
    # the attention matrices would fit
    with pytest.raises(ValueError, match=r"fc1\.weight' is \(40, 32\) here, \(48, 32\) there"):
        getattr(pruned[1], method)(other)
    assert all(torch.equal(a, b) for a, b in zip(before, other.parameters(), strict=True))


# --- on disk ----------------------------------------------------------------------------------------


def test_masks_are_the_same_after_saving_and_loading(pruned, tmp_path):
    model, masks = pruned
    masks.save(tmp_path / "masks.safetensors")
    again = Masks.load(tmp_path / "masks.safetensors")
    assert list(again) == list(masks)
    for name, mask in masks.items():
        assert torch.equal(again[name], mask)
    again.check(model)
    again.apply(model)


@given(st.lists(st.integers(0, 9), max_size=3), st.integers(0, 9))
def test_any_shape_survives(tmp_path_factory, shape, seed):
    path = tmp_path_factory.mktemp("masks") / "m.safetensors"
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    Masks({"w": mask}).save(path)
    assert torch.equal(Masks.load(path)["w"], mask)


def test_views_are_saved_as_they_look(tmp_path):
    mask = torch.rand(6, 10) < 0.5
    Masks({"w": mask.T}).save(tmp_path / "m.safetensors")
    assert torch.equal(Masks.load(tmp_path / "m.safetensors")["w"], mask.T)


def test_a_weight_takes_one_bit_on_disk(tmp_path):
    masks = Masks({name: torch.rand(1000, 800) < 0.5 for name in "ab"})
    masks.save(tmp_path / "m.safetensors")
    assert 200_000 <= (tmp_path / "m.safetensors").stat().st_size < 201_000


@pytest.mark.parametrize("damage", ["cut off", "text", "empty", "missing", "folder"])
def test_a_file_that_cannot_be_read_is_named(pruned, tmp_path, damage):
    path = tmp_path / "masks.safetensors"
    pruned[1].save(path)
    content = {"cut off": path.read_bytes()[:-10], "text": b"not masks at all", "empty": b""}
    path.unlink()
    if damage in content:
        path.write_bytes(content[damage])
    elif damage == "folder":
        path.mkdir()
    with pytest.raises(ValueError, match=r"cannot read masks from .*masks\.safetensors"):
        Masks.load(path)


def test_another_safetensors_file_is_refused(tmp_path):
    save_file({"w": torch.ones(2)}, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=r"weights\.safetensors' holds no perpkit masks"):
        Masks.load(tmp_path / "weights.safetensors")


@pytest.mark.parametrize("shape", [[2, 9], [2, 3]])
def test_masks_that_do_not_fill_their_shape_are_refused(tmp_path, shape):
    bits = torch.from_numpy(np.packbits(np.ones(16, dtype=bool)))
    metadata = {"format": "perpkit masks 1", "shapes": json.dumps({"w": shape})}
    save_file({"w": bits}, tmp_path / "m.safetensors", metadata)
    with pytest.raises(ValueError, match=r"m\.safetensors"):
        Masks.load(tmp_path / "m.safetensors")
