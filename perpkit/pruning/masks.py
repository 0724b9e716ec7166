"""Masks: which weights are kept, explicitly, exactly and checkably."""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import nn


def keep_highest(scores: torch.Tensor, sparsity: float) -> torch.Tensor:
    """The boolean mask (`True` = kept) that prunes exactly `round(sparsity · n)` of the n lowest scores.

    Of equal scores at the threshold those in front are pruned first, so the count is exact under ties
    (published code prunes everything up to the threshold and so one or more too many).

    Raises ValueError for a sparsity outside [0, 1] or scores that are NaN.

    >>> keep_highest(torch.tensor([[3.0, 1.0], [1.0, 1.0]]), 0.5)
    tensor([[ True, False],
            [False,  True]])
    """
    if not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity is {sparsity}; it is the fraction of pruned weights, between 0 and 1")
    if scores.isnan().any():
        raise ValueError("a score is NaN; the weights or activations it was computed from are broken")
    flat = scores.flatten()
    pruned = round(sparsity * flat.numel())
    if pruned == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    threshold = flat.kthvalue(pruned).values
    mask = flat > threshold
    ties = (flat == threshold).nonzero().squeeze(1)
    spared = flat.numel() - pruned - int(mask.sum())
    if spared:
        mask[ties[-spared:]] = True
    return mask.view(scores.shape)


class Masks(Mapping[str, torch.Tensor]):
    """Boolean masks by parameter name, `True` = kept, each in the shape of its weight.

    >>> masks = Masks({"w": torch.tensor([[True, False]])})
    >>> masks.sparsity()
    0.5
    """

    def __init__(self, masks: Mapping[str, torch.Tensor]):
        for name, mask in masks.items():
            if mask.dtype != torch.bool:
                raise ValueError(f"the mask of {name!r} is {mask.dtype}; masks are boolean, True = kept")
        self._masks = dict(masks)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._masks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    def __repr__(self) -> str:
        return f"Masks({len(self)} matrices, sparsity {self.sparsity():.4f})"

    def sparsity(self) -> float:
        """The fraction of pruned weights over all masked matrices."""
        total = sum(mask.numel() for mask in self.values())
        return 1 - sum(int(mask.sum()) for mask in self.values()) / total if total else 0.0

    @torch.no_grad()
    def apply(self, model: nn.Module) -> None:
        """Set every pruned weight of the model to zero, in place.

        Raises ValueError when the masks do not fit the model; nothing has been changed then.
        """
        for weight, mask in self._matched(model):
            weight.masked_fill_(~mask, 0)

    def check(self, model: nn.Module) -> None:
        """Raise ValueError naming the first matrix in which a pruned weight is not exactly zero."""
        for name, (weight, mask) in zip(self, self._matched(model), strict=True):
            if alive := int(torch.count_nonzero(weight.detach()[~mask])):
                raise ValueError(f"{name!r} is no longer sparse: {alive} pruned weights are not zero")

    def _matched(self, model: nn.Module) -> list[tuple[nn.Parameter, torch.Tensor]]:
        parameters = dict(model.named_parameters())
        matched = []
        for name, mask in self.items():
            if name not in parameters:
                raise ValueError(f"the masks belong to another model: this one has no {name!r}")
            if parameters[name].shape != mask.shape:
                ours, theirs = tuple(mask.shape), tuple(parameters[name].shape)
                raise ValueError(
                    f"the masks belong to another model: {name!r} is {theirs} here, {ours} there"
                )
            matched.append((parameters[name], mask.to(parameters[name].device)))
        return matched

    def save(self, path: str | Path) -> None:
        """Write the masks to a safetensors file, one bit a weight."""
        from safetensors.torch import save_file

        packed = {name: torch.from_numpy(np.packbits(mask.cpu().numpy())) for name, mask in self.items()}
        shapes = {name: list(mask.shape) for name, mask in self.items()}
        save_file(packed, path, metadata={"format": "perpkit masks 1", "shapes": json.dumps(shapes)})

    @classmethod
    def load(cls, path: str | Path) -> "Masks":
        """Read masks written by `save`.

        Raises ValueError for a file that does not hold masks.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="np") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != "perpkit masks 1":
                    raise ValueError(f"{str(path)!r} holds no perpkit masks")
                shapes = json.loads(metadata["shapes"])
                masks = {}
                for name, shape in shapes.items():
                    packed = file.get_tensor(name)
                    if len(packed) != math.ceil(math.prod(shape) / 8):
                        raise ValueError(
                            f"{str(path)!r} is damaged: {name!r} does not fill its shape {shape}"
                        )
                    masks[name] = _unpack(packed, shape)
                return cls(masks)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"cannot read masks from {str(path)!r}: {error}") from error


def _unpack(packed: np.ndarray, shape: list[int]) -> torch.Tensor:
    bits = np.unpackbits(packed, count=math.prod(shape)).astype(bool)
    return torch.from_numpy(bits).view(shape)
