"""What sparsity buys: the computed sizes are those of arrays that were really packed."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from perpkit.pruning.layers import prunable_matrices
from perpkit.pruning.masks import Masks
from perpkit.pruning.prune import prune
from perpkit.pruning.storage import storage

VALUE = {torch.float64: 8, torch.float32: 4, torch.bfloat16: 2}


def packed(weight, mask):
    """A matrix really stored in each format: the bytes of its arrays."""
    values = weight[mask]
    bits = np.packbits(mask.numpy())
    columns = np.concatenate([row.nonzero()[:, 0].numpy() for row in mask]).astype(np.int32)
    rows = np.cumsum([0, *mask.sum(1).tolist()]).astype(np.int32)
    inside = (columns % 256).astype(np.uint8)
    starts = np.cumsum([0, *mask.sum(1).tolist()])[:-1].astype(np.uint32)
    offsets = np.array([[int(tile.sum()) for tile in row.split(256)] for row in mask])
    offsets = np.cumsum(offsets, 1).astype(np.uint16)
    element = weight.element_size()
    return {
        "dense": weight.numel() * element,
        "bitmask": bits.nbytes + values.numel() * element,
        "csr": values.numel() * element + columns.nbytes + rows.nbytes,
        "tiles": values.numel() * element + inside.nbytes + offsets.nbytes + starts.nbytes,
    }


def sizes(model, masks, column="matrices"):
    return storage(model, masks).set_index("format")[column].to_dict()


@pytest.mark.parametrize("dtype", VALUE)
@pytest.mark.parametrize("width", [7, 256, 600])
def test_sizes_are_those_of_packed_arrays(width, dtype):
    model = nn.Sequential(nn.Linear(width, 5), nn.ReLU(), nn.Linear(5, 3)).to(dtype)
    masks = prune(model, "magnitude", sparsity=0.63, group="layer")
    wanted = {}
    for name, mask in masks.items():
        for kind, size in packed(model.get_parameter(name).detach(), mask).items():
            wanted[kind] = wanted.get(kind, 0) + size
    found = sizes(model, masks)
    assert math.isnan(found.pop("2:4"))
    assert found == wanted


def test_every_architecture_packs_as_its_matrices(any_model):
    masks = prune(any_model, "magnitude", sparsity=0.5)
    whole = sum(parameter.numel() * 4 for parameter in any_model.parameters())
    wanted = dict.fromkeys(("dense", "bitmask", "csr", "tiles"), 0)
    for matrix in prunable_matrices(any_model).values():
        mask = matrix.view(masks[matrix.parameter])
        for kind, size in packed(matrix.view(matrix.weight()).detach(), mask).items():
            wanted[kind] += size
    table = storage(any_model, masks).set_index("format")
    assert table["matrices"].drop("2:4").to_dict() == wanted
    rest = whole - wanted["dense"]
    assert table["model"].drop("2:4").to_dict() == {kind: size + rest for kind, size in wanted.items()}
    assert table["relative"]["dense"] == 1
    assert table["relative"]["bitmask"] == pytest.approx((wanted["bitmask"] + rest) / whole)


def test_two_of_four_halves_the_values_and_adds_two_bits_each(make_model):
    model = make_model("llama", dtype=torch.bfloat16)
    masks = prune(model, "magnitude", pattern="2:4")
    weights = sum(mask.numel() for mask in masks.values())
    assert sizes(model, masks)["2:4"] == weights / 2 * 2 + weights / 2 * 2 / 8
    # fewer than two of four are stored as two, more cannot be
    assert sizes(model, prune(model, "magnitude", pattern="1:4"))["2:4"] == sizes(model, masks)["2:4"]
    first = next(iter(masks))
    masks[first][0, :4] = torch.tensor([True, True, True, False])
    assert math.isnan(sizes(model, masks)["2:4"])


def test_a_tied_head_is_counted_once(make_model):
    model = make_model("gpt2")
    assert model.lm_head.weight is model.transformer.wte.weight
    masks = prune(model, "magnitude", sparsity=0.5)
    assert sizes(model, masks, "model")["dense"] == 4 * sum(p.numel() for p in model.parameters())


def test_matrices_without_masks_stay_dense(make_vision):
    model = make_vision("cifar")
    masks = prune(model, "magnitude", sparsity={"linear.weight": 0.5})
    only = Masks({"linear.weight": masks["linear.weight"]})
    assert sizes(model, only)["dense"] == 640 * 4
    assert sizes(model, only)["bitmask"] == 320 * 4 + 80
    assert sizes(model, only, "model")["dense"] == 269722 * 4
    assert sizes(model, Masks({}), "relative") == dict.fromkeys(
        ("dense", "bitmask", "csr", "tiles", "2:4"), 1.0
    )


def test_masks_of_another_model_are_refused(make_model):
    masks = prune(make_model("opt"), "magnitude", sparsity=0.5)
    with pytest.raises(ValueError, match=r"another model: this one has no 'model\.decoder"):
        storage(make_model("llama"), masks)
    with pytest.raises(ValueError, match=r"another model: .*fc1\.weight' has another shape here"):
        storage(make_model("opt", ffn_dim=40), masks)
