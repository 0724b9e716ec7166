"""Explorers: sliders and buttons over calls that a cell could make."""

import html
import threading
from pathlib import Path

import ipywidgets as widgets
import pandas as pd

from ..experiments.grid import Experiment, Grid
from ..experiments.store import Store
from ..experiments.sweep import sweep
from .job import Job
from .plots import DataFigure, plot_curves

SLIDER = [round(0.05 * step, 2) for step in range(19)]


class SparsityExplorer(widgets.VBox):
    """Drag the sparsity, choose what is retrained, watch the perplexity explode and come back.

    The curves start with the grid's finished rows; a point that is missing is computed in the background
    when the slider comes to rest on it, and kept in the store. `figure()` is what is shown, for a page that
    is read without a kernel.

    Raises ValueError when the grid mixes models, texts or criteria.

    >>> import tempfile
    >>> explorer = SparsityExplorer(Grid(sparsity=[0.5]), store=Path(tempfile.mkdtemp()) / "results.sqlite")
    >>> explorer.show(0.5, "none"), explorer.wait(60)
    (None, True)
    >>> "perplexity" in explorer.message.value
    True
    """

    def __init__(self, grid: Grid, *, store: Store | str | Path | None = None):
        experiments = list(grid)
        for axis in ("model", "text", "criterion"):
            if len({getattr(experiment, axis) for experiment in experiments}) > 1:
                raise ValueError(f"the explorer shows one {axis} at a time; give it a grid with one {axis}")
        self._store = store if isinstance(store, Store) else Store(store)
        self._template = experiments[0]
        found = self._store.get(experiment.key() for experiment in experiments)
        self._rows = pd.DataFrame(list(found.values()))
        self._lock = threading.Lock()
        self._job = Job(self._show_error)

        choices = list(dict.fromkeys(["none", *(experiment.retrain for experiment in experiments)]))
        self.sparsity = widgets.SelectionSlider(
            options=[(f"{100 * s:.0f} %", s) for s in SLIDER],
            value=0.5,
            description="sparsity",
            continuous_update=False,
        )
        self.retrain = widgets.Dropdown(options=choices, value="none", description="retrain")
        self.cancel = widgets.Button(description="Cancel", disabled=True, icon="stop")
        self.message = widgets.HTML()
        self.picture = widgets.Image(
            format="png", layout=widgets.Layout(width="auto", align_self="flex-start")
        )
        for name, widget in vars(self).copy().items():
            if isinstance(widget, widgets.Widget):
                widget.add_class(f"perpkit-{name}")
        self.sparsity.observe(self._moved, names="value")
        self.retrain.observe(self._moved, names="value")
        self.cancel.on_click(lambda _: self._job.cancel())
        controls = widgets.HBox([self.sparsity, self.retrain, self.cancel])
        super().__init__([controls, self.message, self.picture])
        self._draw()
        self._moved(None)

    def show(self, sparsity: float, retrain: str) -> None:
        """Put the controls on a point, as a hand would.

        Raises ValueError for a sparsity or a retraining that the controls do not offer.
        """
        if sparsity not in SLIDER or retrain not in self.retrain.options:
            raise ValueError(
                f"the explorer offers the sparsities {SLIDER} and the retrainings {self.retrain.options}"
            )
        self.retrain.value = retrain
        self.sparsity.value = sparsity

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until everything that was asked for is shown; False when the time is over first."""
        return self._job.wait(timeout)

    def figure(self) -> DataFigure:
        """The curves as they are now, the chosen sparsity marked."""
        with self._lock:
            rows = self._rows.sort_values("sparsity", kind="stable")
        figure = plot_curves(rows)
        figure.axes[0].axvline(self.sparsity.value, color="#666666", linewidth=1)
        return figure

    def _moved(self, _change) -> None:
        chosen = [
            self._at(self.sparsity.value, subset) for subset in dict.fromkeys(["none", self.retrain.value])
        ]
        self.cancel.disabled = False
        self._say(f"computing {self.retrain.value} at {100 * self.sparsity.value:.0f} % …")
        self._job.submit(lambda cancelled: self._compute(chosen, cancelled))

    def _at(self, sparsity: float, retrain: str) -> Experiment:
        same = {name: getattr(self._template, name) for name in ("model", "text", "criterion", "length")}
        return Experiment(**same, sparsity=sparsity, retrain=retrain)

    def _compute(self, chosen: list[Experiment], cancelled) -> None:
        try:
            rows = sweep(chosen, store=self._store, progress=False, cancelled=cancelled)
        finally:
            self.cancel.disabled = True
            if cancelled():
                self._say("cancelled; what was finished is kept")
        with self._lock:
            keys = ["sparsity", "retrain", "seed"]
            self._rows = pd.concat([self._rows, rows]).drop_duplicates(keys, ignore_index=True)
        self._draw()
        pruned, shown = rows.iloc[0], rows.iloc[-1]
        words = f"perplexity {pruned.dense_perplexity:.2f} dense → {pruned.perplexity:.2f} pruned"
        if shown.retrain != "none":
            words += (
                f" → <b>{shown.perplexity:.2f}</b> after retraining {html.escape(shown.retrain)} "
                f"({100 * shown.trainable_share:.2g} % of the parameters, {shown.seconds:.1f} s)"
            )
        self._say(words)

    def _draw(self) -> None:
        if not self._rows.empty:
            self.picture.value = self.figure()._repr_png_()

    def _say(self, words: str) -> None:
        self.message.value = f"<span>{words}</span>"

    def _show_error(self, error: Exception) -> None:
        self._say(f"<b>{type(error).__name__}</b>: {html.escape(str(error))}")
