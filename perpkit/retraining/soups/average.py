"""Averages of models that share their masks: uniform, weighted, and the greedy soup."""

import copy
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import nn

from ...pruning.masks import Masks
from ..batchnorm import batchnorms

States = Mapping[str, torch.Tensor]
Model = TypeVar("Model", nn.Module, States)


def average(
    models: Sequence[Model],
    masks: Masks | Sequence[Masks] | None = None,
    weights: Sequence[float] | None = None,
) -> Model:
    """The mean of models, or of their state dicts, `Σᵢ wᵢ θᵢ / Σᵢ wᵢ`, as a new one; none of them changes.

    Floating-point parameters and buffers are averaged in float64 and cast back; integer buffers are those of
    the first. The order of the models changes no more than the rounding, and the mean of equal models is
    that model. `masks` are what all the models share, or one for each, which must agree: what they prune must
    be exactly zero in every model, and is in the average. Statistics of batch normalisations are averaged
    too, which is not what the averaged weights lead to: `recalibrate_batchnorm` afterwards (Sparse Model
    Soups; section 7 of the methods).

    Raises ValueError, naming the layer, for models of differing tensors, shapes or masks; and for no models,
    adapters that are not merged, and weights that are negative, all zero or of another number.

    >>> one, two = ({"w": torch.tensor([value, 0.0])} for value in (1.0, 4.0))
    >>> average([one, two])["w"], average([one, two], weights=[2, 1])["w"]
    (tensor([2.5000, 0.0000]), tensor([2., 0.]))
    """
    models = list(models)
    states = [_state(model) for model in models]
    check_alike(states)
    if weights is not None:
        _check_weights(weights, len(models))
    agreed = _agreed(masks, len(models))
    if agreed is not None:
        for number, state in enumerate(states):
            _check_zeros(state, agreed, number)
    mean = combine(states, [1.0] * len(models) if weights is None else weights)
    first = models[0]
    if not isinstance(first, nn.Module):
        return mean
    result = copy.deepcopy(first)
    put(result, mean)
    if agreed is not None:
        agreed.check(result)
    return result


def greedy(
    models: Sequence[nn.Module],
    score: Callable[[nn.Module], float],
    masks: Masks,
    prepare: Callable[[nn.Module], None] | None = None,
) -> tuple[nn.Module, list[int], list[float]]:
    """The greedy soup: from the best model on, each is added if the average's score does not get worse.

    `score(model)` is a held-out score, higher is better. `prepare(model)` re-estimates the batch
    normalisations in place, such as `lambda model: recalibrate_batchnorm(model, images)`; it is called on
    every average, a model alone being one, before it is scored. The models stay as they are.

    Returns the average, the indices of its models in the order in which they were added, and the score of
    every model alone (Wortsman et al. 2022; Sparse Model Soups).

    Raises ValueError as `average` does, for a score that is NaN, and for batch normalisations without
    `prepare`.

    >>> models = [nn.Linear(1, 1, bias=False) for _ in range(3)]
    >>> for model, value in zip(models, (5.0, 1.0, 3.0)):
    ...     _ = model.weight.data.fill_(value)
    >>> soup, chosen, scores = greedy(models, lambda model: -abs(model.weight.item() - 2.25), Masks({}))
    >>> soup.weight.item(), chosen, scores
    (2.0, [2, 1], [-2.75, -1.25, -0.75])
    """
    models = list(models)
    check_alike([_state(model) for model in models])
    if batchnorms(models[0]) and prepare is None:
        raise ValueError(
            "the models have batch normalisations, whose statistics no average has right; give "
            "prepare=lambda model: recalibrate_batchnorm(model, inputs)"
        )

    def cooked(indices: list[int]) -> tuple[nn.Module, float]:
        soup = average([models[index] for index in indices], masks)
        if prepare is not None:
            prepare(soup)
        with torch.no_grad():
            value = float(score(soup))
        if math.isnan(value):
            raise ValueError(f"the score of the average of the models {indices} is NaN; no order has it")
        return soup, value

    scores = [cooked([index])[1] for index in range(len(models))]
    first, *rest = sorted(range(len(models)), key=lambda index: -scores[index])
    chosen, best = [first], scores[first]
    for index in rest:
        value = cooked([*chosen, index])[1]
        if value >= best:
            chosen, best = [*chosen, index], value
    return cooked(chosen)[0], chosen, scores


def combine(states: Sequence[States], coefficients: Sequence[float]) -> dict[str, torch.Tensor]:
    """The affine combination `Σ cᵢ θᵢ / Σ cᵢ`, in float64; a state whose coefficient is 0 is not read.

    >>> combine([{"w": torch.tensor([1.0])}, {"w": torch.tensor([3.0])}], [-1, 2])["w"]
    tensor([5.])
    """
    used = [(state, c) for state, c in zip(states, coefficients, strict=True) if c != 0]
    total = sum(c for _, c in used)
    (first, _), *others = used
    mean = {}
    for name, start in first.items():
        if not (start.is_floating_point() or start.is_complex()):
            mean[name] = start.clone()
            continue
        wide = start.to(torch.promote_types(start.dtype, torch.float64))
        moved = torch.zeros_like(wide)
        for state, c in others:
            # By differences: equal values give exactly that value, whatever the coefficients.
            moved += c * (state[name].to(wide) - wide)
        mean[name] = (wide + moved / total).to(start.dtype)
    return mean


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters and stored buffers by name, what is tied once.

    >>> list(tensors_of(nn.BatchNorm1d(2)))
    ['weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked']
    """
    stored = model.state_dict()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in stored}
    return {name: p.detach() for name, p in model.named_parameters()} | buffers


@torch.no_grad()
def put(model: nn.Module, state: States) -> None:
    """Write the tensors of `tensors_of` into a model, in place.

    >>> model = nn.Linear(1, 1, bias=False)
    >>> put(model, {"weight": torch.tensor([[3.0]])})
    >>> model.weight.item()
    3.0
    """
    for name, tensor in tensors_of(model).items():
        tensor.copy_(state[name])


# --- what is refused ------------------------------------------------------------------------------


def check_alike(states: Sequence[States]) -> None:
    """Raise ValueError, naming the first tensor in which states differ by name or shape, or without any.

    >>> check_alike([{"w": torch.zeros(1)}, {"w": torch.zeros(2)}])
    Traceback (most recent call last):
    ValueError: 'w' is (1,) in the first model and (2,) in model 1; only models of one shape have an average
    """
    if not states:
        raise ValueError("there are no models to average; give at least one")
    first = states[0]
    for number, state in enumerate(states):
        # In the last part of a name, or before the adapter's own as PEFT has it: `lora_A.default.weight`.
        if adapted := [name for name in state if re.search(r"(^|\.)lora_|lora_[^.]*$", name)]:
            raise ValueError(
                f"model {number} has adapters ({adapted[0]!r}), whose average is not that of the weights; "
                "merge(model) first"
            )
        if different := set(first) ^ set(state):
            raise ValueError(
                f"only one of the first model and model {number} has a {min(different)!r}; only models of "
                "one architecture have an average"
            )
        for name, tensor in first.items():
            if tensor.shape != state[name].shape:
                raise ValueError(
                    f"{name!r} is {tuple(tensor.shape)} in the first model and {tuple(state[name].shape)} in "
                    f"model {number}; only models of one shape have an average"
                )


def _state(model: nn.Module | States) -> States:
    return tensors_of(model) if isinstance(model, nn.Module) else model


def _check_weights(weights: Sequence[float], count: int) -> None:
    good = len(weights) == count and all(math.isfinite(w) and w >= 0 for w in weights)
    if not good or not sum(weights) > 0:
        raise ValueError(
            f"weights are {list(weights)}; want {count} numbers, none negative and not all of them zero"
        )


def _agreed(masks: Masks | Sequence[Masks] | None, count: int) -> Masks | None:
    """The one mask of all models.

    Raises ValueError naming the layer in which two masks differ.
    """
    if masks is None or isinstance(masks, Masks):
        return masks
    if len(masks) != count:
        raise ValueError(
            f"there are {len(masks)} masks for {count} models; give one for each, or one for all"
        )
    for number, other in enumerate(masks):
        if different := set(masks[0]) ^ set(other):
            raise ValueError(f"only one of the masks 0 and {number} has {min(different)!r}")
        for name, mask in masks[0].items():
            if mask.shape != other[name].shape or not torch.equal(mask, other[name].to(mask.device)):
                raise ValueError(
                    f"the masks 0 and {number} differ in {name!r}; the average of models with differing "
                    "masks loses sparsity (naive_average_sparsity shows how much)"
                )
    return masks[0]


def _check_zeros(state: States, masks: Masks, number: int) -> None:
    for name, mask in masks.items():
        if name not in state or state[name].shape != mask.shape:
            raise ValueError(f"the masks belong to other models: they have no {name!r} {tuple(mask.shape)}")
        if alive := int(torch.count_nonzero(state[name][~mask.to(state[name].device)])):
            raise ValueError(
                f"model {number} has another mask in {name!r}: {alive} of the weights that the masks prune "
                "are not zero"
            )
