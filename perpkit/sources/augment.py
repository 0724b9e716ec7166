"""Augmentation of training pictures, fixed by a generator."""

import torch
from torch.nn import functional as F

PADDING = 4


def crop_and_flip(images: torch.Tensor, generator: torch.Generator | int) -> torch.Tensor:
    """Move each picture up to four pixels in any direction and mirror half of them, as is usual for CIFAR-10.

    `images` are normalised, `[n, 3, h, w]`, and so is the result; what comes in at the border is zero, the
    mean colour. The numbers are drawn from a generator of the CPU, or from a seed.

    >>> images = torch.arange(2.0 * 3 * 32 * 32).view(2, 3, 32, 32)
    >>> first, again = crop_and_flip(images, 0), crop_and_flip(images, 0)
    >>> first.shape, torch.equal(first, again), torch.equal(first, images)
    (torch.Size([2, 3, 32, 32]), True, False)
    """
    if isinstance(generator, int):
        generator = torch.Generator().manual_seed(generator)
    count, _, height, width = images.shape
    moved = torch.randint(2 * PADDING + 1, (2, count, 1), generator=generator)
    flipped = torch.rand(count, 1, generator=generator) < 0.5
    rows = moved[0] + torch.arange(height)
    columns = torch.arange(width)
    columns = moved[1] + torch.where(flipped, columns.flip(0), columns)
    # Over the pixels of the padded picture as one axis: a single gather, whatever the device.
    pixels = rows[:, :, None] * (width + 2 * PADDING) + columns[:, None]
    index = pixels.flatten(1)[:, None].expand(-1, images.shape[1], -1).to(images.device)
    return F.pad(images, (PADDING,) * 4).flatten(2).gather(2, index).view(images.shape)
