"""Computing what is missing of the papers' figures, and setting each beside its published numbers."""

import warnings
from collections.abc import Iterable
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from ..store import Store
from ..sweep import NothingComputed, sweep
from .jobs import job_store, run_jobs
from .recipe import EMPTY, Recipe, compared, related, same_model
from .recipes import work
from .scales import Scale


@dataclass(frozen=True)
class Reproduced:
    """A recipe for one model, computed: `rows` in tidy form, `published` numbers, `table` of both.

    `rows` have the column of `recipe.relative` too, where there is one. `errors` are what kept rows from
    being computed, each once; `seconds` those that the work has taken, whenever and wherever.
    """

    recipe: Recipe
    scale: Scale
    ours: str
    theirs: str
    rows: pd.DataFrame = field(repr=False)
    published: pd.DataFrame = field(repr=False)
    table: pd.DataFrame = field(repr=False)
    errors: tuple[str, ...] = ()
    seconds: float = 0.0
    devices: tuple[str, ...] = ()
    protocols: tuple[str, ...] = ()

    @property
    def same(self) -> bool:
        """Whether the models are the same, so that values may be compared."""
        return same_model(self.ours, self.theirs)

    @property
    def name(self) -> str:
        """The name of its files."""
        several = len(self.recipe.pairs(self.scale)) > 1
        return f"{self.recipe.name}-{Path(self.ours).name}" if several else self.recipe.name


def reproduce(
    recipes: Iterable[Recipe],
    scale: Scale,
    *,
    store: Store | str | Path | None = None,
    executor: Executor | None = None,
    retry_failed: bool = False,
    progress: bool = True,
) -> list[Reproduced]:
    """Compute what the store lacks of some recipes and return each, for every model, beside the published.

    Rows of a sweep go to the store, other work to the file beside it (`job_store`), each as soon as it is
    finished. What fails is told in `errors`. A recipe that this scale cannot compute gives nothing.

    Raises ValueError for inputs that nothing could be computed from, and BrokenExecutor.
    """
    recipes, store = list(recipes), store if isinstance(store, Store) else Store(store)
    grid, jobs = work(recipes, scale)
    found: dict[str, dict] = {}
    if len(grid):
        with warnings.catch_warnings():
            # They are told with the figure that lacks them.
            warnings.filterwarnings("ignore", r"\d+ of \d+ rows failed")
            try:
                table = sweep(
                    grid, store=store, executor=executor, retry_failed=retry_failed, progress=progress
                )
            except NothingComputed as nothing:
                table = nothing.rows
        rows = table.to_dict("records")
        found = {each.key(): row for each, row in zip(grid, rows, strict=True)}
    done: dict[str, dict] = {}
    if jobs:
        beside = Store(job_store(store.path))
        done = run_jobs(jobs, beside, executor=executor, retry_failed=retry_failed, progress=progress)
    return [_one(recipe, scale, *pair, found, done) for recipe in recipes for pair in recipe.pairs(scale)]


def stored(recipes: Iterable[Recipe], scale: Scale, rows: Store, jobs: Store) -> list[Reproduced]:
    """What two stores have of some recipes, that of the sweeps and that of the jobs; nothing is computed.

    How much is missing is told in `errors`.
    """
    recipes = list(recipes)
    grid, wanted = work(recipes, scale)
    found, done = rows.get(each.key() for each in grid), jobs.get(job.key() for job in wanted)
    return [_one(recipe, scale, *pair, found, done) for recipe in recipes for pair in recipe.pairs(scale)]


def _one(
    recipe: Recipe, scale: Scale, ours: str, theirs: str, found: dict[str, dict], done: dict[str, dict]
) -> Reproduced:
    rows: list[dict[str, Any]] = []
    # Without retraining all seeds are one row.
    keys = dict.fromkeys(e.key() for e in recipe.experiments(scale, ours))
    wanted = dict.fromkeys(job.key() for job in recipe.jobs(scale, ours))
    missing = sum(key not in found for key in keys) + sum(key not in done for key in wanted)
    errors = [f"{missing} of {len(keys) + len(wanted)} are not computed yet"] if missing else []
    sources = [found[key] for key in keys if key in found]
    errors += [str(row["error"]) for row in sources if isinstance(row["error"], str)]
    rows += [{**row, "of_job": False} for row in sources if not isinstance(row["error"], str)]
    seconds = sum(row["seconds"] for row in rows)
    devices = [row["device"] for row in rows]
    for job in (done[key] for key in wanted if key in done):
        if job["error"]:
            errors.append(job["error"])
            continue
        rows += [{**row, "of_job": True} for row in job["rows"]]
        seconds += job["seconds"]
        devices.append(job["device"])
    published = recipe.published(theirs)
    tidy = recipe.tidy(pd.DataFrame(rows)).reset_index(drop=True) if rows else EMPTY
    table = EMPTY
    if rows:
        if recipe.relative:
            tidy = tidy.assign(**{recipe.relative: related(recipe, tidy)})
        table = compared(recipe, tidy, published)
    protocols = dict.fromkeys(str(row["protocol"]) for row in rows if "protocol" in row)
    return Reproduced(
        recipe,
        scale,
        ours,
        theirs,
        tidy,
        published,
        table,
        tuple(dict.fromkeys(errors)),
        seconds,
        tuple(dict.fromkeys(devices)),
        tuple(protocols),
    )
