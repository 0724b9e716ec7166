"""Corruptions: more and more of each kind, repeatable, and of what the picture shows."""

from itertools import pairwise

import pytest
import torch

from perpkit.sources.corruptions import KINDS, LEVELS, SEVERITIES, corrupt
from perpkit.sources.images import load_images

MEAN, STD = (0.5, 0.4, 0.6), (0.25, 0.2, 0.3)


@pytest.fixture(scope="module")
def pictures():
    """Values in [0, 1]: shapes on a ground, `[20, 3, 32, 32]`."""
    from perpkit.sources.shapes import shapes

    return shapes("test", 20)[0].float() / 255


def normalised(plain):
    return (plain - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def corrupted(plain, kind, severity, **options):
    """The corrupted values in [0, 1]."""
    images = corrupt(normalised(plain), kind, severity, mean=MEAN, std=STD, **options)
    return images * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_every_picture_is_further_away_at_every_severity(pictures, kind):
    apart = torch.stack(
        [(corrupted(pictures, kind, s) - pictures).square().sum((1, 2, 3)) for s in SEVERITIES]
    )
    assert (apart[0] > 0).all()
    assert (apart.diff(dim=0) > 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("severity", SEVERITIES)
def test_it_is_pure_repeatable_and_stays_a_picture(pictures, kind, severity, generators_unchanged):
    images = normalised(pictures)
    before = images.clone()
    first, again = (corrupt(images, kind, severity, mean=MEAN, std=STD, seed=4) for _ in range(2))
    other = corrupt(images, kind, severity, mean=MEAN, std=STD, seed=5)
    assert torch.equal(first, again)
    assert torch.equal(first, other) == (kind in ("blur", "contrast"))
    assert torch.equal(images, before)
    plain = corrupted(pictures, kind, severity)
    assert plain.min() > -1e-6
    assert plain.max() < 1 + 1e-6


def test_noise_has_its_deviation():
    grey = torch.full((4, 3, 32, 32), 0.5)
    for severity, level in zip(SEVERITIES, LEVELS["noise"], strict=True):
        noise = corrupted(grey, "noise", severity) - 0.5
        # at the last severity one value in twenty is cut off at black or white
        assert noise.std() == pytest.approx(level, rel=0.05 if severity < 5 else 0.1)
        assert abs(noise.mean()) < 0.01


def test_contrast_shrinks_about_the_mean(pictures):
    for severity, level in zip(SEVERITIES, LEVELS["contrast"], strict=True):
        middle = pictures.mean((1, 2, 3), keepdim=True)
        expected = middle + level * (pictures - middle)
        assert torch.allclose(corrupted(pictures, "contrast", severity), expected, atol=1e-6)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_blur_spreads_a_point_as_a_gaussian(severity):
    point = torch.zeros(2, 3, 32, 32)
    point[:, :, 15, 17] = 1
    blurred = corrupted(point, "blur", severity)
    position = torch.arange(32.0)
    across, down = blurred.sum(2), blurred.sum(3)
    assert torch.allclose(across.sum(-1), torch.ones(2, 3), atol=1e-4)
    for line, middle in ((across, 17), (down, 15)):
        assert torch.allclose(line @ position, torch.full((2, 3), float(middle)), atol=1e-3)
        # cut off at three deviations and sampled at whole pixels, which matters to the narrowest
        variance = line @ (position - middle).square()
        assert variance.sqrt().mean() == pytest.approx(LEVELS["blur"][severity - 1], abs=0.04)
    assert torch.allclose(corrupted(torch.full((2, 3, 32, 32), 0.3), "blur", severity), torch.tensor(0.3))


@pytest.mark.parametrize(("severity", "side"), [(1, 6), (2, 10), (3, 13), (4, 16), (5, 19)])
def test_an_occlusion_is_one_whole_grey_square_somewhere(severity, side):
    white = torch.ones(40, 3, 32, 32)
    hidden = corrupted(white, "occlusion", severity) < 0.75
    assert torch.equal(hidden[:, 0], hidden[:, 2])
    assert (hidden[:, 0].sum((1, 2)) == side**2).all()
    assert set(hidden[:, 0].any(1).sum(1).tolist()) == set(hidden[:, 0].any(2).sum(1).tolist()) == {side}
    assert torch.allclose(corrupted(white, "occlusion", severity)[hidden], torch.tensor(0.5))
    assert len({tuple(row) for row in hidden[:, 0].any(1).tolist()}) > 5


def test_a_smaller_square_lies_inside_a_larger():
    white = torch.ones(200, 3, 32, 32)
    hidden = [corrupted(white, "occlusion", severity) < 0.75 for severity in SEVERITIES]
    for smaller, larger in pairwise(hidden):
        assert not (smaller & ~larger).any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_and_sizes(kind, dtype):
    images = torch.zeros(2, 3, 9, 12, dtype=dtype)
    images[:, :, 3:] = 1
    found = corrupt(images, kind, 5, mean=MEAN, std=STD)
    assert found.dtype == dtype
    assert found.shape == images.shape
    assert not torch.equal(found, images)


def test_unknown_corruptions_are_refused(pictures):
    with pytest.raises(
        ValueError, match="unknown corruption 'fog'; the kinds are noise, blur, contrast, occl"
    ):
        corrupt(pictures, "fog", 1, mean=MEAN, std=STD)
    for severity in (0, 6, "3"):
        with pytest.raises(ValueError, match=f"severity is {severity!r}; the severities are 1 to 5"):
            corrupt(pictures, "noise", severity, mean=MEAN, std=STD)


def test_images_are_corrupted_as_they_were_normalised():
    images = load_images("shapes", counts={"train": 10, "validation": 10, "test": 20})
    found, labels = images.corrupted("occlusion", 3, seed=7)
    expected = corrupt(images.test[0], "occlusion", 3, mean=images.mean, std=images.std, seed=7)
    assert torch.equal(found, expected)
    assert torch.equal(labels, images.test[1])


def test_a_severity_may_come_from_a_table(pictures):
    told = {"mean": MEAN, "std": STD}
    assert torch.equal(corrupt(pictures, "noise", 2.0, **told), corrupt(pictures, "noise", 2, **told))
