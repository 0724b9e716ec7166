"""Retraining vision models: labelled inputs, SGD, and batch normalisation where the subset trains it."""

import copy

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F

from perpkit.pruning.masks import Masks
from perpkit.retraining.loop.retrain import retrain
from perpkit.retraining.subsets import subset_parameters
from perpkit.sources.resnet import CifarResNet

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class Small(nn.Sequential):
    """Two convolutions with batch norm, in-place ReLU and dropout, and a linear head."""

    def __init__(self, **changes):
        super().__init__(
            *(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True)),
            *(nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)),
        )


def make(kind):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "transformers":
            config = transformers.ResNetConfig(
                embedding_size=6, hidden_sizes=[6, 8], depths=[1, 1], layer_type="basic", num_labels=4
            )
            return transformers.ResNetForImageClassification(config).eval()
        return (Small() if kind == "small" else CifarResNet(20, classes=4)).eval()


@pytest.fixture(scope="module")
def data():
    """Forty pictures [3, 16, 16] of four classes, told by their mean colour and noise."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(40) % 4
    colours = torch.randn(4, 3, 1, 1, generator=generator)
    return colours[labels] + 0.5 * torch.randn(40, 3, 16, 16, generator=generator), labels


def pruned(kind):
    model = make(kind)
    masks = Masks({name: p.abs() > p.abs().median() for name, p in model.named_parameters() if p.ndim == 4})
    masks.apply(model)
    return model, masks


def train(model, data, masks, subset, **changes):
    options = {
        "optimizer": "sgd",
        "lr": 0.05,
        "weight_decay": 1e-4,
        "batch": 10,
        "steps": 4,
        "progress": False,
    }
    return retrain(model, data, masks=masks, subset=subset, **{**options, **changes})


def test_it_follows_a_slow_transcription(data):
    model, masks = pruned("small")
    model, inputs = model.double(), data[0].double()
    slow = copy.deepcopy(model).train()
    options = {"batch": 40, "steps": 3, "schedule": "constant"}
    history = train(model, (inputs, data[1]), masks, "full", **options)
    velocity = {name: torch.zeros_like(p) for name, p in slow.named_parameters()}
    losses = []
    for _ in range(3):
        # in the order of the data: a whole batch has no other
        loss = -slow(inputs).softmax(1)[range(40), data[1]].log().mean()
        losses.append(loss.item())
        gradients = torch.autograd.grad(loss, list(slow.parameters()))
        with torch.no_grad():
            for (name, p), gradient in zip(slow.named_parameters(), gradients, strict=True):
                velocity[name] = 0.9 * velocity[name] + gradient + 1e-4 * p
                p -= 0.05 * velocity[name]
                p *= masks.get(name, torch.ones(()))
    assert history.loss.tolist() == pytest.approx(losses, rel=1e-9)
    for name, value in slow.state_dict().items():
        assert torch.allclose(model.state_dict()[name].double(), value.double(), rtol=1e-7, atol=1e-9), name


@pytest.mark.parametrize("kind", ["small", "cifar", "transformers"])
def test_it_learns_and_keeps_the_masks(data, kind):
    model, masks = pruned(kind)
    history = train(model, data, masks, "full", steps=40)
    assert history.loss.iloc[-5:].mean() < 0.5 * history.loss.iloc[:5].mean()
    masks.check(model)
    assert not model.training


@pytest.mark.parametrize("kind", ["small", "cifar", "transformers"])
@pytest.mark.parametrize(
    ("subset", "moved"),
    [
        ("full", True),
        ("norms", True),
        ("biases", True),  # the shifts of normalisations are among them
        ("head", False),
        ("perp_v1:biases", True),
        ("perp_v1:bn_recalibrate+head", True),
        ("perp_v1:linear_probing", True),
    ],
)
def test_statistics_move_where_the_subset_trains_them(data, kind, subset, moved):
    model, masks = pruned(kind)
    before, trained = copy.deepcopy(model.state_dict()), subset_parameters(model, subset)
    train(model, data, masks, subset)
    for name, value in model.state_dict().items():
        expected = moved if name.rpartition(".")[2] in STATISTICS else name in trained
        assert torch.equal(value, before[name]) != expected, name


def test_recalibrating_alone_trains_nothing(data):
    model, masks = pruned("small")
    with pytest.raises(
        ValueError, match=r"no parameters to train; call recalibrate_batchnorm\(model, inputs\)"
    ):
        train(model, data, masks, "perp_v1:bn_recalibrate")


@pytest.mark.parametrize("lr", [1e30, 1e38])
def test_a_run_that_explodes_brings_the_statistics_back_too(data, lr):
    model, masks = pruned("small")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"the model (is as it was|has the weights of step)"):
        train(model, data, masks, "full", lr=lr, schedule="constant", clip=1e9)
    for name, value in model.state_dict().items():
        assert value.isfinite().all(), name
    masks.check(model)
    fresh = torch.equal(model[1].num_batches_tracked, before["1.num_batches_tracked"])
    assert fresh or model[1].num_batches_tracked < 4


def test_a_large_loss_is_no_infinite_perplexity(data):
    model, masks = pruned("small")
    with torch.no_grad():
        model[-1].weight.mul_(1e5)
    history = train(model, data, masks, "biases", lr=1e-9, steps=1)
    assert history.loss[0] > 1000


def test_distillation_of_labels(data):
    dense = make("small").double()
    model, masks = pruned("small")
    model, inputs = model.double(), data[0].double()
    with torch.no_grad():
        logits, teacher = copy.deepcopy(model).train()(inputs), dense(inputs)
        entropy = F.cross_entropy(logits, data[1])
        divergence = F.kl_div((logits / 2).log_softmax(1), (teacher / 2).softmax(1), reduction="batchmean")
    options = {"distill": dense, "distill_weight": 0.25, "temperature": 2.0, "batch": 40, "steps": 1}
    history = train(model, (inputs, data[1]), masks, "full", **options)
    assert history.loss[0] == pytest.approx((0.75 * entropy + 0.25 * 4 * divergence).item(), rel=1e-9)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x, y: x, r"the data is a Tensor; a Small learns from a tuple \(inputs, labels\)"),
        (lambda x, y: (x, y, y), "the data is a tuple; a Small learns from"),
        (lambda x, y: (x, y.float()), "labels have shape .* and are torch.float32"),
        (lambda x, y: (x, y[:3]), r"labels have shape \(3,\) .* beside 40 inputs"),
        (lambda x, y: (x[:0], y[:0]), "beside 0 inputs"),
        (lambda x, y: (x, y + 1), "a label is 4 but the model has 4 classes, 0 to 3"),
        (lambda x, y: (x, y - 1), "a label is -1 but the model has 4 classes"),
    ],
)
def test_data_that_does_not_fit_is_refused(data, change, words):
    model, masks = pruned("small")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=words):
        train(model, change(*data), masks, "full")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module.training for module in model.modules())
