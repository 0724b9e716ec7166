"""A matrix's scores and mask, drawn again and again while somebody drags: only what changes is drawn anew."""

import io
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, to_rgb
from matplotlib.lines import Line2D
from PIL import Image
from torch.nn import functional as F

from .card import CAPTION, KEPT, WIDTH, plain
from .figure import COLOURS, DRAWING, GREY, Backdrop, DataFigure, on_white
from .masks import CORNER_GROUPS, CORNER_ROWS, FINEST, FLATTEST, HIGHEST, STEEPEST

DPI = 120
HEIGHT = 4.2
TOP = 0.815
BINS = 80
LINE = COLOURS[5]
# Of two criteria: kept by neither, the first only, the second only, both. Told apart in grey too.
COMPARED = ["#FFFFFF", COLOURS[1], COLOURS[0], COLOURS[4]]


@dataclass(frozen=True)
class Frame:
    """What is drawn at one position of the slider: masks `[out, in]`, where the scores part, words above.

    `thresholds` are the lowest kept score of each comparison group; none are drawn for an empty tensor.
    """

    mask: torch.Tensor
    other: torch.Tensor | None
    thresholds: torch.Tensor
    title: str


class MaskView:
    """A matrix's scores `[out, in]` as a picture that follows its mask at many frames a second.

    On the left lies the whole matrix, white where it is pruned and the darker the larger the score; beside it
    a corner of 16 rows with lines between the groups of M inputs, `m`, and the histogram of all scores with
    the kept ones filled in. `names` are those of two criteria whose masks are compared by colour instead. A
    matrix of more than 512 rows or columns is averaged over squares.

    >>> view = MaskView(torch.rand(8, 8), "score")
    >>> frame = Frame(torch.rand(8, 8) > 0.5, None, torch.tensor([0.5]), "half of it")
    >>> view.png(frame)[:4], len(view.figure(frame).table)
    (b'\\x89PNG', 64)
    """

    @on_white()
    def __init__(
        self, scores: torch.Tensor, label: str, *, m: int | None = None, names: tuple[str, str] | None = None
    ):
        self._scores = scores.detach().float().cpu()
        self._label, self._m, self._names = label, m, names
        finite = self._scores[torch.isfinite(self._scores)].numpy()
        # From few of the entries where there are many.
        some = finite[:: max(1, finite.size // 2**18)]
        self._highest = float(np.quantile(some, HIGHEST)) if some.size else 0.0
        self._highest = self._highest or 1.0
        self._side = -(-max(self._scores.shape) // FINEST)
        self._colours = self._coloured(self._pooled(self._scores))
        self._near = self._coloured(self._corner(self._scores))
        place = np.nan_to_num(self._scores.numpy() / self._highest, nan=0.0, posinf=1.0).clip(0, 1)
        self._bins = np.minimum((place * BINS).astype(np.int64), BINS - 1)
        figure = DataFigure(figsize=(WIDTH, HEIGHT), facecolor="white")
        self._drawing = _Drawing(figure, self)
        self._backdrop = Backdrop(figure, DPI)

    def png(self, frame: Frame) -> bytes:
        """The picture of a frame as a PNG file's bytes."""
        with DRAWING:
            self._drawing.update(self, frame)
            pixels = self._backdrop.pixels(self._drawing.moving)
        return _png(Image.fromarray(pixels[..., :3]))

    @on_white()
    def figure(self, frame: Frame) -> DataFigure:
        """The same picture as a figure of its own, its table a row for each entry, or cell, of the matrix."""
        figure = DataFigure(figsize=(WIDTH, HEIGHT), facecolor="white")
        drawing = _Drawing(figure, self)
        drawing.update(self, frame)
        for artist in drawing.moving:
            # What moves is left out of an ordinary drawing.
            artist.set_animated(False)
        rows, columns = np.indices(self._colours.shape[:2]).reshape(2, -1)
        table = {"row": rows, "column": columns, "score": self._pooled(self._scores).ravel()}
        table["kept"] = self._pooled(frame.mask.float()).ravel()
        if frame.other is not None:
            table["kept_by_other"] = self._pooled(frame.other.float()).ravel()
        figure.table = pd.DataFrame(table)
        return figure

    def _coloured(self, values: np.ndarray) -> np.ndarray:
        return np.asarray(KEPT(Normalize(0, self._highest)(values), bytes=True))[..., :3]

    def _pooled(self, values: torch.Tensor) -> np.ndarray:
        if self._side == 1:
            return values.numpy()
        return F.avg_pool2d(values[None], self._side, ceil_mode=True)[0].numpy()

    def _corner(self, tensor: torch.Tensor) -> np.ndarray:
        return tensor[:CORNER_ROWS, : CORNER_GROUPS * (self._m or 4)].numpy()

    def whole(self, frame: Frame) -> np.ndarray:
        """The pixels of the whole matrix."""
        if frame.other is not None:
            masks = [frame.mask & frame.other, frame.mask & ~frame.other, frame.other & ~frame.mask]
            return _mixed([self._pooled(each.float()) for each in masks])
        if self._side == 1:
            return np.where(frame.mask.numpy()[..., None], self._colours, np.uint8(255))
        share = self._pooled(frame.mask.float())[..., None]
        return (255 - share * (255 - self._colours.astype(np.float32))).astype(np.uint8)

    def near(self, frame: Frame) -> np.ndarray:
        """The pixels of the corner."""
        mask = self._corner(frame.mask)
        if frame.other is None:
            return np.where(mask[..., None], self._near, np.uint8(255))
        other = self._corner(frame.other)
        return _mixed([each.astype(np.float32) for each in (mask & other, mask & ~other, other & ~mask)])

    def counts(self, mask: torch.Tensor) -> np.ndarray:
        """How many of the scores that a mask keeps lie in each bin of the histogram."""
        return np.bincount(self._bins[mask.numpy()], minlength=BINS)


class _Drawing:
    """The artists of a view in one figure: those that stay, and `moving`, which follow the frame."""

    def __init__(self, figure: DataFigure, view: MaskView):
        shape = view._scores.shape
        # Cells are squares, unless the matrix would be a narrow strip.
        ratio = float(np.clip(shape[0] / shape[1], FLATTEST, STEEPEST)) * WIDTH / HEIGHT
        width, height = min(0.42, 0.68 / ratio), min(0.68, 0.42 * ratio)
        whole = figure.add_axes((0.055, TOP - height, width, height))
        left = width + 0.11
        near = figure.add_axes((left, TOP - 0.30, 0.98 - left, 0.30))
        below = figure.add_axes((left, 0.19, 0.98 - left, 0.22))
        white = np.full((1, 1, 3), 255, np.uint8)
        self.whole = _pixels(whole, white, shape, "antialiased", aspect="auto")
        whole.set_xlabel(f"{shape[1]} inputs", fontsize=8)
        whole.set_ylabel(f"{shape[0]} outputs", fontsize=8)
        rows, columns = view._corner(view._scores).shape
        self.near = _pixels(near, white, (rows, columns), "nearest", aspect="auto")
        groups = f", groups of {view._m}" if view._m else ""
        near.set_xlabel(f"its first {rows} rows and {columns} columns{groups}", fontsize=8)
        grid = near.hlines(np.arange(1, rows), 0, columns, color="#BBBBBB", linewidth=0.4)
        fine = near.vlines(np.arange(1, columns), 0, rows, color="#BBBBBB", linewidth=0.4)
        parts = np.arange(view._m or columns, columns, view._m or 1)
        lines = near.vlines(parts, 0, rows, color=LINE, linewidth=1.6)
        edges = np.linspace(0, view._highest, BINS + 1)
        everything = np.bincount(view._bins.ravel(), minlength=BINS)
        below.stairs(everything, edges, fill=True, color="#DDDDDD")
        below.stairs(everything, edges, color=GREY, linewidth=0.8)
        below.set_xlim(0, view._highest)
        below.set_ylim(0, 1.08 * max(1, everything.max()))
        below.set_yticks([])
        below.tick_params(labelsize=8)
        below.set_xlabel(plain(view._label), fontsize=8)
        below.spines[["top", "right", "left"]].set_visible(False)
        # What the second criterion keeps as well stands in front, in the colour of both.
        self.kept, self.both = (
            below.stairs(np.zeros(BINS), edges, fill=True, color=COMPARED[i], animated=True) for i in (1, 3)
        )
        self.band = below.axvspan(0, 0, color=LINE, alpha=0.25, linewidth=0, animated=True)
        self.lines = [below.axvline(0, color=LINE, linewidth=1.6, animated=True) for _ in range(2)]
        self.title = figure.text(0.055, 0.975, "", fontsize=9.5, va="top", linespacing=1.35, animated=True)
        above = [grid, fine, lines]
        for artist in above:
            artist.set_animated(True)
        self.moving = [
            self.whole,
            self.near,
            *above,
            self.kept,
            self.both,
            self.band,
            *self.lines,
            self.title,
        ]
        _caption(figure, view)

    def update(self, view: MaskView, frame: Frame) -> None:
        """Let the artists show a frame."""
        self.whole.set_data(view.whole(frame))
        self.near.set_data(view.near(frame))
        both = frame.mask if frame.other is None else frame.mask & frame.other
        self.kept.set_data(values=view.counts(frame.mask))
        self.both.set_data(values=view.counts(both))
        self.title.set_text(plain(frame.title))
        seen = bool(frame.thresholds.numel())
        ends = torch.stack(frame.thresholds.aminmax()).clamp_max(view._highest).tolist() if seen else (0, 0)
        for line, end in zip(self.lines, ends, strict=True):
            line.set_xdata([end, end])
            line.set_visible(seen)
        self.band.set_bounds(ends[0], 0, ends[1] - ends[0], 1)
        self.band.set_visible(seen)


def _pixels(axes: Axes, pixels: np.ndarray, shape, interpolation: str, aspect):
    rows, columns = shape
    extent = (0.0, float(columns), float(rows), 0.0)
    axes.set_xticks([])
    axes.set_yticks([])
    return axes.imshow(pixels, extent=extent, aspect=aspect, interpolation=interpolation, animated=True)


def _png(image: Image.Image) -> bytes:
    """A PNG file's bytes in 256 colours: a third of the bytes in half of the time."""
    # Colours differ by a few parts in 255 from what was drawn; white, which has a meaning, stays white.
    few = image.quantize(256, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    few.putpalette([255 if part >= 253 else part for part in few.getpalette() or []])
    file = io.BytesIO()
    few.save(file, "PNG", compress_level=1)
    return file.getvalue()


def _mixed(shares: list[np.ndarray]) -> np.ndarray:
    """White where neither keeps, else the colours of both, the first only and the second only, by share."""
    both, first, second = shares
    share = np.stack([1 - both - first - second, first, second, both], axis=-1)
    palette = 255 * np.array([to_rgb(colour) for colour in COMPARED], np.float32)
    return (share @ palette).round().clip(0, 255).astype(np.uint8)


def _caption(figure: DataFigure, view: MaskView) -> None:
    averaged = f"; a cell is the mean of up to {view._side} × {view._side} entries" if view._side > 1 else ""
    style: dict = {"fontsize": 8, "color": CAPTION, "va": "bottom"}
    if view._names is None:
        words = f"white: pruned; the darker, the larger the score{averaged}"
        words += ". Histogram: all scores grey, kept ones blue, the largest in the last bar."
        figure.text(0.055, 0.015, words, **style)
        return
    first, second = view._names
    said = ["kept by both", f"only {first}", f"only {second}"]
    handles = [
        Line2D([], [], linestyle="", marker="s", markersize=8, color=COMPARED[i], label=plain(words))
        for i, words in zip((3, 1, 2), said, strict=True)
    ]
    handles.append(
        Line2D([], [], linestyle="", marker="s", markersize=8, color="white", mec=GREY, label="neither")
    )
    figure.legend(
        handles=handles,
        loc="lower left",
        bbox_to_anchor=(0.045, 0.0),
        ncols=4,
        fontsize=8,
        frameon=False,
        handletextpad=0.2,
        columnspacing=1.6,
    )
