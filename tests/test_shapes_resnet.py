"""The embedded classifier: there, small, good, and as its recipe says."""

import importlib.util
import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from perpkit.evaluation.accuracy import accuracy
from perpkit.pruning.prune import prune
from perpkit.sources.classifiers import load_classifier
from perpkit.sources.corruptions import KINDS
from perpkit.sources.embedded import EMBEDDED_CLASSIFIERS, data_folder
from perpkit.sources.images import load_images
from perpkit.sources.resnet import CifarResNet

TOOL = Path(__file__).parents[1] / "tools" / "train_shapes.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("train_shapes", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def recipe():
    return json.loads(data_folder("models", "shapes-resnet", "recipe.json").read_text())


@pytest.fixture(scope="module")
def shapes():
    """A little to train on, and the whole test split."""
    return load_images("shapes", counts={"train": 200, "validation": 10})


def test_it_is_loaded_by_its_name():
    assert EMBEDDED_CLASSIFIERS == ("shapes-resnet",)
    model = load_classifier("shapes-resnet", device="cpu")
    assert isinstance(model, CifarResNet)
    assert not any(module.training for module in model.modules())
    other = load_classifier("shapes-resnet", device="cpu")
    assert all(
        a.data_ptr() != b.data_ptr() for a, b in zip(model.parameters(), other.parameters(), strict=True)
    )


def test_it_is_small_and_finite():
    file = data_folder("models", "shapes-resnet", "model.safetensors")
    assert file.stat().st_size < 1.2e6
    for name, weight in load_file(file).items():
        assert weight.isfinite().all(), name


def test_the_recipe_holds_what_is_measured(recipe, shapes):
    model, measured = load_classifier("shapes-resnet", device="cpu"), recipe["measured"]
    assert measured["parameters"] == sum(p.numel() for p in model.parameters())
    assert measured["protocol"] == shapes.protocol
    assert 0.87 < measured["test_accuracy"] < 0.94
    assert accuracy(model, shapes.test) == pytest.approx(measured["test_accuracy"], abs=0.002)
    # the mildest and the worst of one kind; the tool measures all twenty
    for severity in (1, 5):
        found = accuracy(model, shapes.corrupted("contrast", severity))
        assert found == pytest.approx(measured["corrupted"]["contrast"][severity - 1], abs=0.005)
    means = [sum(values) / 5 for values in measured["corrupted"].values()]
    assert set(measured["corrupted"]) == set(KINDS)
    assert measured["corrupted_test_accuracy"] == pytest.approx(sum(means) / len(means), abs=1e-4)
    assert measured["corrupted_test_accuracy"] < measured["test_accuracy"] - 0.05


def test_the_recipe_knows_the_original_schedule(recipe, tool):
    training = recipe["training"]
    log = pd.read_csv(data_folder("models", "shapes-resnet", "training_log.csv"))
    assert (training["epochs"], training["batch"]) == (tool.EPOCHS, tool.BATCH)
    assert len(log) == training["epochs"]
    assert (
        log.steps.iloc[-1]
        == training["steps"]
        == training["epochs"] * training["pictures"] // training["batch"]
    )
    assert log.rate.iloc[0] == training["largest_rate"] == tool.LARGEST_RATE
    assert log.rate.iloc[-1] == pytest.approx(training["last_rate"], rel=1e-4)
    assert log.loss.iloc[-1] == pytest.approx(training["final_loss"])
    factors = [tool.factor(step, training["steps"]) for step in range(training["steps"])]
    per_epoch = training["steps"] // training["epochs"]
    assert [round(training["largest_rate"] * f, 7) for f in factors[::per_epoch]] == pytest.approx(
        log.rate, rel=1e-4
    )
    assert factors[per_epoch - 1] == factors[0] == 1


def test_pruning_hurts_it(shapes):
    some = tuple(part[:500] for part in shapes.test)
    found = []
    for sparsity in (0.0, 0.5, 0.9):
        model = load_classifier("shapes-resnet", device="cpu")
        prune(model, "magnitude", sparsity=sparsity, progress=False)
        found.append(accuracy(model, some))
    assert found[0] > 0.85
    assert found[0] - 0.2 < found[1] <= found[0] + 0.02
    assert found[2] < 0.5, found


def test_the_same_seed_trains_the_same_model(tool, shapes, monkeypatch, generators_unchanged):
    monkeypatch.setattr(tool, "EPOCHS", 2)
    (first, log), (again, _), (other, _) = (tool.train(shapes, seed) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.linear.weight, other.linear.weight)
    assert log.epoch.tolist() == [1, 2]
    assert log.steps.tolist() == [3, 6]
    assert log.rate.tolist() == pytest.approx([tool.LARGEST_RATE, tool.LARGEST_RATE / 2])
