"""The embedded pictures: endless, repeatable, balanced, and each class told by its shape."""

import numpy as np
import pytest
import torch

from perpkit.sources.shapes import CELLS, CLASSES, EXTENT, MEAN, SPLITS, STD, distances, shapes


def as_bytes(pictures):
    return {picture.numpy().tobytes() for picture in pictures}


def test_the_same_seed_draws_the_same_and_a_few_are_the_first_of_many(generators_unchanged):
    pictures, labels = shapes("train", 450, seed=3)
    for count in (0, 1, 199, 200, 201, 450):
        some, shown = shapes("train", count, seed=3)
        assert torch.equal(some, pictures[:count])
        assert torch.equal(shown, labels[:count])
    assert pictures.dtype == torch.uint8
    assert labels.dtype == torch.int64


def test_no_two_streams_have_a_picture_in_common():
    streams = [as_bytes(shapes(split, 300, seed)[0]) for split in SPLITS for seed in (0, 1, 2**40)]
    assert all(len(stream) == 300 for stream in streams)
    assert len(set().union(*streams)) == 300 * len(streams)


@pytest.mark.parametrize("split", SPLITS)
def test_every_ten_in_a_row_show_each_class_once(split):
    labels = shapes(split, 600, seed=5)[1].view(-1, 10)
    assert torch.equal(labels.sort(1).values, torch.arange(10).expand(60, 10))
    assert len({tuple(row) for row in labels.tolist()}) > 50


def test_the_mean_and_deviation_are_those_of_the_pictures():
    pictures = shapes("train", 2000, seed=1)[0].float() / 255
    assert pictures.mean((0, 2, 3)).tolist() == pytest.approx(MEAN, abs=0.02)
    assert pictures.std((0, 2, 3)).tolist() == pytest.approx(STD, abs=0.02)


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(
        ValueError, match="unknown split 'calibration'; the splits are train, validation, test"
    ):
        shapes("calibration", 1)
    with pytest.raises(ValueError, match="count is -1 and seed is 0; neither may be negative"):
        shapes("train", -1)
    with pytest.raises(ValueError, match="seed is -2"):
        shapes("train", 1, seed=-2)


# --- the outlines -----------------------------------------------------------------------------------


AREAS = {
    "circle": np.pi * 0.85**2,
    "square": 2 * 1.05**2,
    "triangle": 3 * np.sqrt(3) / 4 * 1.1**2,
    "star": 5 * 1.1 * 0.5 * np.sin(np.pi / 5),
    "cross": 4 * 0.56 * 0.95 - 0.56**2,
    "ring": np.pi * (0.94**2 - 0.5**2),
    "hexagon": 3 * np.sqrt(3) / 2 * 0.95**2,
    "arrow": 2 * (1.05 * 0.24 + 0.95 * 0.75 / 2),
}


@pytest.mark.parametrize("name", AREAS)
def test_an_outline_encloses_its_area(name):
    inside = (distances()[CLASSES.index(name)] < 0).mean() * (2 * EXTENT) ** 2
    assert inside == pytest.approx(AREAS[name], rel=0.02)


@pytest.mark.parametrize("name", CLASSES)
def test_distances_are_distances(name):
    """They change nowhere faster than the way between two points is long, and almost everywhere as fast."""
    table = distances()[CLASSES.index(name)].astype(np.float64) * CELLS / (2 * EXTENT)
    slopes = np.hypot(*np.gradient(table))
    assert np.abs(np.diff(table, axis=0)).max() <= 1.001
    assert np.abs(np.diff(table, axis=1)).max() <= 1.001
    assert np.median(slopes) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("name", CLASSES)
def test_a_shape_is_its_own_mirror_image(name):
    """So that a flipped picture keeps its class: about one axis or the other, and then about any, turned."""
    table = distances()[CLASSES.index(name)]
    apart = [np.abs(table - np.flip(table, axis)).max() for axis in (0, 1)]
    assert min(apart) < 1e-4


# --- the classes ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def told():
    """How far each pixel is from its picture's usual colour, for training and test, and the labels."""

    def features(split, count):
        pictures, labels = shapes(split, count)
        plain = pictures.float() / 255
        apart = (plain - plain.flatten(2).median(2).values[:, :, None, None]).abs().sum(1).flatten(1)
        return apart / apart.norm(dim=1, keepdim=True), labels

    return features("train", 4000), features("test", 2000)


def test_the_nearest_mean_is_above_chance_and_not_good(told):
    """The classes differ in shape, not in colour or place: a mean picture tells little of them."""
    (train, labels), (test, wanted) = told
    means = torch.stack([train[labels == c].mean(0) for c in range(10)])
    right = (torch.cdist(test, means).argmin(1) == wanted).float().mean()
    # of 2000 guesses a tenth is right, give or take 0.7 %
    assert 0.13 < right < 0.5


def test_the_colours_tell_nothing():
    pictures, labels = shapes("train", 4000)
    colours = pictures.float().mean((2, 3)) / 255
    means = torch.stack([colours[labels == c].mean(0) for c in range(10)])
    assert (means - means.mean(0)).abs().max() < 0.04
