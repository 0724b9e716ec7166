"""Exercises about soups: what an average does to a mask, and which candidates it is made of."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from ...pruning.masks import Masks
from ...retraining.soups.average import average, greedy
from .verdict import Wrong, call, check, close, number

Tensor = torch.Tensor
States = list[dict[str, Tensor]]


@check("the mean of those that share a mask, and no mean of any others")
def check_soup(my_soup: Callable[[States, Mapping[str, Tensor]], dict[str, Tensor]]) -> None:
    """Check `my_soup(states, masks)`: the average of state dicts that are zero wherever the masks are False.

    `states` is a list of mappings from name to tensor, `masks` one from some of these names to boolean
    tensors, True = kept; other tensors, such as biases, are averaged as they are. A state that has a weight
    other than zero where the mask prunes must raise ValueError. Returned is a new mapping.

    >>> check_soup(lambda states, masks: {name: sum(s[name] for s in states) / len(states) for name in masks})
    ✗ not yet: your soup has no 'bias'; want all the tensors of a state, masked or not
    """
    masks = {"weight": torch.tensor([[True, False, True], [False, True, True]])}
    states = [
        {"weight": torch.tensor(rows) * masks["weight"], "bias": torch.tensor(bias)}
        for rows, bias in [
            ([[1.0, 9.0, 3.0], [9.0, 2.0, 0.0]], [1.0, 0.0]),
            ([[4.0, 9.0, -3.0], [9.0, 0.0, 6.0]], [4.0, 3.0]),
            ([[1.0, 9.0, 9.0], [9.0, 4.0, 3.0]], [1.0, 0.0]),
        ]
    ]
    for given in (states, states[:2], states[:1]):
        got = call(my_soup, given, masks)
        want = average(given, Masks(masks))
        if not isinstance(got, Mapping):
            raise Wrong(f"your soup is a {type(got).__name__}; want a dict from name to tensor")
        if missing := [name for name in want if name not in got]:
            raise Wrong(f"your soup has no {missing[0]!r}; want all the tensors of a state, masked or not")
        for name, tensor in want.items():
            close(f"{name!r} of the average of {len(given)}", got[name], tensor)
    other = [states[0], {**states[1], "weight": torch.ones(2, 3)}]
    # Opposite weights cancel: the average is sparse, its models are not.
    hidden = [{**states[0], "weight": sign * torch.ones(2, 3)} for sign in (1.0, -1.0)]
    # As many weights as the mask keeps, at other places.
    moved = [states[0], {**states[1], "weight": states[1]["weight"].roll(1, 1)}]
    for bad, which in [
        (other, "the second"),
        (other[::-1], "the first"),
        (hidden, "both"),
        (moved, "the second"),
    ]:
        if not _refused(my_soup, bad, masks):
            raise Wrong(
                f"of two states {which} has weights where the mask prunes, and you average them all "
                "the same; raise a ValueError"
            )


@check("a weight is zero in the average only where it is zero in every model")
def check_average_sparsity(my_sparsity: Callable[[float, int], float]) -> None:
    """Check `my_sparsity(sparsity, models)`: the expected sparsity of an average of independent masks.

    Each of `models` models has lost a share `sparsity` of its weights, chosen at random and on its own.

    >>> check_average_sparsity(lambda sparsity, models: sparsity)
    ✗ not yet: two models of sparsity 0.9 average to 0.9; want 0.81. That would be so with one mask for all
    """
    for sparsity, models in [(0.9, 2), (0.5, 3), (0.7, 1), (0.0, 2), (1.0, 4), (0.9, 5)]:
        want = sparsity**models
        got = number("the sparsity", call(my_sparsity, sparsity, models))
        if math.isclose(got, want, abs_tol=1e-6):
            continue
        these = {1: "one model", 2: "two models"}.get(models, f"{models} models")
        said = f"{these} of sparsity {sparsity:g} average to {got:.4g}; want {want:.4g}"
        hints = {
            sparsity: "That would be so with one mask for all",
            (1 - sparsity) ** models: "That is the share of weights that all models keep",
            1 - want: "That is the density of the average",
            sparsity / models: "Sparsity is not spread over the models: a weight is zero or it is not",
        }
        hint = next((words for value, words in hints.items() if math.isclose(got, value, abs_tol=1e-6)), "")
        raise Wrong(f"{said}{f'. {hint}' if hint else ''}")


@check("from the best on, and only what does not make the average worse")
def check_greedy(my_greedy: Callable[[list[Tensor], Callable[[Tensor], float]], Sequence[float]]) -> None:
    """Check `my_greedy(models, score)`: the weights of a greedy soup, one for each model, adding up to 1.

    `models` are tensors of one shape that stand for networks, `score(tensor)` is higher for better ones. From
    the best model on, in the order of their scores, each is added if the score of the average of all that
    are in does not fall.

    >>> check_greedy(lambda models, score: [1 / len(models)] * len(models))
    ✗ not yet: of models at 5, 1, 3 with the best at 2.25 the weights are 0.33, 0.33, 0.33; want 0, 0.5, \
0.5. That is the uniform soup, and what the order of the list gives; the next to be tried is the next best
    """
    for places, best in [
        ([5.0, 1.0, 3.0], 2.25),
        ([1.0, 7.0, 1.5, 0.0], 1.2),
        # The second best is left out, the worst comes in; in the order of the list all would.
        ([-2.0, 1.5, 1.0], 0.0),
        ([2.0, 2.0], 0.0),
        ([3.0], 1),
    ]:
        models = [torch.tensor([place]) for place in places]

        def score(tensor: Tensor, best: float = best) -> float:
            return -abs(float(tensor.detach().flatten()[0]) - best)

        want, scores = _weights(models, score)
        named = ", ".join(f"{place:g}" for place in places)
        asked = f"of models at {named} with the best at {best:g} the weights"
        got = call(my_greedy, [model.clone() for model in models], score)
        got = got.tolist() if isinstance(got, torch.Tensor | np.ndarray) else got
        if not isinstance(got, Sequence) or isinstance(got, str) or len(got) != len(models):
            raise Wrong(f"{asked} are {got!r}; want a list of {len(models)} numbers")
        got = [number("a weight", each) for each in got]
        if all(math.isclose(a, b, abs_tol=1e-4) for a, b in zip(got, want, strict=True)):
            continue
        shown = ", ".join(f"{each:.2g}" for each in got)
        said = f"{asked} are {shown}; want {', '.join(f'{each:.2g}' for each in want)}"
        if not math.isclose(sum(got), 1, abs_tol=1e-4):
            said += f". They add up to {sum(got):.3g}, not 1"
        elif len({*scores}) == 1 and max(got) == 1:
            said += ". A model that leaves the score as it is comes in, too"
        elif all(math.isclose(each, 1 / len(got), abs_tol=1e-4) for each in got):
            said += ". That is the uniform soup"
            if math.isclose(min(_in_the_order_of_the_list(models, score)), 1 / len(got)):
                said += ", and what the order of the list gives; the next to be tried is the next best"
        elif max(got) == 1 and got.index(1) == scores.index(max(scores)):
            said += ". That is the best model alone; whoever is left out, the next one is tried"
        elif got[scores.index(max(scores))] == 0:
            said += ". The best model is not in it; begin with that one, not with the first"
        raise Wrong(said)


def _weights(models: list[Tensor], score: Callable[[Tensor], float]) -> tuple[list[float], list[float]]:
    """The weights of the kit's own greedy soup, and the scores of the models."""
    held = [nn.Linear(1, 1, bias=False) for _ in models]
    for one, model in zip(held, models, strict=True):
        one.weight.data.copy_(model[None])
    _, chosen, scores = greedy(held, lambda model: score(model.weight), Masks({}))  # type: ignore[arg-type]
    return [1 / len(chosen) if place in chosen else 0.0 for place in range(len(models))], scores


def _in_the_order_of_the_list(models: list[Tensor], score: Callable[[Tensor], float]) -> list[float]:
    """The weights when models are tried as they come, not by their scores."""
    chosen = [0]
    for place in range(1, len(models)):
        with_it = [*chosen, place]
        before, after = (score(torch.stack([models[i] for i in some]).mean(0)) for some in (chosen, with_it))
        chosen = with_it if after >= before else chosen
    return [1 / len(chosen) if place in chosen else 0.0 for place in range(len(models))]


def _refused(my_soup: Callable, states: States, masks: Any) -> bool:
    try:
        my_soup(states, masks)
    except ValueError:
        return True
    except Exception as error:
        raise Wrong(f"your function raises {type(error).__name__}: {error}; want a ValueError") from error
    return False
