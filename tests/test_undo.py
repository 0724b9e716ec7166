"""Weights come back bit for bit, wherever they have gone in the meantime."""

import math
import shutil
from collections import namedtuple
from contextlib import ExitStack

import pytest
import torch
from pruning_parts import snapshot, unchanged

from perpkit.pruning.layers import prunable_matrices
from perpkit.pruning.undo import Undo


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("architecture", ["gpt2", "mixtral"])
def test_all_values_come_back(make_model, architecture, dtype):
    model = make_model(architecture, dtype=dtype)
    matrices = list(prunable_matrices(model).values())
    matrices[0].weight().view(-1)[:3] = torch.tensor([math.nan, math.inf, -0.0])
    before = snapshot(model)
    with Undo(matrices) as undo:
        for matrix in matrices[:-1]:
            undo.remember(matrix)
            matrix.assign(matrix.weight(), torch.zeros_like(matrix.view(matrix.weight())))
        assert not unchanged(model, before)
        undo.restore()
    assert unchanged(model, before)
    assert math.copysign(1, matrices[0].weight().view(-1)[2]) == -1


@torch.no_grad()
def test_weights_that_have_moved_are_found(make_model):
    """Offloading replaces the storage of every parameter; views of the old one lead nowhere."""
    model = make_model("mixtral")
    matrices = list(prunable_matrices(model).values())
    before = snapshot(model)
    with Undo(matrices) as undo:
        for matrix in matrices:
            undo.remember(matrix)
            matrix.assign(matrix.weight(), torch.zeros_like(matrix.view(matrix.weight())))
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
        undo.restore()
    assert unchanged(model, before)


@torch.no_grad()
def test_only_what_was_remembered_comes_back(make_vision):
    model = make_vision("sequential")
    one, other, *_ = prunable_matrices(model).values()
    before = one.weight().clone()
    with Undo([one, other]) as undo:
        undo.remember(one)
        one.weight().zero_()
        other.weight().zero_()
        undo.restore()
    assert torch.equal(one.weight(), before)
    assert not other.weight().any()


@torch.no_grad()
def test_a_full_disk_is_said_at_once(make_vision, monkeypatch):
    model = make_vision("sequential")
    matrices = list(prunable_matrices(model).values())
    needed = 4 * sum(matrix.weight().numel() for matrix in matrices)
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(needed))
    with ExitStack() as stack:
        with pytest.warns(UserWarning, match="an error halfway will leave the model partly pruned"):
            undo = stack.enter_context(Undo(matrices))
        undo.remember(matrices[0])
        matrices[0].weight().zero_()
        undo.restore()
    assert not matrices[0].weight().any()
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(needed + 1))
    with Undo(matrices):
        pass
