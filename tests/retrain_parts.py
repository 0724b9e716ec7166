"""What the tests of retraining share: a short run, and whether a model is as it was."""

import torch

from perpkit.retraining.loop.retrain import retrain


def train(model, windows, masks, subset="biases", **changes):
    options = {"steps": 4, "lr": 1e-2, "batch": 3, "progress": False, **changes}
    return retrain(model, windows, masks=masks, subset=subset, **options)


def snapshot(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(model, before):
    now = model.state_dict()
    return list(now) == list(before) and all(torch.equal(now[name], before[name]) for name in now)
