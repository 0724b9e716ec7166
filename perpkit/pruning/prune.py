"""The one call that prunes a model."""

import torch
from torch import nn

from .criteria import magnitude, random
from .layers import prunable_weights
from .masks import Masks, keep_highest

CRITERIA = ("magnitude", "random")


@torch.no_grad()
def prune(model: nn.Module, criterion: str, *, sparsity: float, seed: int = 0) -> Masks:
    """Prune every linear weight of the decoder blocks in place and return the masks.

    Each matrix loses exactly `round(sparsity · n)` of its n weights (uniform allocation, compared within the
    matrix), those with the lowest score: `"magnitude"` (Han et al. 2015) or `"random"` (from `seed`).

    Raises ValueError for an unknown criterion, a sparsity outside [0, 1] or weights that are NaN; the model
    is then unchanged.

    >>> import perpkit as pk
    >>> model, _ = pk.load_model("tiny-opt", device="cpu")
    >>> prune(model, "magnitude", sparsity=0.5)
    Masks(18 matrices, sparsity 0.5000)
    """
    if criterion not in CRITERIA:
        raise ValueError(f"unknown criterion {criterion!r}; the criteria are {', '.join(CRITERIA)}")
    generator = torch.Generator().manual_seed(seed)
    kept = {}
    for name, weight in prunable_weights(model).items():
        scores = magnitude(weight) if criterion == "magnitude" else random(weight, generator)
        try:
            kept[name] = keep_highest(scores, sparsity)
        except ValueError as error:
            raise ValueError(f"cannot prune {name!r}: {error}") from error
    masks = Masks(kept)
    masks.apply(model)
    return masks
