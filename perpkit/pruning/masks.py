"""Masks: which weights are kept, explicitly, exactly and checkably."""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal, overload

import numpy as np
import pandas as pd
import torch
from torch import nn

from .layers import block_name


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

    @overload
    def sparsity(self) -> float: ...
    @overload
    def sparsity(self, by: Literal["layer", "block"]) -> pd.DataFrame: ...

    def sparsity(self, by: Literal["layer", "block"] | None = None) -> float | pd.DataFrame:
        """The fraction of pruned weights over all masked matrices, or a table by layer or block.

        The table has the columns layer or block, weights, pruned (numbers of weights) and sparsity.

        Raises ValueError for any other `by`.

        >>> half, all = torch.tensor([[True, False]]), torch.tensor([[True, True]])
        >>> masks = Masks({"h.0.a.weight": half, "h.0.b.weight": all})
        >>> masks.sparsity(by="block").to_dict("records")
        [{'block': 'h.0', 'weights': 4, 'pruned': 1, 'sparsity': 0.25}]
        """
        if by not in (None, "layer", "block"):
            raise ValueError(f"cannot show the sparsity by {by!r}; valid are 'layer' and 'block'")
        rows = [(name, mask.numel(), mask.numel() - int(mask.sum())) for name, mask in self.items()]
        if by is None:
            total = sum(count for _, count, _ in rows)
            return sum(pruned for *_, pruned in rows) / total if total else 0.0
        table = pd.DataFrame(rows, columns=[by, "weights", "pruned"])
        if by == "block":
            table["block"] = table["block"].map(block_name)
            table = table.groupby("block", sort=False, as_index=False).sum()
        return table.assign(sparsity=table["pruned"] / table["weights"].clip(lower=1))

    def overlap(self, other: "Masks") -> pd.DataFrame:
        """How far two masks of one model agree: a row a layer.

        `agreement` is the fraction of weights that both keep or both prune; `overlap` the number of weights
        that both keep over the number that either keeps (1 for equal masks, 1 where neither keeps any).

        Raises ValueError when the masks are not of the same matrices.

        >>> one, two = torch.tensor([[True, False, True]]), torch.tensor([[True, True, False]])
        >>> Masks({"w": one}).overlap(Masks({"w": two})).round(2).to_dict("records")
        [{'layer': 'w', 'agreement': 0.33, 'overlap': 0.33}]
        """
        if different := set(self) ^ set(other):
            raise ValueError(f"only one of the two has a mask of {min(different)!r}")
        rows = []
        for name, mine in self.items():
            theirs = other[name].to(mine.device)
            if mine.shape != theirs.shape:
                shapes = f"{tuple(mine.shape)} and {tuple(theirs.shape)}"
                raise ValueError(f"the masks of {name!r} have the shapes {shapes}; they are of two models")
            either = int((mine | theirs).sum())
            both = int((mine & theirs).sum()) / either if either else 1.0
            rows.append((name, float((mine == theirs).double().mean()), both))
        return pd.DataFrame(rows, columns=["layer", "agreement", "overlap"])

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

    def _matched(self, model: nn.Module) -> Iterator[tuple[nn.Parameter, torch.Tensor]]:
        """Each matrix with its mask, brought to the matrix's device one after the other."""
        parameters = dict(model.named_parameters())
        for name, mask in self.items():
            if name not in parameters:
                raise ValueError(f"the masks belong to another model: this one has no {name!r}")
            if parameters[name].shape != mask.shape:
                ours, theirs = tuple(mask.shape), tuple(parameters[name].shape)
                raise ValueError(
                    f"the masks belong to another model: {name!r} is {theirs} here, {ours} there"
                )
        for name, mask in self.items():
            yield parameters[name], mask.to(parameters[name].device)

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
