"""Masks: exact, explicit, checkable, and the same after a trip to the disk."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from perpkit.pruning.masks import Masks, keep_highest
from perpkit.pruning.prune import prune

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
INFINITY = math.inf
# Few values, so that ties are heavy; both zeros and both infinities among them.
TIED = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, INFINITY, -INFINITY])
SCORES = st.one_of(
    st.lists(TIED, min_size=1, max_size=40),
    st.lists(st.floats(allow_nan=False), min_size=1, max_size=40),
    st.lists(st.floats(allow_nan=False, width=16), min_size=1, max_size=40),
)
SPARSITIES = st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.floats(0, 1))


def slowly(scores, sparsity):
    """Sort by score, then by position; the first `round(sparsity · n)` are pruned."""
    order = sorted(range(len(scores)), key=lambda i: (scores[i], i))
    pruned = set(order[: round(sparsity * len(scores))])
    return [i not in pruned for i in range(len(scores))]


# --- selection --------------------------------------------------------------------------------------


@given(SCORES, SPARSITIES, st.sampled_from(DTYPES))
def test_selection_equals_sorting(scores, sparsity, dtype):
    tensor = torch.tensor(scores, dtype=torch.float64).to(dtype)
    mask = keep_highest(tensor, sparsity)
    assert mask.dtype == torch.bool
    assert mask.tolist() == slowly(tensor.double().tolist(), sparsity)


@given(SCORES, SPARSITIES)
def test_the_count_is_exact(scores, sparsity):
    mask = keep_highest(torch.tensor(scores, dtype=torch.float64), sparsity)
    assert int((~mask).sum()) == round(sparsity * len(scores))


@given(SCORES, SPARSITIES, SPARSITIES)
def test_more_sparsity_only_prunes_more(scores, one, other):
    less, more = sorted((one, other))
    tensor = torch.tensor(scores, dtype=torch.float64)
    assert not (keep_highest(tensor, more) & ~keep_highest(tensor, less)).any()


@given(st.integers(1, 6), st.integers(1, 6), SPARSITIES, st.integers(0, 99))
def test_a_matrix_is_compared_as_a_whole(rows, columns, sparsity, seed):
    scores = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    mask = keep_highest(scores, sparsity)
    assert mask.shape == scores.shape
    assert torch.equal(mask.flatten(), keep_highest(scores.flatten(), sparsity))
    # a transposed view is a matrix like any other
    assert int(keep_highest(scores.T, sparsity).sum()) == int(mask.sum())


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_matrices_full_of_ties(dtype):
    # the published implementations prune every score up to the threshold, here all of them
    scores = torch.ones(300, 300, dtype=dtype)
    scores[:, 0] = 2
    mask = keep_highest(scores, 0.5)
    assert int((~mask).sum()) == 45_000
    assert mask[:, 0].all()
    assert mask.flatten().tolist() == slowly(scores.flatten().tolist(), 0.5)


def test_scores_are_left_as_they_are():
    scores = torch.tensor([3.0, 1.0, 2.0])
    keep_highest(scores, 0.5)
    assert scores.tolist() == [3.0, 1.0, 2.0]


@pytest.mark.parametrize("sparsity", [-0.1, 1.1, 50, math.nan])
def test_sparsity_is_a_fraction(sparsity):
    with pytest.raises(ValueError, match=f"sparsity is {sparsity}; it is the fraction of pruned weights"):
        keep_highest(torch.ones(4), sparsity)


def test_nan_scores_are_refused():
    with pytest.raises(ValueError, match="a score is NaN"):
        keep_highest(torch.tensor([1.0, math.nan]), 0.5)


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
