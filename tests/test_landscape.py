"""Distances, angles, and the loss along segments and over planes; and what averaging does to sparsity."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from perpkit.pruning.prune import prune
from perpkit.retraining.batchnorm import recalibrate_batchnorm
from perpkit.retraining.soups.average import average
from perpkit.retraining.soups.ensemble import Ensemble
from perpkit.retraining.soups.landscape import barrier, distances, naive_average_sparsity, plane, segment

VECTORS = st.lists(st.floats(-100, 100, width=32), min_size=4, max_size=4)


def two_layers(values):
    """Four numbers in two layers, so that sums go over parameters."""
    model = nn.Sequential(nn.Linear(2, 1, bias=False), nn.Linear(1, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([values[:2]]))
        model[1].weight.copy_(torch.tensor([values[2:]]).T)
    return model


def vector(model):
    return torch.cat([p.detach().double().flatten() for p in model.parameters()])


def random_models(make_vision, count):
    """Networks for images that have a parent in common but little else."""
    return [make_vision("sequential", seed=seed) for seed in range(count)]


# --- distances ------------------------------------------------------------------------------------


def test_distances_by_hand():
    one, two, three = two_layers([1.0, 0, 0, 0]), two_layers([0, 0, 2.0, 0]), two_layers([1.0, 0, 1.0, 0])
    table = distances([one, two, three])
    assert table[["one", "other"]].values.tolist() == [[0, 1], [0, 2], [1, 2]]
    assert table["distance"].tolist() == [math.sqrt(5), 1.0, math.sqrt(2)]
    assert table["angle"].tolist() == pytest.approx([90, 45, 45])
    assert set(table["between"]) == {"weights"}
    table = distances([one, two, three], parent=two_layers([1.0, 0, 0, 0]))
    assert set(table["between"]) == {"differences from the parent"}
    assert table["angle"].isna().tolist() == [True, True, False]
    # (−1, 2) and (0, 1).
    assert table["angle"][2] == pytest.approx(math.degrees(math.acos(2 / math.sqrt(5))))


@given(VECTORS, VECTORS, VECTORS)
def test_distances_against_numpy(one, two, three):
    models = [two_layers(values) for values in (one, two, three)]
    u, v, start = (np.array(values) for values in (one, two, three))
    found = distances(models[:2], parent=models[2])
    assert found["distance"][0] == pytest.approx(np.linalg.norm(u - v))
    u, v = u - start, v - start
    if not u.any() or not v.any():
        assert math.isnan(found["angle"][0])
        return
    expected = math.degrees(math.acos(np.clip(u @ v / (np.linalg.norm(u) * np.linalg.norm(v)), -1, 1)))
    # The arc cosine itself is only that good where it is steep.
    assert found["angle"][0] == pytest.approx(expected, abs=1e-5)


def test_a_tiny_angle_is_not_lost():
    one = two_layers([1e4, 0, 0, 0])
    two = two_layers([1e4, 1e-5, 0, 0])
    assert distances([one, two])["angle"][0] == pytest.approx(math.degrees(float(np.float32(1e-5)) / 1e4))
    assert distances([one, copy.deepcopy(one)])["angle"][0] == 0


# --- segments -------------------------------------------------------------------------------------


def test_segment_has_the_losses_of_its_ends(make_vision, images):
    one, two = random_models(make_vision, 2)
    before = copy.deepcopy(one.state_dict())

    def loss(model):
        return model(images).square().mean().item()

    table = segment(one, two, loss, points=5)
    assert table["t"].tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert table["loss"].iloc[0] == loss(one)
    assert table["loss"].iloc[-1] == loss(two)
    assert table["loss"][2] == loss(average([one, two]))
    assert table["above"].iloc[[0, -1]].tolist() == [0, 0]
    assert table["above"][1] == pytest.approx(table["loss"][1] - 0.75 * loss(one) - 0.25 * loss(two))
    assert barrier(table) == max(table["above"])
    assert all(torch.equal(value, before[name]) for name, value in one.state_dict().items())


def test_segment_prepares_every_point(make_vision, images):
    one, two = random_models(make_vision, 2)

    def loss(model):
        return model(images).square().mean().item()

    table = segment(one, two, loss, points=3, prepare=lambda model: recalibrate_batchnorm(model, images))
    for model, found in zip((one, average([one, two]), two), table["loss"], strict=True):
        model = copy.deepcopy(model)
        recalibrate_batchnorm(model, images)
        assert found == loss(model)
    assert table["loss"][0] != loss(one)


def test_a_valley_has_no_barrier():
    one, two = two_layers([1.0, 0, 0, 0]), two_layers([-1.0, 0, 0, 0])
    assert barrier(segment(one, two, lambda model: float(vector(model)[0] ** 2))) == 0
    assert barrier(segment(one, two, lambda model: 3 - float(vector(model)[0] ** 2))) == 1


# --- planes ---------------------------------------------------------------------------------------


@given(VECTORS, VECTORS, VECTORS)
def test_plane_against_numpy(one, two, three):
    """The loss is linear in the weights, so every point says which weights it had."""
    a, b, c = (np.array(values) for values in (one, two, three))
    u, w = b - a, c - a
    if not u.any() or not w.any():
        return
    v = w - u * (w @ u) / (u @ u)
    if np.linalg.norm(v) < 1e-2 * np.linalg.norm(w) or np.linalg.norm(u) < 1e-2:
        return
    read = np.array([1.0, -2.0, 0.5, 3.0])
    models = [two_layers(values) for values in (one, two, three)]
    table = plane(*models, lambda model: float(vector(model) @ torch.from_numpy(read)), points=4, margin=0.5)
    assert len(table) == 16 + 3
    for row in table.itertuples():
        point = a + row.x * u / np.linalg.norm(u) + row.y * v / np.linalg.norm(v)
        assert row.loss == pytest.approx(point @ read, rel=1e-4, abs=1e-2)
    xs, ys = table["x"][:16].unique(), table["y"][:16].unique()
    corners = table.iloc[16:]
    assert len(xs) == len(ys) == 4
    for axis, places in (("x", xs), ("y", ys)):
        low, high = corners[axis].min(), corners[axis].max()
        assert places[0] == pytest.approx(low - 0.5 * (high - low))
        assert places[-1] == pytest.approx(high + 0.5 * (high - low))


def test_plane_has_the_losses_of_its_models_and_their_distances(make_vision, images):
    models = random_models(make_vision, 3)

    def loss(model):
        return model(images).square().mean().item()

    table = plane(*models, loss, points=3)
    corners = table[table["model"].notna()].set_index("model")
    assert corners["loss"].tolist() == [loss(model) for model in models]
    found = [
        math.dist(corners.loc[one, ["x", "y"]], corners.loc[other, ["x", "y"]])
        for one, other in ("ab", "ac", "bc")
    ]
    assert found == pytest.approx(distances(models)["distance"].tolist())


def test_beyond_the_models_statistics_are_none(make_vision, images):
    """A negative variance, whose root is no loss."""
    models = random_models(make_vision, 3)
    for model, variance in zip(models, (0.1, 3.0, 0.1), strict=True):
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_var.fill_(variance)

    def loss(model):
        return model(images).square().mean().item()

    with pytest.raises(ValueError, match="is negative; give prepare="):
        plane(*models, loss, points=3)
    prepared = plane(*models, loss, points=3, prepare=lambda model: recalibrate_batchnorm(model, images))
    assert np.isfinite(prepared["loss"]).all()


def test_what_spans_nothing_is_refused():
    one, two = two_layers([1.0, 0, 0, 0]), two_layers([0.3, 0, 0.7, 0])
    for three in (average([one, two]), one, two):
        with pytest.raises(ValueError, match="lie on one line"):
            plane(one, two, three, lambda model: 0.0)
    with pytest.raises(ValueError, match="lie on one line"):
        plane(one, one, two, lambda model: 0.0)
    with pytest.raises(ValueError, match="points is 1"):
        segment(one, two, lambda model: 0.0, points=1)
    with pytest.raises(ValueError, match=r"points is 2\.5"):
        segment(one, two, lambda model: 0.0, points=2.5)
    with pytest.raises(ValueError, match="margin is -1"):
        plane(one, two, one, lambda model: 0.0, margin=-1)
    with pytest.raises(ValueError, match="1 models have no distance"):
        distances([one])
    with pytest.raises(ValueError, match="only one of the first model and model 2"):
        distances([one, two], parent=nn.Linear(1, 1))
    with pytest.raises(ValueError, match="only one of the first model and model 1"):
        segment(one, nn.Linear(1, 1), lambda model: 0.0)


# --- sparsity and ensembles -----------------------------------------------------------------------


def test_averages_of_independent_prunings_lose_sparsity(any_model):
    """Random masks of sparsity s agree by chance: the average keeps about s^m."""
    models = [copy.deepcopy(any_model) for _ in range(3)]
    for seed, model in enumerate(models):
        prune(model, "random", sparsity=0.5, seed=seed, progress=False)
    table = naive_average_sparsity(models).set_index("layer")
    assert table.loc["all", "models"] == pytest.approx(0.5, abs=1e-3)
    assert table.loc["all", "average"] == pytest.approx(0.125, abs=0.02)
    layers = table.drop("all")
    assert table.loc["all", "weights"] == layers["weights"].sum()
    assert table.loc["all", "average"] * layers["weights"].sum() == pytest.approx(
        (layers["average"] * layers["weights"]).sum()
    )
    one_mask = naive_average_sparsity([models[0], models[0]]).set_index("layer")
    assert one_mask.loc["all", "average"] == one_mask.loc["all", "models"]


def test_an_ensemble_has_the_mean_of_probabilities(make_vision, make_model, images, windows):
    members = random_models(make_vision, 3)
    expected = torch.stack([model(images).double().softmax(-1) for model in members]).mean(0)
    assert torch.allclose(Ensemble(members)(images).softmax(-1).double(), expected, atol=1e-6)
    members = [make_model("llama", seed=seed, dtype=torch.bfloat16) for seed in range(2)]
    output = Ensemble(members)(input_ids=windows, use_cache=False)
    expected = torch.stack([m(input_ids=windows).logits.double().softmax(-1) for m in members]).mean(0)
    assert torch.allclose(output.logits.double().exp(), expected, atol=1e-6)
    assert output.logits.dtype == torch.float32
    assert list(output) == ["logits"]
    with pytest.raises(ValueError, match="no models"):
        Ensemble([])
