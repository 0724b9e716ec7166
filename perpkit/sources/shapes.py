"""The embedded pictures: ten shapes in any pose and colour, among pieces of other shapes, without end.

Everything is drawn from signed distances: a table holds, for each shape, the distance of every point to its
outline, and a picture looks it up at its pixels, turned, moved and scaled; half a pixel on either side of the
outline is blended. All shapes are their own mirror images, so a flipped picture keeps its class.
"""

from collections.abc import Callable
from functools import cache

import numpy as np
import torch

CLASSES = (
    *("circle", "square", "triangle", "star", "cross"),
    *("ring", "crescent", "heart", "arrow", "hexagon"),
)
# Of the channels of 20,000 training pictures, rounded.
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
SIDE = 32
SPLITS = ("train", "validation", "test")

# Pictures drawn from one stream of random numbers: few enough for the processor's cache.
CHUNK = 200
# The table covers [-EXTENT, EXTENT]² in units of a shape's radius; its cells are an eighth of a pixel wide.
EXTENT, CELLS = 1.6, 256
PIECES = 2


def shapes(split: str, count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """The first `count` pictures of a split, uint8 `[count, 3, 32, 32]`, and their classes, int64 `[count]`.

    Every seed is an endless stream of its own and so is every split of it: no two have a picture in common.
    Each ten pictures in a row show the ten `CLASSES` once, in any order.

    Raises ValueError for an unknown split, a negative count or seed.

    >>> pictures, labels = shapes("train", 20)
    >>> pictures.shape, labels.sort().values[::2].tolist()
    (torch.Size([20, 3, 32, 32]), [0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; the splits are {', '.join(SPLITS)}")
    if count < 0 or seed < 0:
        raise ValueError(f"count is {count} and seed is {seed}; neither may be negative")
    pictures = np.empty((count, 3, SIDE, SIDE), np.uint8)
    labels = np.empty(count, np.int64)
    for start in range(0, count, CHUNK):
        part = slice(start, min(start + CHUNK, count))
        # A stream for each chunk: what is drawn does not depend on how much is.
        stream = np.random.SeedSequence(seed, spawn_key=(SPLITS.index(split), start // CHUNK))
        drawn, shown = _draw(np.random.default_rng(stream))
        pictures[part], labels[part] = drawn[: part.stop - start], shown[: part.stop - start]
    return torch.from_numpy(pictures), torch.from_numpy(labels)


# --- drawing ----------------------------------------------------------------------------------------


def _draw(random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """One chunk of pictures and their classes."""
    labels = np.argsort(random.random((CHUNK // len(CLASSES), len(CLASSES))), axis=1).ravel()
    scene = _Scene(random)
    scene.background()
    for _ in range(PIECES):
        scene.piece()
    scene.subject(labels)
    scene.bar()
    scene.light()
    return scene.developed(), labels


class _Scene:
    """A chunk of pictures on the way: colours `[CHUNK, 3, pixels]`, and what all layers need."""

    def __init__(self, random: np.random.Generator):
        self.random = random
        axis = np.arange(SIDE, dtype=np.float32) - (SIDE - 1) / 2
        self.x, self.y = np.tile(axis, SIDE), np.repeat(axis, SIDE)
        self.colours = np.empty((CHUNK, 3, SIDE * SIDE), np.float32)

    def uniform(self, low: float, high: float, *shape: int) -> np.ndarray:
        """Uniform numbers `[CHUNK, *shape]`."""
        return low + (high - low) * self.random.random((CHUNK, *shape), np.float32)

    def along(self, angle: np.ndarray) -> np.ndarray:
        """How far every pixel lies in a direction, `[CHUNK, pixels]`."""
        return np.cos(angle) * self.x + np.sin(angle) * self.y

    def cover(self, share: np.ndarray, colour: np.ndarray) -> None:
        """Lay a colour `[CHUNK, 3, 1 or pixels]` over a share `[CHUNK, pixels]` of each pixel."""
        self.colours += share[:, None] * (colour - self.colours)

    def waves(self) -> np.ndarray:
        """A texture `[CHUNK, 1, pixels]` between 0 and 1: two sine waves in any directions."""
        total = sum(
            np.sin(self.along(self.uniform(0, 2 * np.pi, 1)) * self.uniform(0.15, 1.3, 1) + phase)
            for phase in (self.uniform(0, 2 * np.pi, 1), self.uniform(0, 2 * np.pi, 1))
        )
        return (0.5 + 0.25 * total)[:, None]

    def background(self) -> None:
        """Two colours, the second a shift of the first, in waves."""
        self.ground = self.uniform(0.1, 0.9, 3, 1)
        shift = self.uniform(-0.25, 0.25, 3, 1)
        self.colours[:] = self.ground + shift * (self.waves() - 0.5)

    def shape(
        self, labels: np.ndarray, middle: tuple[np.ndarray, np.ndarray], radius: np.ndarray
    ) -> np.ndarray:
        """The share of every pixel inside shapes of any angle, a little stretched; `[CHUNK, pixels]`."""
        angle, stretch = self.uniform(0, 2 * np.pi, 1), self.uniform(0.8, 1.25, 1)
        cells = []
        for turned, scale in ((angle, radius * stretch), (angle + np.pi / 2, radius / stretch)):
            moved = self.along(turned) - np.cos(turned) * middle[0] - np.sin(turned) * middle[1]
            cells.append(((moved / scale + EXTENT) * (CELLS / (2 * EXTENT))).astype(np.int32))
            cells[-1].clip(0, CELLS - 1, out=cells[-1])
        row = cells[1] + (labels * CELLS).astype(np.int32)[:, None]
        return _sharp(distances().ravel()[row * CELLS + cells[0]] * radius)

    def piece(self) -> None:
        """A shape of any class, cut in two; only one part is there."""
        labels = self.random.integers(len(CLASSES), size=CHUNK)
        middle = self.uniform(-15, 15, 1), self.uniform(-15, 15, 1)
        share = self.shape(labels, middle, self.uniform(4, 7, 1))
        angle = self.uniform(0, 2 * np.pi, 1)
        cut = np.cos(angle) * middle[0] + np.sin(angle) * middle[1] + self.uniform(-2, 2, 1)
        share *= _sharp(self.along(angle) - cut) * self.uniform(0.3, 0.8, 1)
        self.cover(share, self.uniform(0, 1, 3, 1))

    def subject(self, labels: np.ndarray) -> None:
        """The shape that the picture is of, in the one of two colours that is further from the ground's."""
        self.middle = self.uniform(-5, 5, 1), self.uniform(-5, 5, 1)
        share = self.shape(labels, self.middle, self.uniform(6.5, 11.5, 1))
        one, other = self.uniform(0, 1, 3, 1), self.uniform(0, 1, 3, 1)
        nearer = np.abs(one - self.ground).sum(1) < np.abs(other - self.ground).sum(1)
        colour = np.where(nearer[:, None], other, one)
        self.cover(share, colour + self.uniform(-0.2, 0.2, 3, 1) * (self.waves() - 0.5))

    def bar(self) -> None:
        """In two thirds of the pictures, a bar across the subject."""
        angle = self.uniform(0, 2 * np.pi, 1)
        through = np.cos(angle) * self.middle[0] + np.sin(angle) * self.middle[1] + self.uniform(-6, 6, 1)
        share = _sharp(np.abs(self.along(angle) - through) - self.uniform(1, 2.5, 1))
        share *= self.uniform(0, 1, 1) < 2 / 3
        self.cover(share, self.uniform(0, 1, 3, 1))

    def light(self) -> None:
        """Brighter on one side."""
        slope = self.along(self.uniform(0, 2 * np.pi, 1)) * (self.uniform(0, 0.5, 1) / (SIDE / 2))
        self.colours *= (1 + slope)[:, None]

    def developed(self) -> np.ndarray:
        """The pictures with noise, uint8 `[CHUNK, 3, 32, 32]`."""
        noise = self.random.standard_normal(self.colours.shape, np.float32)
        self.colours += noise * self.uniform(0, 0.1, 1, 1)
        levels = np.rint(255 * self.colours).clip(0, 255).astype(np.uint8)
        return levels.reshape(CHUNK, 3, SIDE, SIDE)


def _sharp(distance: np.ndarray) -> np.ndarray:
    """The share of a pixel that lies inside, from the signed distance of its middle in pixels."""
    return (0.5 - distance).clip(0, 1)


# --- the shapes -------------------------------------------------------------------------------------


@cache
def distances() -> np.ndarray:
    """Signed distances to the outline of each class, `[10, 256, 256]`, negative inside, in radii.

    >>> [name for name, middle in zip(CLASSES, distances()[:, 128, 128]) if middle > 0]
    ['ring', 'crescent']
    """
    axis = (np.arange(CELLS) + 0.5) * (2 * EXTENT / CELLS) - EXTENT
    points = np.stack(np.meshgrid(axis, axis), axis=-1)
    return np.stack([_OUTLINES[name](points) for name in CLASSES]).astype(np.float32)


def _circle(points: np.ndarray, radius: float, x: float = 0.0) -> np.ndarray:
    return np.hypot(points[..., 0] - x, points[..., 1]) - radius


def _polygon(points: np.ndarray, corners: np.ndarray) -> np.ndarray:
    """The distance to the nearest side; inside is where a ray to the right crosses an odd number of sides."""
    nearest = np.full(points.shape[:-1], np.inf)
    inside = np.zeros(points.shape[:-1], bool)
    for start, end in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        side, there = end - start, points - start
        share = (there @ side / (side @ side)).clip(0, 1)
        nearest = np.minimum(nearest, np.linalg.norm(there - share[..., None] * side, axis=-1))
        spans = (start[1] <= points[..., 1]) != (end[1] <= points[..., 1])
        if side[1]:
            inside ^= spans & (points[..., 0] < start[0] + there[..., 1] / side[1] * side[0])
    return np.where(inside, -nearest, nearest)


def _regular(corners: int, *radii: float) -> np.ndarray:
    """Corners around a circle, on each of the radii in turn."""
    angle = 2 * np.pi * np.arange(corners) / corners
    return np.resize(radii, corners)[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1)


def _mirrored(*upper: tuple[float, float]) -> np.ndarray:
    """A closed outline from its part above the axis, a last corner on it included."""
    half = np.array(upper)
    return np.concatenate([half, half[half[:, 1] > 0][::-1] * (1, -1)])


def _heart() -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([16 * np.sin(t) ** 3, y + 2.5], 1) / 16


_CROSS = _mirrored((-0.95, 0.28), (-0.28, 0.28), (-0.28, 0.95), (0.28, 0.95), (0.28, 0.28), (0.95, 0.28))
_ARROW = _mirrored((-1.0, 0.24), (0.05, 0.24), (0.05, 0.75), (1.0, 0.0))
_OUTLINES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "circle": lambda points: _circle(points, 0.85),
    "square": lambda points: _polygon(points, _regular(4, 1.05)),
    "triangle": lambda points: _polygon(points, _regular(3, 1.1)),
    "star": lambda points: _polygon(points, _regular(10, 1.1, 0.5)),
    "cross": lambda points: _polygon(points, _CROSS),
    "ring": lambda points: np.abs(_circle(points, 0.72)) - 0.22,
    "crescent": lambda points: np.maximum(_circle(points, 0.95), -_circle(points, 0.75, 0.45)),
    "heart": lambda points: _polygon(points, _heart()),
    "arrow": lambda points: _polygon(points, _ARROW),
    "hexagon": lambda points: _polygon(points, _regular(6, 0.95)),
}
