"""All recipes by name, and what a scale makes of one."""

import difflib
from collections.abc import Iterable

from ..experiment import Experiment
from ..grid import Grid
from .abilities import CRITERIA_AND_ABILITIES
from .classifiers import CLASSIFIERS
from .jobs import Job
from .language import PERPLEXITY
from .recipe import Recipe
from .scales import Scale

_ALL = {each.name: each for each in (*PERPLEXITY, *CRITERIA_AND_ABILITIES, *CLASSIFIERS)}
# As they come in the papers.
ORDER = (
    *("table-1", "table-2", "table-3", "table-3-shares", "trainable-share"),
    *("figure-1", "figure-2", "figure-3", "figure-4", "throughput"),
    *("perplexity-subsets", "iterations", "zero-shot", "reconstruction", "sms"),
)
RECIPES = {name: _ALL[name] for name in ORDER}


def recipe(name: str) -> Recipe:
    """The recipe of a name.

    Raises ValueError for an unknown one, with the nearest and all that there are.

    >>> recipe("table-2").source
    'PERP v1, table 2'
    """
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(f"unknown figure {name!r}{hint} Valid are {', '.join(RECIPES)}")
    return RECIPES[name]


def recipes(names: Iterable[str] | None = None) -> list[Recipe]:
    """The recipes of some names, each once, or all.

    >>> [each.name for each in recipes(["sms", "table-1", "sms"])]
    ['sms', 'table-1']
    """
    return list(RECIPES.values()) if names is None else [recipe(name) for name in dict.fromkeys(names)]


def work(several: Iterable[Recipe], scale: Scale) -> tuple[Grid, list[Job]]:
    """The rows of a sweep and the jobs of several recipes, what they share once.

    >>> from .scales import SCALES
    >>> grid, jobs = work([recipe("table-1"), recipe("throughput")], SCALES["embedded"])
    >>> len(grid), len(jobs)
    (48, 0)
    """
    several = list(several)
    experiments: list[Experiment] = [e for each in several for e in each.all_experiments(scale)]
    return Grid.of(experiments), [job for each in several for job in each.all_jobs(scale)]
