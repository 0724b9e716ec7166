"""All explorers on one page."""

import base64
import contextlib
import functools
import html
from collections.abc import Callable
from pathlib import Path

import ipywidgets as widgets

from ...experiments.grid import Grid
from ...experiments.store import Store
from .adapters import AdapterExplorer
from .distortion import DistortionExplorer
from .explorer import Explorer
from .generation import GenerationExplorer
from .lifetime import close_parts, replace_predecessors
from .masks import MaskExplorer
from .outliers import OutlierExplorer
from .soups import SoupExplorer
from .sparsity import SparsityExplorer

# What is to be done and seen in each, beside its name.
WORDS = {
    "Sparsity": "Drag the sparsity: the perplexity explodes. Then retrain few parameters: it comes back.",
    "Masks": "Drag the sparsity and watch which weights of one matrix go, and what two criteria agree on.",
    "Outliers": "Turn the dial: the function stays the same; magnitude pruning collapses, Wanda does not.",
    "Distortion": "See what pruning does to the features of a picture, and what retraining gives back.",
    "Adapters": "Compare what low-rank adapters do to sparsity when they are merged.",
    "Soups": "Move a point between three retrained models: is their average better than each of them?",
    "Generation": "Let the dense, the pruned and the retrained model continue the same words.",
}


# Magnitude pruning and a perplexity take less than one; a busy machine may need many.
SECONDS_FOR_THE_PICTURE = 60


class Gallery(widgets.Tab):
    """All explorers over the embedded models, a tab each, made when its tab is first opened.

    The rows of the sparsity explorer are kept in `store`, exports in `export_folder`.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> gallery = Gallery(store=folder / "results.sqlite", export_folder=folder)
    >>> gallery.titles[:3], gallery.explorer("Sparsity").name
    (('Sparsity', 'Masks', 'Outliers'), 'sparsity')
    """

    def __init__(self, *, store: Store | str | Path | None = None, export_folder: str | Path = "exports"):
        grid = Grid(
            criterion=["magnitude", "wanda"],
            sparsity=[0.3, 0.4, 0.5, 0.6, 0.7],
            retrain=["none", "biases", "norms", "full"],
        )
        self._makers: dict[str, Callable[..., Explorer]] = {
            "Sparsity": functools.partial(SparsityExplorer, grid, store=store),
            "Masks": MaskExplorer,
            "Outliers": OutlierExplorer,
            "Distortion": DistortionExplorer,
            "Adapters": AdapterExplorer,
            "Soups": SoupExplorer,
            "Generation": GenerationExplorer,
        }
        self._folder = export_folder
        self._made: dict[str, Explorer] = {}
        pages = [widgets.VBox([widgets.HTML(f"<p>{WORDS[name]}</p>")]) for name in self._makers]
        super().__init__(pages, titles=tuple(self._makers), selected_index=0)
        replace_predecessors(self)
        self.observe(self._on_tab, names="selected_index")
        self._on_tab()

    def __repr__(self) -> str:
        return f"Gallery: {', '.join(self._makers)}; moves in a running notebook"

    def _repr_mimebundle_(self, **options):
        # A page without a kernel shows the first explorer as it was opened.
        bundle = super()._repr_mimebundle_(**options)
        # None when it could not be made: its tab says why, and the others can be opened.
        first = self._made.get(self.titles[0])
        if first is not None and first.wait(SECONDS_FOR_THE_PICTURE):
            # Nor is there a picture before the first row.
            with contextlib.suppress(ValueError):
                bundle["image/png"] = base64.b64encode(first.figure().png(dpi=100)).decode()
        return bundle

    def close(self) -> None:
        """End the work of all explorers, and take the page away."""
        for explorer in getattr(self, "_made", {}).values():
            explorer.close()
        close_parts(self)
        super().close()

    def explorer(self, name: str) -> Explorer:
        """An explorer by the name of its tab, made if it has not been opened yet.

        Raises ValueError for an unknown name.
        """
        if name not in self._makers:
            raise ValueError(f"unknown explorer {name!r}; the explorers are {', '.join(self._makers)}")
        if name not in self._made:
            self._made[name] = self._makers[name](export_folder=self._folder)
            page = self.children[list(self._makers).index(name)]
            page.children = [page.children[0], self._made[name]]
        return self._made[name]

    def _on_tab(self, _=None) -> None:
        if self.selected_index is None:
            return
        name, page = self.titles[self.selected_index], self.children[self.selected_index]
        try:
            self.explorer(name)
        except Exception as error:
            # Raised into the front end, nobody would see it; opening the tab again tries again.
            words = html.escape(f"{type(error).__name__}: {error}")
            page.children = [page.children[0], widgets.HTML(f"<p><b>{words}</b></p>")]
