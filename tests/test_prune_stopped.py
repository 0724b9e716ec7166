"""Progress, and pruning that is cancelled, interrupted or fails between two matrices."""

import copy
import io
import sys
from functools import partial

import pytest
import torch
from pruning_parts import snapshot, unchanged, untouched

from perpkit.pruning.layers import prunable_matrices
from perpkit.pruning.masks import Masks
from perpkit.pruning.prune import Pruned, prune

CRITERIA = ["magnitude", "wanda", "sparsegpt"]
# One of every kind of matrix: plain, transposed, expert; and layer by layer.
MODELS = ["opt", "gpt2", "qwen3_moe", "sequential"]


@pytest.fixture(params=MODELS)
def case(request, make_model, make_vision, windows, images):
    """A model and its calibration data."""
    if request.param == "sequential":
        return make_vision("sequential"), images[:3, :, ::2, ::2]
    return make_model(request.param), windows[:4]


def run(case, criterion, **options):
    model, data = case
    return prune(
        model, criterion, sparsity=0.5, group="layer", calibration=data, batch=2, progress=False, **options
    )


def names_of(case):
    """The matrices in the order in which they are pruned."""
    seen = []
    run((copy.deepcopy(case[0]), case[1]), "magnitude", on_layer=lambda event: seen.append(event.layer))
    return seen


def consistent(model, before, wanted, masks, finished):
    """The finished matrices are as in the finished run, the rest as before, and the masks say which."""
    masks.check(model)
    values, ended = snapshot(model), snapshot(wanted[0])
    for name, value in values.items():
        matrices = [m for m in prunable_matrices(model).values() if m.parameter == name]
        if not matrices:
            assert torch.equal(value, before[name])
            continue
        for matrix in matrices:
            source = ended if matrix.name in finished else before
            assert torch.equal(matrix.part(value), matrix.part(source[name])), matrix.name
            if matrix.name in finished:
                assert torch.equal(matrix.part(masks[name]), matrix.part(wanted[1][name]))
            elif name in masks:
                assert matrix.part(masks[name]).all()
    assert untouched(model)


# --- told ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_matrix_is_told_with_its_block_and_error(case, criterion):
    events = []
    model = case[0]
    count = len(prunable_matrices(model))
    run(case, criterion, on_layer=events.append)
    assert {event.layer for event in events} == set(prunable_matrices(model))
    assert [event.done for event in events] == list(range(1, count + 1))
    for event in events:
        assert isinstance(event, Pruned)
        assert event.layer.startswith(event.block)
        assert event.total == count
        assert event.seconds > 0
        assert 0 < event.error < 1


def test_the_error_of_magnitude_is_that_of_the_weights(make_model):
    model, errors = make_model("gpt2"), {}
    before = {name: matrix.weight().detach().clone() for name, matrix in prunable_matrices(model).items()}
    prune(model, "magnitude", sparsity=0.5, on_layer=lambda event: errors.update({event.layer: event.error}))
    for name, matrix in prunable_matrices(model).items():
        lost = (before[name] - matrix.weight().detach()).square().sum() / before[name].square().sum()
        assert errors[name] == pytest.approx(float(lost))


@torch.no_grad()
def test_the_error_of_sparsegpt_is_that_of_the_outputs(make_model, windows):
    model, errors = make_model("llama").double(), {}
    dense = copy.deepcopy(model)
    prune(
        model,
        "sparsegpt",
        sparsity=0.5,
        calibration=windows[:4],
        progress=False,
        on_layer=lambda event: errors.update({event.layer: event.error}),
    )
    # the first block's attention reads what it would have read in the dense model
    name = "model.layers.0.self_attn.q_proj"
    seen = []
    dense.get_submodule(name).register_forward_hook(lambda _, x, y: seen.append((x[0], y)))
    dense(windows[:4])
    inputs, outputs = seen[0]
    lost = (model.get_submodule(name)(inputs) - outputs).square().sum() / outputs.square().sum()
    assert errors[f"{name}.weight"] == pytest.approx(float(lost))


def test_without_a_listener_the_same_is_pruned(case):
    other = copy.deepcopy(case[0]), case[1]
    one, two = run(case, "wanda"), run(other, "wanda", on_layer=lambda event: None)
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("criterion", ["magnitude", "wanda"])
def test_progress_is_silent_unless_it_takes_long(make_model, windows, criterion, monkeypatch):
    shown = io.StringIO()
    monkeypatch.setattr(sys, "stderr", shown)
    prune(make_model("opt"), criterion, sparsity=0.5, calibration=windows)
    assert not shown.getvalue()
    module = sys.modules[prune.__module__]
    bar = module.tqdm
    monkeypatch.setattr(module, "tqdm", lambda **options: bar(**{**options, "delay": 0, "file": shown}))
    prune(make_model("opt"), criterion, sparsity=0.5, calibration=windows)
    assert "prune" in shown.getvalue()
    assert "/12" in shown.getvalue()


# --- stopped ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", CRITERIA)
def test_cancelled_before_each_matrix(case, criterion):
    names = names_of(case)
    before = snapshot(case[0])
    finished = copy.deepcopy(case[0]), case[1]
    order = []
    wanted = run(finished, criterion, on_layer=lambda event: order.append(event.layer))
    assert sorted(order) == sorted(names)
    for stop in range(len(names) + 1):
        model = copy.deepcopy(case[0])
        done = []
        masks = run(
            (model, case[1]),
            criterion,
            on_layer=lambda event, done=done: done.append(event.layer),
            cancelled=lambda done=done, stop=stop: len(done) >= stop,
        )
        assert done == order[:stop]
        consistent(model, before, (finished[0], wanted), masks, order[:stop])


@pytest.mark.parametrize("criterion", CRITERIA)
def test_interrupted_after_each_matrix(case, criterion):
    before = snapshot(case[0])
    finished = copy.deepcopy(case[0]), case[1]
    order = []
    wanted = run(finished, criterion, on_layer=lambda event: order.append(event.layer))

    def interrupt(event):
        if event.done == stop:
            raise KeyboardInterrupt

    for stop in range(1, len(order) + 1):
        model = copy.deepcopy(case[0])
        with pytest.raises(KeyboardInterrupt) as caught:
            run((model, case[1]), criterion, on_layer=interrupt)
        masks = caught.value.masks
        assert isinstance(masks, Masks)
        assert f"{stop} of {len(order)} matrices are pruned" in caught.value.__notes__[0]
        consistent(model, before, (finished[0], wanted), masks, order[:stop])


@pytest.mark.parametrize("criterion", CRITERIA)
def test_interrupted_between_a_mask_and_its_weights(make_model, windows, criterion, monkeypatch):
    model = make_model("opt")
    before = snapshot(model)
    matrix = prunable_matrices(model)["model.decoder.layers.1.fc1.weight"]
    inner = type(matrix).assign

    def assign(self, tensor, values):
        if self.name == matrix.name and tensor.dtype != torch.bool:
            raise KeyboardInterrupt
        inner(self, tensor, values)

    monkeypatch.setattr(type(matrix), "assign", assign)
    with pytest.raises(KeyboardInterrupt) as caught:
        prune(model, criterion, sparsity=0.5, calibration=windows, progress=False)
    masks = caught.value.masks
    masks.check(model)
    weight, mask = matrix.weight(), masks[matrix.parameter]
    assert torch.equal(weight, before[matrix.parameter] * mask)
    assert "model.decoder.layers.1.fc2.weight" not in masks
    assert untouched(model)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_failing_listener_leaves_the_model_as_it_was(case, criterion):
    names = names_of(case)
    before = snapshot(case[0])

    def fail(event, stop):
        if event.done == stop:
            raise RuntimeError("no widget")

    for stop in range(1, len(names) + 1):
        with pytest.raises(RuntimeError, match="no widget"):
            run(case, criterion, on_layer=partial(fail, stop=stop))
        assert unchanged(case[0], before)
        assert untouched(case[0])


@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_cancelled_run_is_taken_up_again(case, criterion):
    finished = copy.deepcopy(case[0]), case[1]
    wanted = run(finished, criterion)
    asked, half = [], len(prunable_matrices(case[0])) // 2
    partly = run(case, criterion, cancelled=lambda: asked.append(0) or len(asked) > half + 1)
    assert any(mask.all() for mask in partly.values()) or len(partly) < len(wanted)
    masks = run(case, criterion, masks=partly)
    assert masks.keys() == wanted.keys()
    assert masks.sparsity() == wanted.sparsity()
    for name, mask in partly.items():
        assert not (masks[name] & ~mask).any()
        # (what a half-pruned block makes of its inputs is not what the dense block made)
        assert criterion != "magnitude" or torch.equal(masks[name], wanted[name])
    masks.check(case[0])
