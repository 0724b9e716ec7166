"""Gradual freezing: which layers train when, the published shares, and what retraining then moves."""

import itertools
import math
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import nn

import perpkit as pk
from perpkit.retraining.freezing import Freezer, freezable_layers, gradual_layers, gradual_plan
from perpkit.retraining.iterative import imp
from perpkit.sources.resnet import CifarResNet

WAYS = [(gradual, reverse) for gradual in ("freeze", "unfreeze") for reverse in (False, True)]
PUBLISHED = Path(__file__).parents[1] / "data" / "paper" / "perp_v1_table3_gradual_freezing.csv"


@pytest.mark.parametrize("stages", [1, 3, 5])
@pytest.mark.parametrize("count", [1, 4, 7])
def test_freezing_leaves_what_unfreezing_wakes(stages, count):
    layers = [f"layer{i}" for i in range(count)]
    for reverse in (False, True):
        before = 0
        for stage in range(stages):
            frozen, awake = (
                gradual_layers(layers, stage, stages, gradual=gradual, reverse=reverse)
                for gradual in ("freeze", "unfreeze")
            )
            assert sorted(frozen + awake) == layers
            assert awake == (layers[count - len(awake) :] if reverse else layers[: len(awake)])
            assert len(awake) == math.floor((stage + 1) / stages * count + 1e-9) >= before
            before = len(awake)
        assert awake == layers


@pytest.mark.parametrize(("gradual", "reverse"), WAYS)
def test_the_aggregated_shares_are_the_published_ones(gradual, reverse):
    """ResNet-50 over five epochs: all four shares of table 3 of PERP v1, to the last digit."""
    import transformers

    with torch.device("meta"):
        model = transformers.ResNetForImageClassification(transformers.ResNetConfig(num_labels=1000))
    assert sum(p.numel() for p in model.parameters()) == 25_557_032
    table = pd.read_csv(PUBLISHED)
    chosen = (table["unfreeze"] == ("yes" if gradual == "unfreeze" else "no")) & (
        table["reverse"] == ("yes" if reverse else "no")
    )
    (published,) = table[chosen]["aggregated_trainable_pct"].unique()
    plan = gradual_plan(model, gradual, reverse=reverse)
    assert round(100 * plan["trainable_share"].mean(), 2) == published


def test_classifier_norms_and_biases_always_train():
    model = CifarResNet(20)
    layers = freezable_layers(model)
    assert layers[0] == "conv1.weight"
    assert not any("linear" in name or "bn" in name for name in layers)
    plan = gradual_plan(model, "freeze", stages=19)
    always = sum(p.numel() for name, p in model.named_parameters() if name not in layers)
    assert plan["layers"].tolist() == list(range(18, -1, -1))
    total = sum(p.numel() for p in model.parameters())
    assert plan["trainable_share"].iloc[-1] == pytest.approx(always / total)


def test_layers_of_any_language_model_are_its_prunable_weights(any_model):
    layers = freezable_layers(any_model)
    masks = pk.prune(any_model, "magnitude", sparsity=0.5)
    assert layers == list(masks)
    assert gradual_plan(any_model, "unfreeze", stages=2)["trainable_share"].tolist()[-1] == 1.0


@pytest.mark.parametrize(("gradual", "reverse"), WAYS)
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_only_the_layers_of_a_stage_move(make_model, windows, gradual, reverse, optimizer):
    model = make_model("opt")
    layers = freezable_layers(model)
    states, stages = [], 3

    def record(step, loss):
        states.append({name: p.detach().clone() for name, p in model.named_parameters()})

    masks = pk.prune(model, "magnitude", sparsity=0.5)
    states.append({name: p.detach().clone() for name, p in model.named_parameters()})
    freezer = Freezer(model, "full", steps=6, stages=stages, gradual=gradual, reverse=reverse)
    pk.retrain(
        model,
        windows,
        masks=masks,
        subset="full",
        steps=6,
        lr=1e-2,
        batch=4,
        optimizer=optimizer,
        schedule="constant",
        progress=False,
        on_step=record,
        stop=freezer.stop(None),
        cancelled=freezer.cancelled(None),
    )
    for step, (before, after) in enumerate(itertools.pairwise(states)):
        active = gradual_layers(layers, step // 2, stages, gradual=gradual, reverse=reverse)
        moved = {name for name in layers if not torch.equal(before[name], after[name])}
        assert moved == set(active), step
        norms = [name for name in before if "layer_norm.weight" in name]
        assert all(not torch.equal(before[name], after[name]) for name in norms)
    assert all(p.requires_grad for p in model.parameters())
    masks.check(model)


def test_iterative_pruning_reports_the_shares_step_by_step(make_model, windows):
    model = make_model("llama")
    plan = gradual_plan(model, "unfreeze", reverse=True, stages=4)["trainable_share"]
    settings = {"subset": "full", "steps": 8, "lr": 1e-3, "batch": 4, "progress": False}
    options = {"gradual": "unfreeze", "reverse": True, "stages": 4}
    masks, history = imp(model, "magnitude", windows, sparsity=0.5, cycles=2, **options, **settings)
    masks.check(model)
    assert history["trainable_share"].tolist() == 2 * [share for share in plan for _ in range(2)]
    assert history["trainable_share"].mean() == pytest.approx(plan.mean())


def test_a_checkpoint_goes_on_in_the_stage_it_was_in(make_model, windows, tmp_path):
    settings = {"subset": "full", "steps": 6, "lr": 1e-3, "batch": 4, "progress": False}
    options = {"sparsity": 0.5, "cycles": 1, "gradual": "freeze", "stages": 3, **settings}
    whole = make_model("opt")
    imp(whole, "magnitude", windows, **options)

    def killed(step, loss):
        if step == 3:
            raise KeyboardInterrupt

    saved = {"checkpoint": tmp_path / "run", "checkpoint_every": 1}
    with pytest.raises(KeyboardInterrupt):
        imp(make_model("opt"), "magnitude", windows, on_step=killed, **saved, **options)
    again = make_model("opt")
    imp(again, "magnitude", windows, **saved, **options)
    for name, value in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_early_stops_and_cancelling_still_reach_retrain(make_model, windows):
    settings = {"subset": "full", "steps": 8, "lr": 1e-3, "batch": 4, "progress": False, "gradual": "freeze"}
    stop = {"stop": lambda losses: len(losses) == 3}
    _, history = imp(make_model("opt"), "magnitude", windows, sparsity=0.5, cycles=1, **stop, **settings)
    assert len(history) == 3
    steps = []
    cancel = {"on_step": lambda step, loss: steps.append(step), "cancelled": lambda: len(steps) == 5}
    _, history = imp(make_model("opt"), "magnitude", windows, sparsity=0.5, cycles=2, **cancel, **settings)
    assert len(history) == 5


def test_a_stage_that_trains_nothing_is_refused():
    """Convolutions alone: no bias, normalisation or classifier is left when all layers are frozen."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.Conv2d(4, 10, 3, bias=False))
    for gradual, stages, stage in (("freeze", 2, 2), ("freeze", 1, 1), ("unfreeze", 3, 1)):
        for reverse in (False, True):
            with pytest.raises(ValueError, match=f"stage {stage} of {stages} would train nothing"):
                gradual_plan(model, gradual, stages=stages, reverse=reverse)
    assert (gradual_plan(model, "unfreeze", stages=2)["trainable_share"] > 0).all()
