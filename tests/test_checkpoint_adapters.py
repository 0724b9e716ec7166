"""Checkpoints of adapters and frozen statistics: a run with others of them is another run."""

import copy

import pytest
import torch

from perpkit.pruning.masks import Masks
from perpkit.pruning.prune import prune
from perpkit.retraining.adapters.attach import attach
from perpkit.retraining.loop.retrain import retrain
from perpkit.sources.resnet import CifarResNet


def train(model, data, masks, path, subset="lora", steps=4):
    options = {"steps": steps, "lr": 1e-2, "batch": 4, "progress": False}
    return retrain(model, data, masks=masks, subset=subset, checkpoint=path, **options)


ADAPTED = {"kind": "mask_lora", "rank": 2, "alpha": 4.0, "start": None}


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "lora_prune"},
        {"alpha": 8.0},
        {"kind": "scale_lora", "start": "symmetry_breaking"},
        {"masks": None},
    ],
    ids=str,
)
def test_other_adapters_are_refused(make_model, windows, tmp_path, changes):
    plain = make_model("opt")
    masks = prune(plain, "magnitude", sparsity=0.6)
    model, other = copy.deepcopy(plain), copy.deepcopy(plain)
    options = {"masks": masks, **ADAPTED, **changes}
    attach(model, masks, **ADAPTED)
    trained = Masks({}) if changes == {"masks": None} else masks
    attach(other, options.pop("masks"), **options, targets=list(masks))
    train(model, windows, trained, tmp_path / "run.pt")
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match="belongs to a run with another adapters;"):
        train(other, windows, trained, tmp_path / "run.pt")
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


def test_other_frozen_statistics_are_refused(tmp_path):
    data = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 10
    model = CifarResNet(20)
    other = copy.deepcopy(model)
    other.bn1.running_mean += 0.5
    train(model, data, Masks({}), tmp_path / "run.pt", "head")
    assert len(train(model, data, Masks({}), tmp_path / "run.pt", "head")) == 4
    with pytest.raises(ValueError, match="belongs to a run with another model;"):
        train(other, data, Masks({}), tmp_path / "run.pt", "head")
