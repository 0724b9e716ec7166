"""Corrupted pictures: noise, blur, contrast and occlusion, each in five severities."""

import math
from collections.abc import Sequence

import torch
from torch.nn import functional as F

SEVERITIES = (1, 2, 3, 4, 5)
LEVELS = {
    # The deviation of Gaussian noise, of values in [0, 1].
    "noise": (0.04, 0.08, 0.12, 0.18, 0.26),
    # The deviation of a Gaussian blur, in pixels of a picture of 32×32.
    "blur": (0.5, 0.75, 1.0, 1.5, 2.0),
    # The share of the contrast that is left.
    "contrast": (0.75, 0.5, 0.35, 0.25, 0.15),
    # The side of a grey square, as a share of the picture's.
    "occlusion": (0.2, 0.3, 0.4, 0.5, 0.6),
}
KINDS = tuple(LEVELS)


def corrupt(
    images: torch.Tensor,
    kind: str,
    severity: int,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    seed: int = 0,
) -> torch.Tensor:
    """Normalised images `[n, 3, h, w]` corrupted by one of four `KINDS` at a severity from 1 to 5.

    `mean` and `std` are those that the images were normalised with: what is done is done to values in [0, 1]
    and stays there. The seed fixes the noise and where the squares lie, the same at every severity, so that
    a picture is changed more and more. (In the manner of ImageNet-C, Hendrycks and Dietterich 2019.)

    Raises ValueError for an unknown kind or severity.

    >>> images = torch.zeros(2, 3, 32, 32)
    >>> unit = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
    >>> [round(float(corrupt(images, "noise", severity, **unit).std()), 2) for severity in (1, 2, 3)]
    [0.16, 0.32, 0.48]
    """
    if kind not in LEVELS:
        raise ValueError(f"unknown corruption {kind!r}; the kinds are {', '.join(KINDS)}")
    if severity not in SEVERITIES:
        raise ValueError(f"severity is {severity!r}; the severities are 1 to 5")
    wide = torch.promote_types(images.dtype, torch.float32)
    shift, scale = (torch.tensor(v, dtype=wide, device=images.device).view(3, 1, 1) for v in (mean, std))
    plain = images.to(wide) * scale + shift
    level = LEVELS[kind][SEVERITIES.index(severity)]
    if kind == "noise":
        plain = plain + level * _drawn(torch.randn, images.shape, seed).to(plain)
    elif kind == "blur":
        plain = _blurred(plain, level * min(images.shape[2:]) / 32)
    elif kind == "contrast":
        middle = plain.mean((1, 2, 3), keepdim=True)
        plain = middle + level * (plain - middle)
    else:
        plain = plain.where(~_squares(images, level, seed), 0.5)
    return ((plain.clamp(0, 1) - shift) / scale).to(images.dtype)


def _drawn(draw, shape, seed: int) -> torch.Tensor:
    # On the CPU: the same numbers whatever the device.
    return draw(shape, generator=torch.Generator().manual_seed(seed))


def _blurred(images: torch.Tensor, deviation: float) -> torch.Tensor:
    reach = math.ceil(3 * deviation)
    distance = torch.arange(-reach, reach + 1, dtype=images.dtype, device=images.device)
    weights = torch.exp(-0.5 * (distance / deviation).square())
    weights = (weights / weights.sum()).expand(images.shape[1], 1, 1, -1)
    padded = F.pad(images, (reach,) * 4, mode="replicate")
    across = F.conv2d(padded, weights, groups=images.shape[1])
    return F.conv2d(across, weights.transpose(2, 3), groups=images.shape[1])


def _squares(images: torch.Tensor, share: float, seed: int) -> torch.Tensor:
    """Where a square lies in each picture, `[n, 1, h, w]`; a smaller one lies inside a larger."""
    inside = []
    places = _drawn(torch.rand, (2, len(images), 1), seed).to(images.device)
    for place, length in zip(places, images.shape[2:], strict=True):
        side = round(share * length)
        start = (place * (length - side + 1)).floor()
        pixel = torch.arange(length, device=images.device)
        inside.append((pixel >= start) & (pixel < start + side))
    return (inside[0][:, :, None] & inside[1][:, None])[:, None]
