"""Batch normalisation: statistics re-estimated exactly, and moved only where the subset trains them."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from perpkit.retraining.batchnorm import recalibrate_batchnorm


def network(seed=0):
    """A small convolutional network with dropout, in evaluation mode, its statistics far off."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(
            *(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(4, 3, 3)),
            *(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 5), nn.BatchNorm1d(5)),
        ).double()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                module.running_mean.normal_(5)
                module.running_var.uniform_(3, 4)
    return model.eval()


def images(count, seed=0):
    return torch.randn(count, 2, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@given(st.integers(2, 23), st.integers(1, 30), st.integers(0, 3))
def test_one_layer_gets_the_exact_mean_and_variance(count, batch, seed):
    model = nn.Sequential(nn.BatchNorm2d(2)).double()
    inputs = 3 + images(count, seed)
    recalibrate_batchnorm(model, inputs, batch=batch)
    values = inputs.transpose(0, 1).flatten(1)
    assert torch.allclose(model[0].running_mean, values.mean(1), rtol=1e-12)
    assert torch.allclose(model[0].running_var, values.var(1), rtol=1e-12)


def test_a_deep_network_in_one_batch_is_normalised_layer_by_layer():
    model, inputs = network(), images(20)
    recalibrate_batchnorm(model, inputs)
    # with its own statistics every layer's output has mean zero and variance one, but for bias correction
    x = inputs
    for module in model:
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            values = x.transpose(0, 1).flatten(1)
            assert torch.allclose(module.running_mean, values.mean(1), rtol=1e-9, atol=1e-12)
            # the layers before were normalised by the biased variance, as in training
            assert torch.allclose(module.running_var, values.var(1), rtol=1e-9)
            shift, scale = values.mean(1), values.var(1, correction=0)
            shape = [1, -1] + [1] * (x.ndim - 2)
            x = (x - shift.view(shape)) / (scale.view(shape) + module.eps).sqrt()
        else:
            x = module(x)


def test_only_the_statistics_change():
    model = network()
    model[0].train()
    before, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    recalibrate_batchnorm(model, images(20), batch=7)
    assert [module.training for module in model.modules()] == modes
    assert all(module.track_running_stats for module in model.modules() if hasattr(module, "running_mean"))
    for name, value in model.state_dict().items():
        moved = name.rpartition(".")[2] in ("running_mean", "running_var", "num_batches_tracked")
        assert torch.equal(value, before[name]) != moved, name
    assert model[1].num_batches_tracked == 3
    assert not any(value.requires_grad and value.grad is not None for value in model.parameters())


def test_a_single_input_left_over_is_no_trouble():
    # 9 in batches of 4 would end with one alone, which no dense layer can normalise
    recalibrate_batchnorm(network(), images(9), batch=4)


def test_an_error_leaves_the_model_as_it_was():
    model = network()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError):
        recalibrate_batchnorm(model, torch.zeros(4, 3, 6, 6, dtype=torch.float64))
    for count, batch in ((0, 4), (4, 0)):
        with pytest.raises(ValueError, match=f"{count} inputs in batches of {batch}"):
            recalibrate_batchnorm(model, images(count), batch=batch)
    with pytest.raises(ValueError, match=r"the inputs are a tuple; give a tensor .*images\.train\[0\]"):
        recalibrate_batchnorm(model, (images(4), torch.zeros(4)))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        recalibrate_batchnorm(model, images(4), batch=1)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module.training for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())
    with pytest.raises(ValueError, match="a Linear has no batch normalisation"):
        recalibrate_batchnorm(nn.Linear(2, 2), torch.zeros(2, 2))


def test_a_layer_that_is_not_called_keeps_its_statistics():
    model = nn.Sequential(nn.BatchNorm1d(2))
    model[0].spare = nn.BatchNorm1d(3)
    recalibrate_batchnorm(model, torch.randn(8, 2))
    assert torch.equal(model[0].spare.running_var, torch.ones(3))
    assert not torch.equal(model[0].running_var, torch.ones(2))


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_far_from_zero_nothing_is_lost(dtype, rtol):
    """The textbook difference of squares would lose all of the variance here."""
    model = nn.Sequential(nn.BatchNorm2d(2)).to(dtype)
    inputs = (8 + images(40) / 100).to(dtype)
    recalibrate_batchnorm(model, inputs, batch=7)
    values = inputs.double().transpose(0, 1).flatten(1)
    assert torch.allclose(model[0].running_mean.double(), values.mean(1), rtol=rtol)
    assert torch.allclose(model[0].running_var.double(), values.var(1), rtol=rtol)


def test_pictures_of_another_precision_become_the_models():
    one, two = network().bfloat16(), network().bfloat16()
    recalibrate_batchnorm(one, images(20))
    recalibrate_batchnorm(two, images(20).bfloat16())
    assert all(torch.equal(value, two.state_dict()[name]) for name, value in one.state_dict().items())
