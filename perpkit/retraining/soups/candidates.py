"""The candidates of a soup: retrainings of one pruned model that differ in one thing."""

import difflib
import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from ..loop.retrain import retrain
from ..loop.settings import check_whole

VARIED = ("seed", "lr", "weight_decay", "steps")
DEFAULTS = {name: each.default for name, each in inspect.signature(retrain).parameters.items()}

Vary = str | Mapping[str, Sequence[Any]]


@dataclass(frozen=True)
class Candidate:
    """One retraining of one cycle, `cycle` and `number` counted from 1, and what candidates can differ in."""

    cycle: int
    number: int
    seed: int
    lr: float
    weight_decay: float
    steps: int


@dataclass(frozen=True)
class Variation:
    """What a soup's candidates differ in: the `values` of one setting, the others as in `base`."""

    name: str
    values: tuple[Any, ...]
    base: dict[str, Any]

    def settings(self) -> list[dict[str, Any]]:
        """The four settings of each candidate, in the first cycle.

        >>> Variation("lr", (0.1, 0.2), {"seed": 0, "lr": 0.1, "weight_decay": 0.0, "steps": 9}).settings()[1]
        {'seed': 0, 'lr': 0.2, 'weight_decay': 0.0, 'steps': 9}
        """
        return [{**self.base, self.name: value} for value in self.values]

    def candidates(self, cycle: int) -> list[Candidate]:
        """The candidates of a cycle; no two cycles have a seed in common.

        >>> base = {"seed": 5, "lr": 0.1, "weight_decay": 0.0, "steps": 9}
        >>> [candidate.seed for candidate in Variation("seed", (5, 6, 7), base).candidates(cycle=2)]
        [8, 9, 10]
        """
        span = max(self.values) - min(self.values) + 1 if self.name == "seed" else 1
        return [
            Candidate(cycle, number, **{**settings, "seed": settings["seed"] + (cycle - 1) * span})
            for number, settings in enumerate(self.settings(), start=1)
        ]


def variation(vary: Vary, m: int, base: Mapping[str, Any]) -> Variation:
    """What m candidates differ in, of one name or a mapping from it to the values.

    Without values, seeds count up from the base; rates and weight decays are spread evenly on a logarithmic
    scale from half the base to its double, and steps evenly from half to one and a half times the base, so
    that their mean is the base. One candidate has the base.

    Raises ValueError for an unknown name, values of another number than m, and equal ones.

    >>> base = {"seed": 0, "lr": 0.01, "weight_decay": 0.0, "steps": 100}
    >>> variation("steps", 3, base).values, variation({"lr": [0.1, 0.2]}, 2, base).values
    ((50, 100, 150), (0.1, 0.2))
    """
    if isinstance(vary, str):
        vary = {vary: _spread(_known(vary), m, base)}
    elif not isinstance(vary, Mapping) or len(vary) != 1:
        raise ValueError(
            f"vary is {vary!r}; candidates differ in one thing: want {', '.join(VARIED)}, or a mapping from "
            "one of them to its values"
        )
    ((name, values),) = vary.items()
    _known(name)
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise ValueError(f"vary has {values!r} for {name!r}; want a list of m={m} values")
    values = list(values)
    if len(values) != m:
        raise ValueError(f"vary has {len(values)} values of {name!r} for m={m} candidates: {values}")
    if name in ("seed", "steps"):
        for value in values:
            check_whole(**{name: value})
        values = [int(value) for value in values]
    else:
        for value in values:
            if not isinstance(value, Real):
                raise ValueError(f"vary has {value!r} for {name!r}; it must be a number")
        values = [float(value) for value in values]
    if len(set(values)) < m:
        raise ValueError(
            f"the values of {name!r} are {values}: equal candidates make no soup; give m different ones, "
            f"vary={{{name!r}: [...]}}"
        )
    return Variation(name, tuple(values), dict(base))


def _known(name: Any) -> str:
    if name not in VARIED:
        words = {"learning_rate": "lr", "rate": "lr", **{each: each for each in VARIED}}
        near = difflib.get_close_matches(str(name).lower(), words, n=1)
        hint = f"did you mean {words[near[0]]!r}? Candidates" if near else "candidates"
        raise ValueError(f"cannot vary {name!r}; {hint} can differ in {', '.join(VARIED)}")
    return name


def _spread(name: str, m: int, base: Mapping[str, Any]) -> list[Any]:
    """The values of m candidates when none are given."""
    if name == "seed":
        return [base["seed"] + i for i in range(m)]
    # From -1 to 1.
    places = [2 * i / (m - 1) - 1 for i in range(m)] if m > 1 else [0.0]
    if name == "steps":
        return [round(base["steps"] * (1 + place / 2)) for place in places]
    return [base[name] * 2**place for place in places]
