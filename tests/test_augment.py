"""Augmentation: crops and flips of exactly the pictures, drawn from the generator alone."""

import pytest
import torch
from torch.nn import functional as F

from perpkit.sources.augment import PADDING, crop_and_flip


def candidates(picture):
    """All 162 pictures that one can become."""
    height, width = picture.shape[1:]
    padded = F.pad(picture, (PADDING,) * 4)
    for flipped in (padded, padded.flip(2)):
        for top in range(2 * PADDING + 1):
            for left in range(2 * PADDING + 1):
                yield flipped[:, top : top + height, left : left + width]


@pytest.mark.parametrize("shape", [(12, 3, 8, 8), (5, 1, 6, 11)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_picture_becomes_one_of_its_crops(shape, dtype):
    images = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    before = images.clone()
    found = crop_and_flip(images, 3)
    assert found.dtype == dtype
    for picture, made in zip(images, found, strict=True):
        assert sum(torch.equal(made, candidate) for candidate in candidates(picture)) == 1
    assert torch.equal(images, before)


def test_all_crops_come_equally_often():
    picture = torch.arange(1.0, 65.0).view(1, 1, 8, 8)
    made = crop_and_flip(picture.expand(16200, 1, 8, 8), 0)
    counts = [int((made == candidate).all((1, 2, 3)).sum()) for candidate in candidates(picture[0])]
    assert sum(counts) == 16200
    # one hundred each, give or take ten
    assert min(counts) > 60
    assert max(counts) < 145


def test_a_seed_is_a_generator_and_no_global_one_moves(generators_unchanged):
    images = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(5)
    first, second = crop_and_flip(images, generator), crop_and_flip(images, generator)
    assert torch.equal(first, crop_and_flip(images, 5))
    assert not torch.equal(first, second)
    assert crop_and_flip(images[:0], 5).shape == (0, 3, 8, 8)
