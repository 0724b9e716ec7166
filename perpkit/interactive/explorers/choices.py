"""What a grid offers to choose from, and the experiment that a choice stands for."""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

from ...experiments.experiment import Experiment
from .offers import UNSTRUCTURED

# Inputs that mean nothing without a retraining, and so may differ from it.
OF_RETRAINING = "retrain rank alpha start steps lr batch accumulate schedule weight_decay".split()
CHOSEN = ("criterion", "pattern", "sparsity", "seed")


@dataclass(frozen=True)
class Choice:
    """Where the controls stand."""

    sparsity: float
    retrain: str
    criterion: str
    pattern: str

    @property
    def curves(self) -> tuple[str, str]:
        """What decides the curves that are drawn."""
        return self.criterion, self.pattern

    @property
    def nm(self) -> str | None:
        """The pattern as an experiment has it."""
        return None if self.pattern == UNSTRUCTURED else self.pattern


class Choices:
    """The criteria, patterns and retrainings of a grid, in its order; every combination of them is offered.

    "none", without retraining, always is.

    Raises ValueError when the grid mixes anything else, or ways to do one retraining.

    >>> choices = Choices([Experiment(sparsity=0.5, retrain="biases", steps=7)])
    >>> choices.retrainings, choices.experiment(Choice(0.7, "biases", "wanda", "2:4")).sparsity
    (['none', 'biases'], 0.5)
    """

    def __init__(self, experiments: Iterable[Experiment]):
        experiments = list(experiments)
        _check(experiments)
        first = experiments[0]
        self._by_retraining = {"none": dataclasses.replace(first, retrain="none")}
        self._seeds: dict[tuple, int] = {}
        for each in experiments:
            self._by_retraining.setdefault(each.retrain, each)
            self._seeds.setdefault((each.retrain, each.criterion, each.pattern), each.seed)
        self._seed = next((each.seed for each in experiments if each.seed), first.seed)
        self.retrainings = list(self._by_retraining)
        self.criteria = list(dict.fromkeys(each.criterion for each in experiments))
        found = dict.fromkeys(each.pattern for each in experiments)
        self.patterns = [pattern or UNSTRUCTURED for pattern in found]
        self.sparsities = sorted({each.sparsity for each in experiments if each.pattern is None})

    def experiment(self, choice: Choice) -> Experiment:
        """The experiment at a choice, with the grid's first seed."""
        return dataclasses.replace(
            self._by_retraining[choice.retrain],
            criterion=choice.criterion,
            pattern=choice.nm,
            sparsity=choice.sparsity,
            seed=self._seeds.get((choice.retrain, choice.criterion, choice.nm), self._seed),
        )

    def pruned(self, choice: Choice) -> Experiment:
        """The experiment at a choice before its retraining."""
        return self.experiment(dataclasses.replace(choice, retrain="none"))


def _check(experiments: list[Experiment]) -> None:
    firsts: dict[tuple, Experiment] = {}
    for each in experiments:
        for name, value in each.asdict().items():
            if name not in CHOSEN:
                first = firsts.setdefault((name, each.retrain if name in OF_RETRAINING else None), each)
                if value != (other := getattr(first, name)):
                    raise ValueError(
                        f"the explorer shows one value of {name!r} at a time, the grid has {other!r} and "
                        f"{value!r}; make an explorer for each"
                    )
