"""What a figure of the papers is made of: its rows, the published numbers, and how the two are compared."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ..experiment import Experiment
from .jobs import Job
from .scales import Scale

EMPTY = pd.DataFrame()
CURVES, POINTS, MAPS = "curves", "points", "maps"


@dataclass(frozen=True)
class Recipe:
    """How one table or figure of a paper is computed here and set beside the published numbers.

    - `experiments(scale, model)` are its rows of a sweep, `jobs(scale, model)` its other work.
    - `tidy(rows)` makes of these rows a table with the columns `keys`, `value` and where there are several
      `seed`; `published(model)` has `keys` and `value` of a model of the paper, and may be empty.
    - Where the models differ only shapes can be compared: values by that of the row `base`, as a ratio or, in
      `points`, as a difference; the other keys of that row are those of the row compared.
    - `reference` is the paper's model that other models stand beside, `models` are all that it has.
      `vision` says that it is an image classifier, `fixed` are the pairs of what is the same at every scale.
    - `drawn` is "curves" over the last key in the colours of the first, "points", likewise but for names on
      the axis, or "maps".
    """

    name: str
    title: str
    source: str
    caption: str
    keys: tuple[str, ...]
    value: str
    tidy: Callable[[pd.DataFrame], pd.DataFrame]
    published: Callable[[str], pd.DataFrame] = lambda _: EMPTY
    experiments: Callable[[Scale, str], list[Experiment]] = lambda *_: []
    jobs: Callable[[Scale, str], list[Job]] = lambda *_: []
    reference: str = ""
    models: tuple[str, ...] = ()
    base: Mapping[str, Any] = field(default_factory=dict)
    base_name: str = "the dense model's"
    difference: bool = False
    drawn: str = CURVES
    vision: bool = False
    fixed: tuple[tuple[str, str], ...] = ()
    differs: tuple[str, ...] = ()
    unpublished: str = ""

    def pairs(self, scale: Scale) -> list[tuple[str, str]]:
        """The models that are computed, each with that of the paper it stands beside.

        >>> from .recipes import recipe
        >>> from .scales import SCALES
        >>> recipe("table-1").pairs(SCALES["embedded"])
        [('tiny-opt', 'opt-2.7b')]
        >>> recipe("figure-3").pairs(SCALES["paper"])
        [('facebook/opt-6.7b', 'opt-6.7b')]
        """
        if self.fixed:
            return list(self.fixed)
        if self.vision:
            return [(scale.vision.classifier, self.reference)] if scale.vision else []
        if scale.models is None:
            return [(f"facebook/{model}", model) for model in self.models]
        # Of a model that the paper has too the values themselves are compared.
        return [
            (model, name if (name := published_name(model)) in self.models else self.reference)
            for model in scale.models
        ]

    def all_experiments(self, scale: Scale) -> list[Experiment]:
        """Its rows of a sweep, for all models; for the papers' models only what the papers have."""
        return [each for ours, _ in self.pairs(scale) for each in self.experiments(scale, ours)]

    def all_jobs(self, scale: Scale) -> list[Job]:
        """Its other work, for all models."""
        return [each for ours, _ in self.pairs(scale) for each in self.jobs(scale, ours)]

    @property
    def relative(self) -> str:
        """What a relative value is, in words, as the name of its column; empty where nothing is related."""
        if not self.base:
            return ""
        name = {"tokens_per_second": "tokens a second"}.get(self.value, self.value)
        if self.difference:
            return f"points of {name} above {self.base_name}"
        return f"{name}, times {self.base_name}"


def published_name(model: str) -> str:
    """What the papers call a model: of a local folder its name, which says whose copy it is."""
    return Path(model).name if Path(model).expanduser().is_dir() else model.removeprefix("facebook/")


def same_model(ours: str, theirs: str) -> bool:
    """Whether values, not only shapes, may be compared.

    >>> same_model("facebook/opt-2.7b", "opt-2.7b"), same_model("tiny-opt", "opt-2.7b")
    (True, False)
    """
    return theirs in (ours, published_name(ours))


def related(recipe: Recipe, table: pd.DataFrame) -> pd.Series:
    """The values of a tidy or a published table by those of the recipe's base.

    NaN where the base is missing; the mean over seeds where it has several.
    """
    if not recipe.base or table.empty:
        return pd.Series(np.nan, index=table.index)
    chosen = np.ones(len(table), dtype=bool)
    for key, wanted in recipe.base.items():
        chosen &= (table[key] == wanted).to_numpy()
    free = [key for key in recipe.keys if key not in recipe.base]
    base = table[chosen]
    if free:
        means = base.groupby(free)[recipe.value].mean()
        index = pd.MultiIndex.from_frame(table[free]) if len(free) > 1 else table[free[0]]
        of_row = pd.Series(means.reindex(index).to_numpy(), index=table.index)
    else:
        of_row = pd.Series(base[recipe.value].mean(), index=table.index)
    return 100 * (table[recipe.value] - of_row) if recipe.difference else table[recipe.value] / of_row


def compared(recipe: Recipe, ours: pd.DataFrame, theirs: pd.DataFrame) -> pd.DataFrame:
    """A row for each point: ours (mean over seeds), its deviation and seeds, published, and the difference.

    The columns are the recipe's keys, `ours`, `std`, `seeds`, `published`, `difference` (ours less
    published) and, where values are related to a base, `ours_relative` and `published_relative`. Points of
    one side only have NaN on the other.
    """
    keys = list(recipe.keys)
    ours = ours.assign(_relative=related(recipe, ours))
    groups = ours.groupby(keys, sort=False, dropna=False)
    found = groups.agg(
        ours=(recipe.value, "mean"),
        std=(recipe.value, "std"),
        seeds=(recipe.value, "count"),
        ours_relative=("_relative", "mean"),
    ).reset_index()
    if theirs.empty:
        found = found.assign(published=np.nan, published_relative=np.nan)
    else:
        theirs = theirs.assign(published_relative=related(recipe, theirs))
        theirs = theirs.rename(columns={recipe.value: "published"})
        found = found.merge(theirs[[*keys, "published", "published_relative"]], on=keys, how="outer")
        found = _in_order(found, keys, ours, theirs)
    found["difference"] = found["ours"] - found["published"]
    columns = [*keys, "ours", "std", "seeds", "published", "difference"]
    if recipe.base:
        columns += ["ours_relative", "published_relative"]
    found["seeds"] = found["seeds"].fillna(0).astype(int)
    return found[columns].reset_index(drop=True)


def _in_order(found: pd.DataFrame, keys: list[str], ours: pd.DataFrame, theirs: pd.DataFrame) -> pd.DataFrame:
    """Sorted by the keys, names in the order in which they first come, numbers by size."""
    places = {}
    for key in keys:
        values = pd.concat([ours[key], theirs[key]]).drop_duplicates()
        if pd.api.types.is_numeric_dtype(values):
            values = values.sort_values()
        places[key] = {value: place for place, value in enumerate(values)}
    order = found[keys].apply(lambda column: column.map(places[str(column.name)]))
    return found.loc[order.sort_values(keys).index]
