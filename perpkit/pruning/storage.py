"""What sparsity buys on the disk: the sizes of a model's pruned matrices in the sparse formats."""

import math

import pandas as pd
import torch
from torch import nn

from .layers import prunable_matrices
from .masks import Masks

TILE = 256
INDEX = 4  # bytes of an index or pointer


def storage(model: nn.Module, masks: Masks) -> pd.DataFrame:
    """The bytes that a model with these masks takes in each format, computed from the masks: a row a format.

    `matrices` counts the masked matrices, `model` everything (what is not masked stays dense), `relative` is
    the model's size over its dense one. A value takes what it takes in the model (4 bytes in float32).

    - dense: every value, the pruned zeros too, as every checkpoint does.
    - bitmask: one bit a weight, and the kept values.
    - csr: for each kept value its column (4 bytes), for each row a pointer (4 bytes).
    - tiles: rows cut into tiles of 256 columns; for each kept value its column inside the tile (1 byte), for
      each tile an offset (2 bytes), for each row a pointer (4 bytes) (after "Compressed Sparse Tiles", SLLM
      workshop 2025).
    - 2:4: half the values and two bits for each, as GPUs read it; only where every matrix keeps at most two
      of four consecutive weights, else NaN.

    Raises ValueError when the masks are of another model.

    >>> import perpkit as pk
    >>> model, _ = pk.load_model("tiny-opt", device="cpu")
    >>> masks = pk.prune(model, "magnitude", sparsity=0.5)
    >>> storage(model, masks).set_index("format")["relative"].round(2).to_dict()
    {'dense': 1.0, 'bitmask': 0.71, 'csr': 1.01, 'tiles': 0.78, '2:4': nan}
    """
    matrices = [m for m in prunable_matrices(model).values() if m.parameter in masks]
    if foreign := set(masks) - {m.parameter for m in matrices}:
        raise ValueError(f"the masks belong to another model: this one has no {min(foreign)!r}")
    sizes = dict.fromkeys(("dense", "bitmask", "csr", "tiles", "2:4"), 0.0)
    for matrix in matrices:
        weight = matrix.weight()
        if masks[matrix.parameter].shape != weight.shape:
            raise ValueError(
                f"the masks belong to another model: {matrix.parameter!r} has another shape here"
            )
        for name, size in _sizes(matrix.view(masks[matrix.parameter]), weight.element_size()).items():
            sizes[name] += size
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    rows = [(name, size, size + whole - sizes["dense"]) for name, size in sizes.items()]
    table = pd.DataFrame(rows, columns=["format", "matrices", "model"])
    return table.assign(relative=table["model"] / whole)


def _sizes(mask: torch.Tensor, value: int) -> dict[str, float]:
    """Bytes of a matrix with this mask `[out, in]` by format."""
    rows, width = mask.shape
    kept = int(mask.sum())
    tiles = math.ceil(width / TILE)
    fits = width % 4 == 0 and bool((mask.unflatten(1, (-1, 4)).sum(-1) <= 2).all())
    return {
        "dense": mask.numel() * value,
        "bitmask": math.ceil(mask.numel() / 8) + kept * value,
        "csr": kept * (value + INDEX) + (rows + 1) * INDEX,
        "tiles": kept * (value + 1) + rows * (INDEX + 2 * tiles),
        "2:4": mask.numel() / 2 * value + mask.numel() / 8 if fits else math.nan,
    }
