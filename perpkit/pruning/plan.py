"""How much of each matrix is pruned, as the arguments of `prune` ask for it."""

import math
from collections.abc import Callable, Mapping
from contextlib import closing
from difflib import get_close_matches
from numbers import Real

import torch
from torch import nn

from . import allocation as allocations
from .calibration import stream
from .criteria import wanda
from .inputs import Inputs, recorded
from .layers import Matrix, block_name

Score = Callable[[Matrix, Inputs | None], torch.Tensor]


class Stopped(Exception):
    """Somebody has cancelled while the model was looked at; nothing is pruned."""


def planned(
    model: nn.Module,
    matrices: Mapping[str, Matrix],
    *,
    sparsity: float | Mapping[str, float] | None,
    pattern: tuple[int, int] | None,
    allocation: str,
    scores: Score,
    calibration: torch.Tensor | None,
    calibrated: bool,
    batch: int,
    offload: bool,
    cancelled: Callable[[], bool] | None = None,
) -> dict[str, float]:
    """The sparsity of every matrix.

    A global threshold and OWL look at the dense model first: `scores(matrix, inputs)` of all matrices are
    then compared, with the inputs of one pass over the calibration data where the criterion is calibrated.

    Raises ValueError for a sparsity that is missing, outside [0, 1] or at odds with the pattern, a pattern
    that does not divide a matrix's width, an unknown allocation or layer, and OWL without calibration; and
    Stopped when `cancelled()` says so between two parts of the model.
    """
    if pattern is not None:
        return _by_pattern(matrices, sparsity, pattern, allocation)
    if isinstance(sparsity, Mapping):
        return _by_name(matrices, sparsity, allocation)
    if sparsity is None:
        raise ValueError("say how much to prune: sparsity=0.5, or pattern='2:4'")
    _check(sparsity)
    sizes = {name: matrix.view(matrix.weight()).numel() for name, matrix in matrices.items()}
    if allocation == "uniform":
        return allocations.uniform(sizes, sparsity)
    if allocation == "uniform+":
        first, classifier = _ends(matrices)
        return allocations.uniform_plus(sizes, sparsity, first=first, classifier=classifier)
    if allocation == "erk":
        shapes = {name: m.weight().shape[m.expert is not None :] for name, m in matrices.items()}
        return allocations.erk(shapes, sparsity)
    if allocation == "lamp":
        weights = {name: matrix.view(matrix.weight()) for name, matrix in matrices.items()}
        return allocations.lamp(weights, sparsity)
    if allocation == "global":
        if not calibrated:
            return allocations.from_scores({n: scores(m, None) for n, m in matrices.items()}, sparsity)
        found = _looked_at(model, calibration, batch, offload, scores, cancelled)
        return allocations.from_scores({name: found[name] for name in matrices}, sparsity)
    if allocation == "owl":
        if calibration is None:
            raise ValueError("owl looks at the activations' outliers: give calibration= token windows")
        return _owl(model, sizes, sparsity, calibration, batch, offload, cancelled)
    raise ValueError(
        f"unknown allocation {allocation!r}; the allocations are {', '.join(allocations.ALLOCATIONS)}, or "
        "a mapping from layer to sparsity, {'….fc1.weight': 0.5}"
    )


def _check(sparsity: float, name: str | None = None) -> None:
    if not isinstance(sparsity, Real) or not 0 <= sparsity <= 1:
        of = f" of {name!r}" if name else ""
        raise ValueError(
            f"sparsity{of} is {sparsity!r}; it is the fraction of pruned weights, between 0 and 1"
        )


def _by_pattern(matrices, sparsity, pattern: tuple[int, int], allocation: str) -> dict[str, float]:
    n, m = pattern
    implied = 1 - n / m
    if allocation != "uniform":
        raise ValueError(f"a pattern prunes every layer alike; allocation={allocation!r} does not go with it")
    if sparsity is not None and not (isinstance(sparsity, Real) and math.isclose(sparsity, implied)):
        raise ValueError(f"{n}:{m} is a sparsity of {implied:g}, but sparsity is {sparsity}; leave one out")
    for name, matrix in matrices.items():
        width = matrix.view(matrix.weight()).shape[1]
        if width % m:
            raise ValueError(
                f"the width {width} of {name!r} is no multiple of {m}; it cannot be pruned {n}:{m}"
            )
    return dict.fromkeys(matrices, implied)


def _by_name(matrices, sparsity: Mapping[str, float], allocation: str) -> dict[str, float]:
    if allocation != "uniform":
        raise ValueError(f"sparsity names its layers; allocation={allocation!r} does not go with it")
    for name, value in sparsity.items():
        if name not in matrices:
            near = get_close_matches(str(name), matrices, n=1, cutoff=0)
            raise ValueError(f"there is no prunable layer {name!r}; did you mean {near[0]!r}?")
        _check(value, name)
    return {name: sparsity.get(name, 0.0) for name in matrices}


def _ends(matrices: Mapping[str, Matrix]) -> tuple[str | None, str | None]:
    """The first convolution and the classifier, the linear layer that ends a network with convolutions."""
    names = list(matrices)
    convolutions = [name for name in names if matrices[name].weight().ndim > 2]
    if not convolutions:
        return None, None
    last = names[-1]
    return convolutions[0], last if isinstance(matrices[last].module, nn.Linear) else None


def _looked_at(
    model, calibration, batch: int, offload: bool, look: Score, cancelled
) -> dict[str, torch.Tensor]:
    """What is seen of every matrix and its inputs in the model as it is."""
    found = {}
    home = next(model.parameters()).device
    with closing(stream(model, calibration, batch=batch, offload=offload)) as parts:
        for part in parts:
            if cancelled is not None and cancelled():
                raise Stopped
            with recorded(part.matrices, gram=False) as inputs:
                part.run()
            found.update(
                {name: look(matrix, inputs[name]).to(home) for name, matrix in part.matrices.items()}
            )
    return found


def _owl(model, sizes, sparsity, calibration, batch, offload, cancelled) -> dict[str, float]:
    def outliers(matrix: Matrix, inputs: Inputs | None) -> torch.Tensor:
        weight = matrix.view(matrix.weight())
        if inputs is None or not inputs.tokens:
            return torch.zeros(2)
        scores = wanda(weight, inputs.norms(len(weight)))
        return torch.tensor([allocations.outlier_ratio([scores]), 1.0])

    seen = _looked_at(model, calibration, batch, offload, outliers, cancelled)
    blocks: dict[str, list[str]] = {}
    for name in sizes:
        blocks.setdefault(block_name(name), []).append(name)
    ratios = {}
    for names in blocks.values():
        counted = [name for name in names if seen[name][1]]
        total = sum(sizes[name] for name in counted)
        ratio = sum(float(seen[name][0]) * sizes[name] for name in counted) / max(total, 1)
        ratios.update(dict.fromkeys(names, ratio))
    return allocations.owl(sizes, ratios, sparsity)
