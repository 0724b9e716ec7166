"""Reconstruction that is refused, cancelled, interrupted or goes wrong leaves a model that makes sense."""

import copy
import warnings

import pytest
import torch

import perpkit as pk
from perpkit.pruning.masks import Masks
from perpkit.retraining.adapters.attach import attach
from perpkit.retraining.layerwise.reconstruct import Reconstructed, reconstruct

QUIET = {"progress": False, "batch": 5}


@pytest.fixture
def case(make_model, windows):
    """A dense model, its pruned copy with the masks, and calibration windows."""
    dense = make_model("opt")
    model = copy.deepcopy(dense)
    return dense, model, pk.prune(model, "magnitude", sparsity=0.5), windows


def snapshot(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def changed(model, before):
    return {name for name, value in model.state_dict().items() if not torch.equal(before[name], value)}


def untouched(model):
    return not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in model.modules())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"unit": "layer"},
            "unknown unit 'layer'; the units are 'matrix', 'submodule', 'block' and 'window:n'",
        ),
        ({"unit": "window:0"}, "unknown unit 'window:0'"),
        ({"unit": None}, "unknown unit None"),
        ({"target": "sparse"}, "unknown target 'sparse'; the targets are dense and propagated"),
        ({"unit": "matrix", "solver": "cg"}, "unknown solver 'cg'; the solvers are exact and gradients"),
        ({"solver": "exact"}, "finds all kept weights of a matrix; unit='submodule'"),
        ({"unit": "matrix", "solver": "exact", "trainable": "mask_lora"}, "needs solver='gradients'"),
        ({"trainable": "biases"}, "cannot train 'biases': it is not 'full', and unknown kind of adapter"),
        ({"trainable": "lora"}, "cannot be merged; take 'mask_lora'"),
        ({"trainable": "mask_lora", "rank": 40}, "rank is 40, larger than the 32 x 32 matrix"),
        ({"steps": 0}, "steps=0"),
        ({"steps": 2.0}, r"steps is 2\.0; it must be a whole number"),
        ({"batch": 1.5}, r"batch is 1\.5; it must be a whole number"),
        ({"length": 8.0}, r"length is 8\.0; it must be a whole number"),
        ({"lr": -1.0}, "lr=-1.0"),
        ({"ridge": -0.5, "unit": "matrix"}, "ridge is -0.5"),
        ({"batch": 0}, "batch=0"),
        ({"length": 1}, "length=1"),
    ],
)
def test_bad_options_are_named_and_change_nothing(case, options, message):
    dense, model, masks, windows = case
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        reconstruct(model, dense, masks, windows, **{**QUIET, **options})
    assert not changed(model, before)
    assert untouched(model)


def test_models_masks_and_data_must_fit(case, make_model):
    dense, model, masks, windows = case
    other = make_model("opt", ffn_dim=64)
    with pytest.raises(
        ValueError, match=r"dense is another model: it has no '.*fc1.weight' of shape \(48, 32\)"
    ):
        reconstruct(model, other, masks, windows, **QUIET)
    with pytest.raises(ValueError, match="dense shares its weights with the model: give a copy"):
        reconstruct(model, model, masks, windows, **QUIET)
    with pytest.raises(ValueError, match="pruned weights are not zero"):
        reconstruct(copy.deepcopy(dense), dense, masks, windows, **QUIET)
    with pytest.raises(ValueError, match="the masks are of no prunable matrix"):
        reconstruct(model, dense, Masks({}), windows, **QUIET)
    with pytest.raises(ValueError, match="vocabulary has 64 tokens"):
        reconstruct(model, dense, masks, windows + 60, **QUIET)
    with pytest.raises(ValueError, match="calibration is a list; want a tensor"):
        reconstruct(model, dense, masks, [[1, 2, 3]], **QUIET)
    with pytest.raises(ValueError, match="want token windows, which are whole numbers"):
        reconstruct(model, dense, masks, windows.float(), **QUIET)
    attach(model, masks, "mask_lora", rank=2)
    with pytest.raises(ValueError, match=r"there are adapters on the model; merge\(model\) before"):
        reconstruct(model, dense, masks, windows, **QUIET)


def test_experts_cannot_be_trained_alone(make_model, windows):
    dense = make_model("mixtral")
    model = copy.deepcopy(dense)
    masks = pk.prune(model, "magnitude", sparsity=0.5)
    with pytest.raises(ValueError, match=r"experts.gate_up_proj\[0\]' is one expert of a fused mixture"):
        reconstruct(model, dense, masks, windows, unit="matrix", trainable="mask_lora", **QUIET)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_offloading_needs_a_gpu(case):
    dense, model, masks, windows = case
    with pytest.raises(ValueError, match="there is none here"):
        reconstruct(model, dense, masks, windows, offload=True, **QUIET)


@pytest.mark.parametrize("unit", ["matrix", "submodule"])
def test_activations_that_are_not_finite_are_named_and_all_is_undone(case, unit):
    dense, model, masks, windows = case
    for which in (model, dense):
        which.model.decoder.layers[1].final_layer_norm.bias.data[3] = float("inf")
    before = snapshot(model)
    where = "fc1.weight" if unit == "matrix" else r"fc1\+fc2"
    with pytest.raises(ValueError, match=f"layers.1.{where}' is NaN or infinite"):
        reconstruct(model, dense, masks, windows, unit=unit, steps=3, **QUIET)
    assert not changed(model, before)
    assert untouched(model)


@pytest.mark.parametrize("trainable", ["full", "mask_lora"])
@pytest.mark.parametrize("lr", [10.0, 1e30])
def test_a_unit_that_gets_worse_is_put_back_and_named(case, lr, trainable):
    dense, model, masks, windows = case
    before = snapshot(model)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        table = reconstruct(
            model, dense, masks, windows, lr=lr, steps=4, trainable=trainable, rank=4, **QUIET
        )
    for unit, each in zip(table["unit"], told, strict=True):
        assert str(each.message).startswith(f"{unit!r} got worse, from an error of ")
        assert "and is as it was" in str(each.message)
    assert not changed(model, before)
    assert torch.equal(torch.tensor(table["after"]), torch.tensor(table["before"]))
    assert untouched(model)


def test_progress_is_told_unit_by_unit(case):
    dense, model, masks, windows = case
    told = []
    table = reconstruct(model, dense, masks, windows, steps=2, on_unit=told.append, **QUIET)
    assert all(isinstance(each, Reconstructed) and each.seconds > 0 for each in told)
    assert [(each.done, each.total) for each in told] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert [(each.unit, each.before, each.after) for each in told] == [
        tuple(row) for row in table[["unit", "before", "after"]].to_numpy()
    ]


@pytest.mark.parametrize("unit", ["matrix", "submodule", "block"])
def test_cancelled_between_units_the_rest_is_as_it_was(case, unit):
    dense, model, masks, windows = case
    before, told = snapshot(model), []
    table = reconstruct(
        model,
        dense,
        masks,
        windows,
        unit=unit,
        steps=2,
        on_unit=told.append,
        cancelled=lambda: len(told) == 1,
        **QUIET,
    )
    assert len(table) == 1
    moved = changed(model, before)
    assert moved
    name = table["unit"][0]
    assert all(each.startswith(name) for each in moved)
    masks.check(model)


@pytest.mark.parametrize("trainable", ["full", "mask_lora"])
def test_cancelled_in_the_midst_of_a_unit_it_is_as_it_was(case, trainable):
    dense, model, masks, windows = case
    before = snapshot(model)
    asked = iter(range(100))
    options = {"trainable": trainable, "rank": 2, "steps": 50, "lr": 1e-3, **QUIET}
    table = reconstruct(model, dense, masks, windows, cancelled=lambda: next(asked) > 8, **options)
    assert len(table) == 0
    assert not changed(model, before)
    assert untouched(model)


@pytest.mark.parametrize("trainable", ["full", "mask_lora"])
def test_interrupted_it_keeps_the_finished_units_and_their_errors(case, trainable, monkeypatch):
    dense, model, masks, windows = case
    before, finished = snapshot(model), []

    def interrupt():
        if finished and next(steps) > 3:
            raise KeyboardInterrupt
        return False

    steps = iter(range(100))
    options = {"trainable": trainable, "rank": 2, "steps": 20, "lr": 1e-3, **QUIET}
    with pytest.raises(KeyboardInterrupt) as stopped:
        reconstruct(model, dense, masks, windows, cancelled=interrupt, on_unit=finished.append, **options)
    assert list(stopped.value.table["unit"]) == ["model.decoder.layers.0.self_attn"]
    assert "1 of 4 units are reconstructed" in stopped.value.__notes__[0]
    moved = changed(model, before)
    assert moved
    assert all(".0.self_attn." in name for name in moved)
    masks.check(model)
    assert untouched(model)


def test_an_error_of_the_callers_own_callback_undoes_all(case):
    dense, model, masks, windows = case
    before, told = snapshot(model), []

    def fails(unit):
        told.append(unit)
        if len(told) == 3:
            raise RuntimeError("a widget is gone")

    with pytest.raises(RuntimeError, match="a widget is gone"):
        reconstruct(model, dense, masks, windows, unit="matrix", on_unit=fails, **QUIET)
    assert not changed(model, before)
