"""How much of each layer is pruned, so that the whole reaches the target. Pure functions.

Each takes what it looks at by layer and the sparsity of the whole, and returns every layer's sparsity; the
numbers of pruned weights, `round(sparsity · n)`, add up to that of the whole exactly, but for `uniform`.
"""

import math
from collections.abc import Mapping, Sequence

import torch

from .selection import kth_lowest

ALLOCATIONS = ("uniform", "uniform+", "global", "erk", "lamp", "owl")


def uniform(sizes: Mapping[str, int], sparsity: float) -> dict[str, float]:
    """Every layer the same.

    >>> uniform({"a": 4, "b": 8}, 0.5)
    {'a': 0.5, 'b': 0.5}
    """
    return dict.fromkeys(sizes, sparsity)


def uniform_plus(
    sizes: Mapping[str, int], sparsity: float, *, first: str | None, classifier: str | None
) -> dict[str, float]:
    """Every layer the same, but the first convolution dense and the classifier at most 80 % pruned.

    Source: Gale, Elsen and Hooker 2019. A model without either is pruned uniformly.

    Raises ValueError for a sparsity that the rest, pruned entirely, does not reach.

    >>> uniform_plus({"conv": 10, "body": 80, "head": 10}, 0.8, first="conv", classifier="head")
    {'conv': 0.0, 'body': 0.9, 'head': 0.8}
    """
    most = {name: 0.0 if name == first else 1.0 for name in sizes}
    if classifier is not None:
        most[classifier] = math.floor(0.8 * sizes[classifier]) / sizes[classifier]
    total = sum(sizes.values())
    reached = sum(round(most[name] * size) for name, size in sizes.items())
    if round(sparsity * total) > reached:
        raise ValueError(
            f"sparsity is {sparsity}, but uniform+ prunes at most {reached / total:.4f} of this model: the "
            "first convolution stays dense and the classifier keeps a fifth of its weights"
        )
    return _filled(sizes, dict.fromkeys(sizes, 1.0), most, sparsity)


def erk(shapes: Mapping[str, Sequence[int]], sparsity: float) -> dict[str, float]:
    """Erdős–Rényi kernel: density ∝ (sum of a layer's dimensions) / (their product), at most 1.

    Source: Evci et al. 2020. `[out, in]` for a matrix, `[out, in, height, width]` for a convolution.

    >>> {name: round(s, 3) for name, s in erk({"wide": (8, 8), "narrow": (2, 8)}, 0.5).items()}
    {'wide': 0.609, 'narrow': 0.062}
    """
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    raw = {name: sum(shape) / math.prod(shape) for name, shape in shapes.items()}
    density = _filled(sizes, raw, dict.fromkeys(sizes, 1.0), 1 - sparsity, exact=False)
    return _exact(sizes, {name: 1 - value for name, value in density.items()}, sparsity)


def from_scores(scores: Mapping[str, torch.Tensor], sparsity: float) -> dict[str, float]:
    """One threshold over the scores of all layers: the sparsity that it leaves in each.

    Of equal scores those in front are counted as pruned first.

    >>> from_scores({"a": torch.tensor([1.0, 4.0]), "b": torch.tensor([2.0, 3.0])}, 0.5)
    {'a': 0.5, 'b': 0.5}
    """
    flat = torch.cat([score.flatten() for score in scores.values()])
    pruned = round(sparsity * flat.numel())
    if pruned == 0:
        return dict.fromkeys(scores, 0.0)
    threshold = kth_lowest(flat[None], pruned)[0, 0]
    # Ties at the threshold are pruned from the front, as selection does it inside a layer.
    left = pruned - int((flat < threshold).sum())
    found = {}
    for name, score in scores.items():
        ties = min(left, int((score == threshold).sum()))
        left -= ties
        found[name] = (int((score < threshold).sum()) + ties) / score.numel()
    return found


def lamp(weights: Mapping[str, torch.Tensor], sparsity: float) -> dict[str, float]:
    """Layer-adaptive magnitude: one threshold over `w² / Σ w'²`, the sum over a layer's weights `|w'| ≥ |w|`.

    Source: Lee et al. 2021.

    >>> lamp({"a": torch.tensor([[1.0, 2.0]]), "b": torch.tensor([[10.0, 10.0]])}, 0.25)
    {'a': 0.5, 'b': 0.0}
    """
    scores = {}
    for name, weight in weights.items():
        squares, order = weight.detach().flatten().double().square().sort()
        tail = squares.flip(0).cumsum(0).flip(0)
        scored = torch.where(tail > 0, squares / tail, 0)
        scores[name] = torch.empty_like(scored).scatter_(0, order, scored)
    return from_scores(scores, sparsity)


def outlier_ratio(scores: Sequence[torch.Tensor], multiple: float = 5.0) -> float:
    """The fraction of a block's Wanda scores that exceed `multiple` times their matrix's mean.

    Source: OWL, Yin et al. 2023 (there 5 to 10 times).

    >>> outlier_ratio([torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 33.0])])
    0.125
    """
    above = sum(int((score > multiple * score.mean()).sum()) for score in scores)
    return above / sum(score.numel() for score in scores)


def owl(
    sizes: Mapping[str, int], ratios: Mapping[str, float], sparsity: float, *, spread: float = 0.08
) -> dict[str, float]:
    """Outlier-weighed: the more outliers a layer's block has, the less is pruned, over a range of 2·`spread`.

    `ratios` are the outlier ratios D of each layer's block. The density is `1 − s + 2·spread·(D − mean D) /
    (max D − min D)`, the mean being over weights, so that the whole keeps its sparsity.

    Source: OWL, Yin et al. 2023 (the largest deviation there is 0.08).

    >>> owl({"a": 100, "b": 100}, {"a": 0.02, "b": 0.01}, 0.5)
    {'a': 0.42, 'b': 0.58}
    """
    total = sum(sizes.values())
    mean = sum(ratios[name] * size for name, size in sizes.items()) / total
    width = max(ratios.values()) - min(ratios.values())
    # Nothing to weigh by where all are alike, nor room where all or nothing is pruned.
    scale = 2 * spread / width if width and 0 < sparsity < 1 else 0.0
    wanted = {name: sparsity - scale * (ratios[name] - mean) for name in sizes}
    return _exact(sizes, wanted, sparsity)


def _filled(
    sizes: Mapping[str, int],
    raw: Mapping[str, float],
    most: Mapping[str, float],
    total: float,
    *,
    exact: bool = True,
) -> dict[str, float]:
    """Fractions proportional to `raw`, none over its `most`, that make `total` of all weights."""
    found: dict[str, float] = {}
    free = list(sizes)
    left = total * sum(sizes.values())
    while free:
        room = sum(raw[name] * sizes[name] for name in free)
        scale = left / room if room else 0.0
        over = [name for name in free if scale * raw[name] > most[name]]
        for name in over or free:
            found[name] = min(scale * raw[name], most[name])
            left -= found[name] * sizes[name]
        free = [name for name in free if name not in found]
    found = {name: found[name] for name in sizes}
    return _exact(sizes, found, total) if exact else found


def _exact(sizes: Mapping[str, int], wanted: Mapping[str, float], sparsity: float) -> dict[str, float]:
    """The nearest sparsities in [0, 1] whose whole numbers of weights add up to that of the target."""
    total = round(sparsity * sum(sizes.values()))
    counts = {name: min(max(wanted[name], 0.0), 1.0) * size for name, size in sizes.items()}
    whole = {name: math.floor(count) for name, count in counts.items()}
    # Largest remainders first; several rounds where clipping to [0, 1] has left more to give or to take.
    order = sorted(sizes, key=lambda name: whole[name] - counts[name])
    missing = total - sum(whole.values())
    while missing:
        step = 1 if missing > 0 else -1
        each = max(1, abs(missing) // len(order))
        for name in order:
            room = sizes[name] - whole[name] if step > 0 else whole[name]
            change = min(each, room, abs(missing))
            whole[name] += step * change
            missing -= step * change
    return {name: whole[name] / size for name, size in sizes.items()}
