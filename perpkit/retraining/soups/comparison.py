"""What the same retraining budget reaches without averaging: the baselines of Sparse Model Soups."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ..loop.evaluating import evaluating
from ..loop.loss import Distillation
from ..loop.tasks import Data, make_task
from .cycles import Cycles, Score
from .ensemble import Ensemble

ITERATIVE = ("imp", "imp_m")
BASELINES = (*ITERATIVE, "best", "mean", "ensemble")
COLUMNS = ["method", "score", "seconds", "steps"]


def held_out(data: Data, batch: int) -> Score:
    """A score from held-out data as `retrain` takes them: minus the mean loss in nats, so higher is better.

    >>> data = torch.zeros(4, 2), torch.arange(4) % 3
    >>> model = nn.Linear(2, 3, bias=False)
    >>> round(held_out(data, batch=3)(model), 4)
    -1.0986
    """

    def score(model: nn.Module) -> float:
        device = next(model.parameters()).device
        task = make_task(model, data, device, None, Distillation())
        indices = torch.arange(len(task.data[0])).split(batch)
        with evaluating(model):
            losses = [float(task.loss(model, index, device)) * len(index) for index in indices]
        return -sum(losses) / len(task.data[0])

    return score


def check_held_out(model: nn.Module, validation: Data) -> None:
    """Raise ValueError for held-out data that the model could not be scored by.

    >>> check_held_out(nn.Linear(2, 3), (torch.zeros(4, 2), torch.arange(4) % 3))
    """
    try:
        make_task(model, validation, next(model.parameters()).device, None, Distillation())
    except ValueError as error:
        raise ValueError(f"validation does not fit: {error}") from error


def check_functions(**functions: object) -> None:
    """Raise ValueError naming the first that is neither a function nor None.

    >>> check_functions(evaluate=None, score=0.9)
    Traceback (most recent call last):
    ValueError: score is 0.9; give a function of the model that returns a number, or leave it out
    """
    for name, function in functions.items():
        if function is not None and not callable(function):
            raise ValueError(
                f"{name} is {function!r}; give a function of the model that returns a number, or leave it out"
            )


def check_baselines(baselines: Sequence[str], evaluated: bool, scored: bool) -> None:
    """Raise ValueError for unknown baselines, and for those that cannot be measured.

    >>> check_baselines(["imp"], evaluated=True, scored=False)
    """
    if isinstance(baselines, str):
        raise ValueError(f"baselines is {baselines!r}; give a list of names, [{baselines!r}]")
    for name in baselines:
        if name not in BASELINES:
            raise ValueError(f"unknown baseline {name!r}; the baselines are {', '.join(BASELINES)}")
    if baselines and not evaluated:
        raise ValueError("nothing says how to compare the baselines; give evaluate=, a function of the model")
    if "best" in baselines and not scored:
        raise ValueError("the 'best' candidate is chosen by a held-out score; give score= or validation=")


@torch.no_grad()
def _measured(evaluate: Score, model: nn.Module) -> float:
    found = evaluate(model)
    try:
        return float(found)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"evaluate or score returned a {type(found).__name__}; it must return one number for a model"
        ) from error


def compared(
    soup: Cycles,
    evaluate: Score,
    score: Score | None,
    baselines: Sequence[str],
    iterative: Callable[[str], Cycles],
) -> Iterator[dict[str, Any]]:
    """The rows of the comparison, as they are finished; they end early when the run is cancelled.

    `soup` has finished; `iterative` makes the cycles of IMP and of IMP with m times the steps. All models
    are measured with batch statistics of one kind: those of the soup, re-estimated where its are.
    """
    spent = {"seconds": soup.seconds, "steps": soup.steps()}
    yield {"method": "sms", "score": _measured(evaluate, soup.model), **spent}
    alone: list[float] | None = None
    for name in baselines:
        if soup.plan.cancelled():
            return
        if name in ITERATIVE:
            cycles = iterative(name)
            if not cycles.run():
                return
            reached = _measured(evaluate, soup.like_the_average(cycles.model))
            yield {"method": name, "score": reached, "seconds": cycles.seconds, "steps": cycles.steps()}
            continue
        if name == "ensemble":
            reached = _measured(evaluate, Ensemble(list(_alone(soup))))
        else:
            alone = alone or [_measured(evaluate, model) for model in _alone(soup)]
            reached = sum(alone) / len(alone) if name == "mean" else alone[_best(soup, score)]
        # All m candidates have to be retrained to choose from them, or to ask them together.
        yield {"method": name, "score": reached, **spent}


def _alone(soup: Cycles) -> Iterator[nn.Module]:
    return (soup.like_the_average(model) for model in soup.last())


def _best(soup: Cycles, score: Score | None) -> int:
    assert score is not None
    scores = [_measured(score, model) for model in _alone(soup)]
    return max(range(len(scores)), key=scores.__getitem__)
