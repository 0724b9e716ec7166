"""Retraining gives the model back as it came: flags, modes, finished steps."""

import copy

import pytest
import torch
from retrain_parts import same, snapshot, train

from perpkit.pruning.prune import prune


@pytest.fixture
def pruned(make_model):
    """A small OPT at 60 % sparsity and its masks."""
    model = make_model("opt")
    return model, prune(model, "magnitude", sparsity=0.6)


# --- the model is given back as it came ---------------------------------------------------------------


def unusual(model):
    """Flags and modes that nobody would restore by chance."""
    model.train()
    model.model.decoder.layers[0].eval()
    model.model.decoder.embed_positions.weight.requires_grad_(False)
    model.model.decoder.layers[1].fc1.bias.requires_grad_(False)


def flags(model):
    modes = {name: module.training for name, module in model.named_modules()}
    return modes, {name: p.requires_grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("end", ["done", "cancelled", "error", "loss not finite"])
def test_flags_and_modes_come_back(pruned, windows, end):
    model, masks = pruned
    unusual(model)
    before = flags(model)

    def fail(step, loss):
        raise RuntimeError("the caller's own error")

    if end == "done":
        train(model, windows, masks)
    elif end == "cancelled":
        train(model, windows, masks, cancelled=lambda: True)
    elif end == "error":
        with pytest.raises(RuntimeError, match="the caller's own error"):
            train(model, windows, masks, on_step=fail)
    else:
        with pytest.raises(ValueError, match="the loss became"):
            train(model, windows, masks, lr=1e30)
    assert flags(model) == before
    assert all(parameter.grad is None for parameter in model.parameters())


def test_it_trains_in_training_mode(pruned, windows):
    model, masks = pruned
    modes = []
    hook = model.register_forward_pre_hook(
        lambda module, _: modes.append((module.training, torch.is_grad_enabled()))
    )
    train(model, windows, masks, steps=2)
    hook.remove()
    assert [mode for mode, differentiated in modes if differentiated] == [True, True]
    assert not any(mode for mode, differentiated in modes if not differentiated)
    assert not model.training


@pytest.mark.parametrize("stop", [0, 1, 3])
def test_cancelling_keeps_the_finished_steps(pruned, windows, stop):
    model, masks = pruned
    whole, states = copy.deepcopy(model), [snapshot(model)]
    train(whole, windows, masks, "full", steps=5, on_step=lambda *_: states.append(snapshot(whole)))
    asked = []

    def cancelled():
        asked.append(None)
        return len(asked) > stop

    history = train(model, windows, masks, "full", steps=5, cancelled=cancelled)
    assert len(history) == stop
    assert len(asked) == stop + 1
    assert same(model, states[stop])


def test_no_steps_change_nothing(pruned, windows):
    model, masks = pruned
    before = snapshot(model)
    history = train(model, windows, masks, "full", steps=0)
    assert len(history) == 0
    assert list(history.columns) == ["step", "loss", "lr"]
    assert same(model, before)
