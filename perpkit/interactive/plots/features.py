"""Filters of a convolution, and rows of feature maps and pictures."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
import torch
from matplotlib.colors import Normalize

from .card import SCALE, WIDTH, card, plain, settle, write_caption
from .figure import DataFigure, on_white

FILTERS_IN_A_ROW = 8
MAPS_IN_A_ROW = 5
# Up to this size a cell has room for the cross of a pruned weight.
CROSSED = 7


@on_white()
def plot_filters(weight: torch.Tensor, *, count: int = 16) -> DataFigure:
    """Draw the first `count` filters of a convolution's weight `[out, in, height, width]` on one scale.

    Filters over three channels are drawn as colours, mid-grey for zero, all others by their strongest input
    channel (largest L2 norm), whose number stands above. Weights that are exactly zero are crossed out in
    kernels of up to 7 × 7. The figure's table has a row for each weight drawn.

    Raises ValueError for a tensor of another kind and a count below one.

    >>> figure = plot_filters(torch.ones(4, 1, 3, 3), count=2)
    >>> figure.table["filter"].unique().tolist(), len(figure.table)
    ([0, 1], 18)
    """
    if weight.ndim != 4 or not weight.numel():
        raise ValueError(f"the tensor is {list(weight.shape)}; filters are [out, in, height, width]")
    if count < 1:
        raise ValueError(f"count is {count}; it must be at least 1")
    filters = weight.detach()[:count].float().cpu()
    shown = len(filters)
    coloured = filters.shape[1] == 3
    channels = (
        torch.arange(3).expand(shown, 3) if coloured else filters.flatten(2).norm(dim=2).argmax(1)[:, None]
    )
    kernels = filters[torch.arange(shown)[:, None], channels]
    finite = kernels[torch.isfinite(kernels)]
    largest = float(finite.abs().max()) if len(finite) else 0.0
    largest = largest or 1.0
    norm = Normalize(-largest, largest)
    columns = min(FILTERS_IN_A_ROW, shown)
    rows = -(-shown // columns)
    figure = card(_cells(kernels, channels), height=0.65 + rows * (0.2 + (WIDTH - 0.9) / FILTERS_IN_A_ROW))
    panels = figure.subplots(rows, columns, squeeze=False)
    image = None
    for i, axes in enumerate(panels.flat):
        axes.axis("off")
        if i >= shown:
            continue
        if coloured:
            axes.imshow(norm(kernels[i].permute(1, 2, 0).numpy()).clip(0, 1), interpolation="nearest")
            axes.set_title(f"{i}", fontsize=8, pad=2)
            continue
        kernel = kernels[i, 0].numpy()
        image = axes.imshow(kernel, cmap=SCALE, norm=norm, interpolation="nearest")
        axes.set_title(f"{i} ← {int(channels[i, 0])}" if filters.shape[1] > 1 else f"{i}", fontsize=8, pad=2)
        if max(kernel.shape) <= CROSSED:
            down, across = np.nonzero(kernel == 0)
            axes.plot(across, down, "x", color="white", markersize=4, markeredgewidth=1)
    if image is not None:
        figure.colorbar(image, ax=panels.ravel().tolist(), label="weight", pad=0.02, aspect=20)
    write_caption(figure, _filters_said(weight, shown, coloured))
    return figure


@on_white()
def plot_maps(rows: Mapping[str, torch.Tensor]) -> DataFigure:
    """Draw feature maps `[height, width]` on one common scale, and pictures `[3, height, width]` as pictures.

    `rows` maps titles to tensors, drawn from left to right. A picture of floats lies in [0, 1], of bytes in
    0 to 255; one that leaves [0, 1] is stretched from its lowest to its highest value, as the caption says.
    Values that are not finite are left white and counted in the caption. The figure's table has a row for
    each value, with its `channel` in pictures.

    Raises ValueError for no map at all and for tensors of other shapes.

    >>> figure = plot_maps({"dense": torch.zeros(4, 4), "pruned": torch.ones(4, 4)})
    >>> [axes.get_title() for axes in figure.axes[:2]], figure.axes[1].get_images()[0].get_clim()
    (['dense', 'pruned'], (0.0, 1.0))
    """
    if not rows:
        raise ValueError("there is no map to draw")
    tensors = {title: _readable(title, tensor) for title, tensor in rows.items()}
    maps = {title: tensor for title, tensor in tensors.items() if tensor.ndim == 2}
    values = np.concatenate([tensor.ravel() for tensor in maps.values()]) if maps else np.zeros(1)
    finite = values[np.isfinite(values)]
    lowest, highest = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
    norm = Normalize(lowest, highest if highest > lowest else lowest + 1)
    across = min(MAPS_IN_A_ROW, len(tensors))
    down = -(-len(tensors) // across)
    high = max(tensor.shape[-2] / tensor.shape[-1] for tensor in tensors.values())
    side = (WIDTH - (1.0 if maps else 0.2)) / across
    lines = max(title.count("\n") for title in tensors) + 1
    figure = card(_values(tensors), height=float(np.clip(0.4 + down * (side * high + 0.2 * lines), 2, 9)))
    panels = figure.subplots(down, across, squeeze=False)
    image, stretched = None, []
    for axes in panels.flat:
        axes.axis("off")
    for axes, (title, tensor) in zip(panels.flat, tensors.items(), strict=False):
        axes.set_title(plain(title), fontsize=9)
        if tensor.ndim == 2:
            image = axes.imshow(tensor, cmap=SCALE, norm=norm, interpolation="nearest")
        else:
            picture, wide = _picture(tensor)
            axes.imshow(picture, interpolation="nearest")
            stretched += [title] if wide else []
    if image is not None:
        mapped = [
            axes for axes, tensor in zip(panels.flat, tensors.values(), strict=False) if tensor.ndim == 2
        ]
        figure.colorbar(image, ax=mapped, label="activation", pad=0.02, aspect=20)
    lost = len(values) - len(finite) if maps else 0
    write_caption(
        figure,
        [
            f"all maps on one scale, {lowest:.3g} to {highest:.3g}" if maps else "",
            f"stretched from lowest to highest value: {', '.join(stretched)}" if stretched else "",
            f"{lost} of {len(values)} values are not finite and left white" if lost else "",
        ],
    )
    settle(figure)
    return figure


def _cells(kernels: torch.Tensor, channels: torch.Tensor) -> pd.DataFrame:
    places = np.indices(kernels.shape).reshape(4, -1)
    return pd.DataFrame(
        {
            "filter": places[0],
            "channel": channels.numpy()[places[0], places[1]],
            "row": places[2],
            "column": places[3],
            "weight": kernels.numpy().ravel(),
        }
    )


def _filters_said(weight: torch.Tensor, shown: int, coloured: bool) -> list[str]:
    out, inputs, height, width = weight.shape
    lines = [
        f"{'all' if shown == out else f'the first {shown} of'} {out} filters of {inputs} × {height} × {width}"
    ]
    if coloured:
        lines[0] += " weights as red, green and blue; grey: zero"
    else:
        if inputs > 1:
            lines[0] += "; each by its strongest input channel: filter ← channel"
        if max(height, width) <= CROSSED:
            lines.append("crosses: weights that are exactly zero")
    return lines


def _readable(title: str, tensor: torch.Tensor) -> np.ndarray:
    """A map `[h, w]` or a picture `[h, w, 3]`... as float32 on the CPU, bytes brought to [0, 1]."""
    if not tensor.numel() or not (tensor.ndim == 2 or (tensor.ndim == 3 and len(tensor) == 3)):
        raise ValueError(
            f"{title!r} is {list(tensor.shape)}; a map is [height, width], a picture [3, height, width]"
        )
    values = tensor.detach().float().cpu().numpy()
    return values / 255 if tensor.dtype == torch.uint8 and tensor.ndim == 3 else values


def _picture(tensor: np.ndarray) -> tuple[np.ndarray, bool]:
    """A picture `[h, w, 3]` in [0, 1], and whether it had to be stretched."""
    finite = tensor[np.isfinite(tensor)]
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
    wide = low < 0 or high > 1
    shown = (tensor - low) / ((high - low) or 1.0) if wide else tensor
    return np.nan_to_num(shown, nan=1.0, posinf=1.0, neginf=0.0).clip(0, 1).transpose(1, 2, 0), wide


def _values(tensors: dict[str, np.ndarray]) -> pd.DataFrame:
    tables = []
    for title, tensor in tensors.items():
        places = np.indices(tensor.shape).reshape(tensor.ndim, -1)
        channel = places[0] if tensor.ndim == 3 else np.full(places.shape[1], np.nan)
        columns = {"row": places[-2], "column": places[-1], "value": tensor.ravel()}
        tables.append(pd.DataFrame({"title": title, "channel": channel, **columns}))
    return pd.concat(tables, ignore_index=True)
