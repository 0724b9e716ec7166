"""The sparsity explorer: perplexity over sparsity, exploding and coming back."""

import dataclasses
import functools
import html
import math
from pathlib import Path

import ipywidgets as widgets
import pandas as pd
from matplotlib.patheffects import withStroke

from ...experiments.experiment import Experiment
from ...experiments.grid import Grid
from ...experiments.store import Store
from ...experiments.sweep import NothingComputed, sweep
from ..job import Request
from ..plots.curves import plot_curves
from ..plots.figure import GREY, DataFigure
from .explorer import SPINNER, Explorer, guarded

SPARSITIES = [round(0.05 * step, 2) for step in range(19)]


class SparsityExplorer(Explorer):
    """Drag the sparsity, choose what is retrained, watch the perplexity explode and come back.

    The curves start with the grid's finished rows; a point that is missing is computed in the background
    when the slider comes to rest on it (with the grid's first seed), and kept in the store. Cancel takes
    effect within one training step. What went wrong is shown in words; `error` holds the last exception.

    Raises ValueError when the grid mixes models, texts, criteria, lengths or ways to do one retraining, and
    when the store cannot be used.

    >>> import tempfile
    >>> explorer = SparsityExplorer(Grid(sparsity=[0.5]), store=Path(tempfile.mkdtemp()) / "results.sqlite")
    >>> explorer.show(0.7, "none")
    >>> explorer.wait(60), explorer.message.value[:16]
    (True, '70 %: perplexity')
    """

    name = "sparsity"

    def __init__(
        self,
        grid: Grid,
        *,
        store: Store | str | Path | None = None,
        export_folder: str | Path = "exports",
        background: bool = True,
    ):
        experiments = list(grid)
        self._templates = _by_retraining(experiments)
        self._store = store if isinstance(store, Store) else Store(store)
        found = self._store.get(experiment.key() for experiment in experiments)
        self._rows = {key: row for key, row in found.items() if not row.get("error")}
        sparsities = sorted({experiment.sparsity for experiment in experiments})
        self.sparsity = widgets.SelectionSlider(
            options=[(_percent(value), value) for value in sorted({*SPARSITIES, *sparsities})],
            value=sparsities[len(sparsities) // 2],
            description="sparsity",
            continuous_update=False,
            layout=widgets.Layout(width="320px"),
        )
        self.retrain = widgets.Dropdown(
            options=list(self._templates),
            value="none",
            description="retrain",
            layout=widgets.Layout(width="215px"),
        )
        self.sparsity.add_class("perpkit-sparsity")
        self.retrain.add_class("perpkit-retrain")
        super().__init__([self.sparsity, self.retrain], export_folder=export_folder, background=background)
        self.sparsity.observe(self._on_point, names="value")
        self.retrain.observe(self._on_point, names="value")
        if self._rows:
            figure = _marked(self._table(), self.sparsity.value, "none")
            self._show(figure, figure.png())
        self._on_point()

    def show(self, sparsity: float, retrain: str) -> None:
        """Put the controls on a point, as a hand would, and ask for it, again if need be.

        Raises ValueError for a sparsity or a retraining that the controls do not offer.
        """
        sparsities = [value for _, value in self.sparsity.options]
        if sparsity not in sparsities or retrain not in self.retrain.options:
            raise ValueError(
                f"cannot show {retrain!r} at {sparsity}: the explorer offers the retrainings "
                f"{', '.join(self.retrain.options)} and the sparsities {sparsities}"
            )
        self.retrain.value = retrain
        self.sparsity.value = sparsity
        self._on_point()

    def figure(self) -> DataFigure:
        """The curves with the chosen point marked, once everything asked for is computed.

        Raises ValueError when there is no finished row.
        """
        self.wait()
        return _marked(self._table(), self.sparsity.value, self.retrain.value)

    @guarded
    def _on_point(self, _=None) -> None:
        sparsity, retrain = self.sparsity.value, self.retrain.value
        work = functools.partial(self._compute, sparsity=sparsity, retrain=retrain)
        self._ask(f"{_percent(sparsity)}: working", work)

    def _words(self, error: Exception) -> str:
        # Of a failed row the row's own error: the widget tries again by itself.
        return error.first if isinstance(error, NothingComputed) else super()._words(error)

    def _compute(self, request: Request, sparsity: float, retrain: str) -> None:
        """Compute what is missing of a point and show it; the pruned model before the retraining begins."""
        names = dict.fromkeys(["none", retrain])
        chosen = [dataclasses.replace(self._templates[name], sparsity=sparsity) for name in names]
        keys = [experiment.key() for experiment in chosen]
        missing = set(keys) - set(self._store.get(keys))
        text = f"{_percent(sparsity)}: "
        for key, experiment in zip(keys, chosen, strict=True):
            watch = self._watch(request, functools.partial(_news, text, experiment))
            results = sweep(
                [experiment], store=self._store, retry_failed=True, progress=False, cancelled=watch
            )
            with self._job.lock:
                self._rows[key] = results.to_dict("records")[0]
            missing.discard(key)
            table = self._table()
            text += _result(table, experiment)
            last = key == keys[-1]
            if (last or missing) and not request.cancelled():
                self._publish(request, text, busy=not last, figure=_marked(table, sparsity, retrain))

    def _table(self) -> pd.DataFrame:
        with self._job.lock:
            table = pd.DataFrame(list(self._rows.values()))
        if table.empty:
            raise ValueError("nothing is computed yet: the first point has failed or was cancelled")
        # All the choices, finished or not, so that each keeps its colour.
        table["retrain"] = pd.Categorical(table["retrain"], categories=list(self._templates))
        return table.sort_values(["retrain", "sparsity", "seed"], ignore_index=True)


def _by_retraining(experiments: list[Experiment]) -> dict[str, Experiment]:
    """One experiment of each retraining, first "none"; the explorer replaces its sparsity.

    Raises ValueError when they differ in an input that the explorer has no control for.
    """
    found = {"none": dataclasses.replace(experiments[0], retrain="none")}
    for experiment in experiments:
        first = found.setdefault(experiment.retrain, experiment).asdict()
        for name, value in experiment.asdict().items():
            if value != first[name] and name not in ("sparsity", "seed"):
                raise ValueError(
                    f"the explorer shows one value of {name!r} at a time, the grid has {first[name]!r} and "
                    f"{value!r}; make an explorer for each"
                )
    return found


def _marked(table: pd.DataFrame, sparsity: float, retrain: str) -> DataFigure:
    """The curves with a line at a sparsity, and the points there of "none" and a retraining in figures."""
    figure = plot_curves(table)
    axes = figure.axes[0]
    # The whole slider, so that the curves stay where they are when points are added.
    axes.set_xlim(-0.02, max(SPARSITIES[-1], table["sparsity"].max()) + 0.04)
    axes.axvline(sparsity, color=GREY, linewidth=1, zorder=0)
    values = {name: _point(table, sparsity, name)["perplexity"].mean() for name in ("none", retrain)}
    for value in values.values():
        if math.isfinite(value):
            axes.plot(sparsity, value, "o", markersize=12, fillstyle="none", color="black")
            # The curves rise: above to the left and below to the right a figure hides nothing.
            below = value < max(values.values())
            left = sparsity > 0.8 if below else sparsity > 0.1
            offset = (-9 if left else 9, -15 if below else 7)
            place: dict = {"textcoords": "offset points", "ha": "right" if left else "left", "weight": "bold"}
            label = axes.annotate(f"{value:.2f}", (sparsity, value), offset, **place)
            label.set_path_effects([withStroke(linewidth=3, foreground="white")])
    return figure


def _point(table: pd.DataFrame, sparsity: float, retrain: str) -> pd.DataFrame:
    return table[(table["sparsity"] == sparsity) & (table["retrain"] == retrain)]


def _result(table: pd.DataFrame, experiment: Experiment) -> str:
    """What came out at one point, in words: of all its finished seeds."""
    rows = _point(table, experiment.sparsity, experiment.retrain)
    value = f"{rows['perplexity'].mean():.2f}"
    seeds = f", mean of {len(rows)} seeds" if len(rows) > 1 else ""
    if experiment.retrain == "none":
        return f"perplexity {rows['dense_perplexity'].iloc[0]:.2f} dense → {value} pruned"
    return (
        f" → <b>{value}</b> after retraining {html.escape(experiment.retrain)} "
        f"({100 * rows['trainable_share'].iloc[0]:.3g} % of the parameters, "
        f"{rows['seconds'].mean():.1f} s{seeds})"
    )


def _news(before: str, experiment: Experiment, step: int) -> str:
    """What is being done, in words, when the sweep has asked for the step-th time whether to stop."""
    if experiment.retrain == "none":
        return f"{before}pruning {SPINNER}"
    if step > experiment.steps:
        return f"{before} → measuring {SPINNER}"
    done = f'<progress value="{step}" max="{experiment.steps}"></progress>'
    return (
        f"{before} → retraining {html.escape(experiment.retrain)}, step {step} of {experiment.steps} {done}"
    )


def _percent(sparsity: float) -> str:
    return f"{100 * sparsity:.4g} %"
