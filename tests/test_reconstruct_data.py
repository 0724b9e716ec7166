"""Reconstruction of vision models, of the embedded model, and of a real one: does it help?"""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import perpkit as pk
from perpkit.retraining.layerwise.reconstruct import reconstruct
from perpkit.sources.resnet import CifarResNet


class Small(nn.Module):
    """A strided convolution, a grouped one with dilation, and a linear layer."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.second = nn.Conv2d(8, 12, 3, groups=2, dilation=2, padding=2, padding_mode="reflect")
        self.unused = nn.Linear(4, 4)
        self.linear = nn.Linear(12, 5)

    def forward(self, x):
        return self.linear(F.relu(self.second(F.relu(self.first(x)))).mean((2, 3)))


def made(build, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build().double().eval()
        return model, torch.randn(24, 3, 12, 12, dtype=torch.float64)


@pytest.mark.filterwarnings("ignore:no calibration data reached:UserWarning")
@pytest.mark.parametrize("target", ["dense", "propagated"])
def test_convolutions_are_at_their_optimum(target):
    """Gradients by autograd through the layer itself, at the final weights, vanish on the kept weights."""
    dense, images = made(Small)
    model = copy.deepcopy(dense)
    masks = pk.prune(model, "magnitude", sparsity=0.5, allocation="uniform")
    table = reconstruct(model, dense, masks, images, unit="matrix", target=target, batch=10, progress=False)
    masks.check(model)
    assert list(table["unit"]) == ["first.weight", "second.weight", "linear.weight", "unused.weight"]
    assert table.iloc[3, 1:].isna().all()
    inputs = {}
    for which in (model, dense):
        for name, module in which.named_children():
            module.register_forward_pre_hook(lambda _, args, key=(which, name): inputs.update({key: args[0]}))
    with torch.no_grad():
        model(images), dense(images)
    for name, after in zip(("first", "second", "linear"), table["after"], strict=False):
        mine, other = model.get_submodule(name), dense.get_submodule(name)
        x = inputs[model, name]
        wanted = other(inputs[dense, name] if target == "dense" else x).detach()

        def slope(mine=mine, x=x, wanted=wanted, kept=masks[f"{name}.weight"]):
            (gradient,) = torch.autograd.grad((mine(x) - wanted).square().sum(), mine.weight)
            return gradient[kept].norm()

        last = slope()
        plain = other.bias.view(1, -1, *[1] * (x.ndim - 2))
        error = (mine(x) - wanted).square().sum() / (wanted - plain).square().sum()
        assert after == pytest.approx(error.item(), rel=1e-6)
        with torch.no_grad():
            mine.weight.copy_(other.weight * masks[f"{name}.weight"])
        assert last < 0.02 * slope()


def test_layers_that_no_data_reaches_are_named():
    dense, images = made(Small)
    model = copy.deepcopy(dense)
    masks = pk.prune(model, "magnitude", sparsity=0.5, allocation="uniform")
    with pytest.warns(UserWarning, match="no calibration data reached 'unused.weight': it stays as it is"):
        reconstruct(model, dense, masks, images, unit="matrix", progress=False)


def test_a_residual_network_comes_nearer_to_the_dense_one():
    dense = made(CifarResNet)[0].float()
    images = torch.randn(12, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    model = copy.deepcopy(dense)
    masks = pk.prune(model, "magnitude", sparsity=0.7)
    with torch.no_grad():
        before = (model(images) - dense(images)).norm()
        for solver in ("exact", "gradients"):
            again = copy.deepcopy(model)
            options = {"solver": solver, "steps": 15, "batch": 6, "progress": False}
            table = reconstruct(again, dense, masks, images, unit="matrix", **options)
            masks.check(again)
            assert (table["after"] <= table["before"]).all()
            assert (again(images) - dense(images)).norm() < 0.6 * before, solver


@pytest.mark.filterwarnings("ignore:no calibration data reached:UserWarning")
@pytest.mark.parametrize("trainable", ["full", "mask_lora"])
def test_convolutions_can_be_trained_by_gradients(trainable):
    dense, images = made(Small)
    model = copy.deepcopy(dense)
    masks = pk.prune(model, "magnitude", sparsity=0.5, allocation="uniform")
    options = {"solver": "gradients", "trainable": trainable, "rank": 4, "steps": 40, "lr": 1e-2, "batch": 6}
    table = reconstruct(model, dense, masks, images, unit="matrix", progress=False, **options).iloc[:3]
    masks.check(model)
    assert (table["after"] < table["before"]).all()
    assert (table["after"] >= table["optimum"] * (1 - 1e-6)).all()


def test_other_models_have_matrices_only():
    dense, images = made(Small)
    model = copy.deepcopy(dense)
    masks = pk.prune(model, "magnitude", sparsity=0.5)
    with pytest.raises(ValueError, match="a Small has no decoder blocks: reconstruct it with unit='matrix'"):
        reconstruct(model, dense, masks, images, progress=False)
    with pytest.raises(ValueError, match=r"the shape \(0, 3, 12, 12\); want at least one row"):
        reconstruct(model, dense, masks, images[:0], unit="matrix", progress=False)


@pytest.mark.parametrize(
    ("options", "share"),
    [
        ({"unit": "matrix"}, 0.25),
        ({"unit": "matrix", "target": "propagated"}, 0.5),
        ({"unit": "submodule", "lr": 1e-2, "steps": 60}, 0.2),
        ({"unit": "submodule", "lr": 1e-2, "steps": 60, "trainable": "mask_lora"}, 0.3),
        ({"unit": "block", "lr": 1e-2, "steps": 60}, 0.2),
    ],
)
def test_the_embedded_models_perplexity_comes_back(loaded, text, options, share):
    """Of the perplexity lost by magnitude pruning at 60 %, at most this share stays."""
    dense = loaded[0]
    model = copy.deepcopy(dense)
    masks = pk.prune(model, "magnitude", sparsity=0.6)
    intact, broken = (pk.perplexity(which, text.test) for which in (dense, model))
    table = reconstruct(model, dense, masks, text.train, progress=False, **options)
    masks.check(model)
    assert (table["after"] < table["before"]).all()
    assert table["after"].mean() < 0.8 * table["before"].mean()
    assert pk.perplexity(model, text.test) - intact < share * (broken - intact)


@pytest.mark.real
def test_a_real_models_perplexity_comes_back(real_data):
    dense, tokenizer = pk.load_model(real_data / "models" / "stories260K", device="cpu")
    file = real_data / "tinystories" / "stories_1000.jsonl"
    stories = pk.load_text(file, tokenizer, length=256, windows={"train": 32, "test": 16})
    for criterion in ("magnitude", "sparsegpt"):
        model = copy.deepcopy(dense)
        options = {"calibration": stories.train} if criterion == "sparsegpt" else {}
        masks = pk.prune(model, criterion, sparsity=0.6, progress=False, **options)
        broken = pk.perplexity(model, stories.test)
        for unit in ("matrix", "submodule") if criterion == "magnitude" else ("matrix",):
            mended = copy.deepcopy(model)
            options = {"unit": unit, "steps": 20, "lr": 3e-3, "length": 128, "progress": False}
            reconstruct(mended, dense, masks, stories.train, **options)
            masks.check(mended)
            assert pk.perplexity(mended, stories.test) < broken, (criterion, unit)
