"""The papers' figures, drawn with the published numbers beside."""

from collections.abc import Iterable
from concurrent.futures import Executor
from pathlib import Path

import pandas as pd
import torch

from ..experiments.paper.recipe import CURVES, MAPS, POINTS, Recipe
from ..experiments.paper.recipes import recipe as recipe_of
from ..experiments.paper.recipes import recipes as recipes_of
from ..experiments.paper.reproduce import Reproduced, reproduce
from ..experiments.paper.scales import Scale, scale_of
from ..experiments.store import Store
from .plots.beside import plot_beside
from .plots.card import write_caption
from .plots.curves import plot_curves
from .plots.features import plot_maps
from .plots.figure import DataFigure


class PaperFigure:
    """A figure of the papers, computed: its `figure`, its `table` of ours and published, its `caption`.

    `table` has the columns of what is compared, `ours` (mean over seeds), `std`, `seeds`, `published`,
    `difference` and, where the models are not the same, `ours_relative` and `published_relative`: the values
    by the dense model's, or by what the name of the figure's axis says. `rows` are what it was made of,
    `differs` what the kit does otherwise than the paper. A notebook shows the figure.
    """

    def __init__(self, reproduced: Reproduced):
        self.reproduced = reproduced
        self.figure: DataFigure | None = draw(reproduced)

    @property
    def table(self) -> pd.DataFrame:
        return self.reproduced.table

    @property
    def rows(self) -> pd.DataFrame:
        return self.reproduced.rows

    @property
    def caption(self) -> str:
        recipe = self.reproduced.recipe
        return f"{recipe.title}. {recipe.caption} {recipe.source}."

    @property
    def differs(self) -> tuple[str, ...]:
        return self.reproduced.recipe.differs

    def _repr_png_(self):
        return None if self.figure is None else self.figure._repr_png_()

    def __repr__(self) -> str:
        return f"PaperFigure({self.reproduced.name!r}, {self.reproduced.ours!r})"


def paper_figures() -> pd.DataFrame:
    """All tables and figures of the papers that can be computed: a row for each, by its name.

    >>> paper_figures().loc["table-3", "source"]
    'PERP v1, table 3'
    """
    rows = [(each.name, each.title, each.source, ", ".join(each.keys), each.value) for each in recipes_of()]
    return pd.DataFrame(rows, columns=["name", "title", "source", "compared", "value"]).set_index("name")


def paper_figure(
    name: str,
    *,
    scale: str | Scale = "embedded",
    model: str | None = None,
    store: Store | str | Path | None = None,
    executor: Executor | None = None,
    progress: bool = True,
) -> PaperFigure:
    """A table or figure of the papers by its name (`paper_figures`), with the published numbers beside.

    `scale` is "quick" (a few points, for a notebook), "embedded", "opt-125m", "paper" (the papers' models) or
    the path of a folder with a language model. Rows that are in the store are not computed again. Of a
    scale with several models `model` chooses one, else the first.

    Raises ValueError for an unknown name, scale or model, and a figure that this scale cannot compute.

    >>> float(paper_figure("trainable-share", progress=False).table["difference"].abs().max()) < 0.02
    True
    """
    recipe, chosen = recipe_of(name), scale_of(scale)
    pairs = recipe.pairs(chosen)
    if not pairs:
        raise ValueError(_not_here(recipe, chosen))
    names = [ours for ours, _ in pairs]
    if model is not None and model not in names:
        raise ValueError(f"unknown model {model!r}; {name} has {', '.join(names)} at this scale")
    computed = reproduce([recipe], chosen, store=store, executor=executor, progress=progress)
    found = computed[names.index(model) if model else 0]
    if found.rows.empty:
        raise ValueError(f"no row of {name} could be computed: {found.errors[0]}")
    return PaperFigure(found)


def _not_here(recipe: Recipe, scale: Scale) -> str:
    return (
        f"{recipe.name} is of an image classifier, and the scale {scale.name!r} has none; take 'embedded', "
        "or perpkit figures with --classifier and --images"
    )


def draw(found: Reproduced) -> DataFigure | None:
    """The figure of a recipe that was computed; None where there is nothing to draw."""
    recipe = found.recipe
    if found.rows.empty:
        return None
    if recipe.drawn == MAPS:
        return _maps(found.rows)
    figure = _beside(found)
    if figure is not None and not found.published.empty:
        # A picture is taken out of its report.
        own = f" of {found.theirs}" if found.theirs else ""
        write_caption(figure, [f"published numbers{own}: {recipe.source}"])
    return figure


def _beside(found: Reproduced) -> DataFigure | None:
    recipe = found.recipe
    y, ours, theirs = _drawn(found)
    if not ours[y].notna().any():
        return None
    hue, x = recipe.keys[0], recipe.keys[-1]
    if recipe.drawn == CURVES:
        published = None if theirs.empty else theirs.rename(columns={hue: "label"})
        return plot_curves(ours, x=x, y=y, hue=hue, published=published)
    return plot_beside(ours, x=x, y=y, hue=hue if hue != x else None, published=theirs)


def _drawn(found: Reproduced) -> tuple[str, pd.DataFrame, pd.DataFrame]:
    """The column that is drawn, of ours and of the published rows: values of one model, else related ones."""
    recipe = found.recipe
    ours, theirs = found.rows, found.published
    y = recipe.value
    if recipe.relative and not found.same:
        y = recipe.relative
        wanted = [*recipe.keys, "published_relative"]
        shown = found.table.dropna(subset=["published_relative"])[wanted]
        theirs = shown.rename(columns={"published_relative": y})
    # The dense model is a line or a one, but where a curve begins with it.
    hue = recipe.keys[0]
    if recipe.base.get(hue) == "dense":
        ours, theirs = (each[each[hue] != "dense"] if len(each) else each for each in (ours, theirs))
    if recipe.drawn == POINTS and len(theirs):
        # What this scale leaves out, such as soups of ten, would only be named in the legend.
        theirs = theirs[theirs[hue].isin(ours[hue])]
    return y, ours, theirs


def _maps(rows: pd.DataFrame) -> DataFigure:
    titles = [
        title if error != error or title in ("picture", "dense") else f"{title}, error {error:.2f}"
        for title, error in zip(rows["title"], rows["error"].astype(float), strict=True)
    ]
    return plot_maps(
        {title: torch.tensor(values) for title, values in zip(titles, rows["values"], strict=True)}
    )


def figures_of(found: Iterable[Reproduced]) -> list[PaperFigure]:
    """Each drawn."""
    return [PaperFigure(each) for each in found]
