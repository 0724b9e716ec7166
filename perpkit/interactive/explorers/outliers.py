"""The outlier explorer: the same function with louder channels, which magnitude pruning does not survive."""

import copy
import functools
import math
from collections.abc import Callable, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import numpy as np
import pandas as pd
import torch
from transformers import PreTrainedModel

from ...evaluation.perplexity import perplexity
from ...experiments.shared import Cancelled
from ...pruning.prune import prune
from ...retraining.loop.evaluating import evaluating
from ...retraining.loop.settings import check_whole
from ...sources.models import load_model
from ...sources.outliers import plant_outliers
from ...sources.text import load_text
from ..job import Pace, Request
from ..plots.curves import plot_curves
from ..plots.figure import GREY, DataFigure
from .explorer import Explorer, guarded
from .words import bar

STRENGTHS = (0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0)
SPARSITIES = (0.3, 0.4, 0.5, 0.6)
SEEDS = (0, 1, 2)
# Of σ: channels 500 million times as loud as before are about what float32 still holds.
STRONGEST = 20
DENSE = "not pruned"
CURVES = (DENSE, "magnitude", "wanda")
# Windows whose logits are compared: one is 128 × 1,024 numbers.
COMPARED = 4


class OutlierExplorer(Explorer):
    """Turn a dial that makes some channels louder and the weights that read them smaller by the same factor.

    The function stays what it was: the message says by how much the logits and the perplexity differ.
    Magnitude pruning sees only the smaller weights and collapses; Wanda sees the product and does not move.
    The dial is σ of `plant_outliers`. Its other positions are computed in the background, the chosen one
    first, for one choice of the channels (a seed) and then for two more. `model` is an embedded name, a
    folder or a Hub id as `load_model` takes them, of an OPT or a Llama; outliers that it has itself, as
    "tiny-opt-outliers" does, are there at σ = 0 already.

    Raises ValueError for a model that cannot be loaded, no list of strengths or seeds, and a strength that
    is not from 0 to 20.

    >>> explorer = OutlierExplorer(strengths=[0, 2], seeds=[0], background=False)
    >>> table = explorer.figure().table.set_index(["criterion", "strength"])["perplexity"]
    >>> bool(table["magnitude", 2] > 5 * table["magnitude", 0])
    True
    >>> bool(abs(table["wanda", 2] / table["wanda", 0] - 1) < 0.001)
    True
    """

    name = "outliers"

    def __init__(
        self,
        model: str = "tiny-opt",
        *,
        strengths: "list[float] | tuple[float, ...]" = STRENGTHS,
        seeds: "list[int] | tuple[int, ...]" = SEEDS,
        export_folder: str | Path = "exports",
        background: bool = True,
    ):
        strengths, seeds = _listed("strengths", strengths), _listed("seeds", seeds)
        _check_dial(strengths, seeds)
        self._name = model
        self._dense, tokenizer = load_model(model)
        text = load_text("storyworld", tokenizer, windows={"train": 1, "calibration": 16, "test": 32})
        self._calibration, self._test = text.calibration, text.test
        self._seeds, strengths = list(dict.fromkeys(seeds)), sorted(dict.fromkeys(strengths))
        self._rows: dict[tuple[float, float, int], list[dict]] = {}
        self.strength = widgets.SelectionSlider(
            options=[(f"σ = {value:g} (× {math.exp(value):.3g})", value) for value in strengths],
            value=strengths[len(strengths) // 2],
            description="outliers",
            continuous_update=False,
            layout=widgets.Layout(width="360px"),
        )
        self.sparsity = widgets.Dropdown(
            options=[(f"{100 * value:g} %", value) for value in SPARSITIES],
            value=0.5,
            description="sparsity",
            layout=widgets.Layout(width="215px"),
        )
        controls = {"strength": self.strength, "sparsity": self.sparsity}
        super().__init__(controls, export_folder=export_folder, background=background)
        for control in controls.values():
            control.observe(self._on_change, names="value")
        self._on_change()

    def show(self, strength: float | None = None, *, sparsity: float | None = None) -> None:
        """Put the controls where a hand would, those that are given.

        Raises ValueError for what they do not offer.
        """
        self._put(strength=strength, sparsity=sparsity)

    @guarded
    def _on_change(self, _=None) -> None:
        if self._held:
            return
        strength, sparsity = self.strength.value, self.sparsity.value
        work = functools.partial(self._compute, strength=strength, sparsity=sparsity)
        self._ask(f"{_named(strength)}: working", work)

    # --- the work ----------------------------------------------------------------------------------

    def _compute(self, request: Request, strength: float, sparsity: float) -> None:
        """The chosen position first, then the others, then all again with other channels."""
        strengths = [value for _, value in self.strength.options]
        nearest = sorted(strengths, key=lambda value: abs(value - strength))
        points = [(value, sparsity, seed) for seed in self._seeds for value in nearest]
        missing = [point for point in points if point not in self._rows]
        text, pace = "", Pace()
        if points[0] in self._rows:
            text = self._said(strength, sparsity)
            self._publish(
                request, text, busy=bool(missing), figure=_marked(self._table(sparsity), strength, strengths)
            )
        for done, point in enumerate(missing):
            left = bar(done, len(missing), pace.left(done, len(missing)))
            what = f"{text} · the other positions {left}" if text else f"{_named(strength)}: {left}"
            self._rows[point] = self._measured(point, self._watch(request, functools.partial(_news, what)))
            text = self._said(strength, sparsity)
            last = done + 1 == len(missing)
            figure = _marked(self._table(sparsity), strength, strengths)
            left = bar(done + 1, len(missing), pace.left(done + 1, len(missing)))
            rest = "" if last else f" · the other positions {left}"
            self._publish(request, text + rest, busy=not last, figure=figure)

    def _measured(self, point: tuple[float, float, int], cancelled: Callable[[], bool]) -> list[dict]:
        """What one planting of outliers does to the function, and to each way of pruning.

        Raises Cancelled when `cancelled()`, asked before every matrix and batch, says so.
        """
        strength, sparsity, seed = point
        planted = copy.deepcopy(self._dense)
        plant_outliers(planted, sigma=strength, seed=seed)
        before, after = (_logits(model, self._test[:COMPARED]) for model in (self._dense, planted))
        rows = []
        for criterion in CURVES:
            model = copy.deepcopy(planted)
            if criterion != DENSE:
                prune(
                    model,
                    criterion,
                    sparsity=sparsity,
                    calibration=self._calibration,
                    progress=False,
                    cancelled=cancelled,
                )
            value = perplexity(model, self._test, cancelled=cancelled)
            if cancelled():
                raise Cancelled
            rows.append({"strength": strength, "seed": seed, "criterion": criterion, "perplexity": value})
        change = {"logits_change": float((after - before).abs().max()), "logits": float(before.abs().max())}
        protocol = f"{100 * sparsity:g} % pruned, {len(self._test)} windows of the story world"
        same = {"model": self._name, "sparsity": sparsity, "protocol": protocol}
        return [{**same, **row, **change} for row in rows]

    def _table(self, sparsity: float) -> pd.DataFrame:
        rows = [row for (_, of, _), its in self._rows.items() if of == sparsity for row in its]
        table = pd.DataFrame(rows).sort_values(["strength", "seed"], ignore_index=True)
        # In this order, so that each keeps its colour.
        table["criterion"] = pd.Categorical(table["criterion"], categories=CURVES)
        return table

    def _said(self, strength: float, sparsity: float) -> str:
        """What one position of the dial does, in words: means over the finished seeds."""
        table = self._table(sparsity)
        here = table[table["strength"] == strength]
        means = here.groupby("criterion", observed=True)["perplexity"].mean()
        quiet = table[table["strength"] == 0].groupby("criterion", observed=True)["perplexity"].mean()
        moved = strength > 0 and not quiet.empty
        values = {
            name: f"{quiet[name]:.2f} → <b>{means[name]:.2f}</b>" if moved else f"<b>{means[name]:.2f}</b>"
            for name in CURVES
        }
        seeds = here["seed"].nunique()
        return (
            f"{_named(strength)}: the function is the same up to rounding, its logits, up to "
            f"{here['logits'].max():.3g}, differ by at most {here['logits_change'].max():.1g}. Perplexity on "
            f"{len(self._test)} test windows"
            f"{f' from σ = 0 to {strength:g}' if moved else ''}: not pruned {values[DENSE]}; pruned to "
            f"{100 * sparsity:g} % by magnitude {values['magnitude']}, by Wanda {values['wanda']}"
            f"{f' (means of {seeds} seeds)' if seeds > 1 else ''}"
        )


def _listed(name: str, given: Any) -> list:
    """A list of what may also be an array."""
    values = given.tolist() if isinstance(given, np.ndarray | torch.Tensor) else given
    if not isinstance(values, Sequence | range) or isinstance(values, str) or not values:
        raise ValueError(f"{name} is {given!r}; want a list of one or more")
    return list(values)


def _check_dial(strengths: Sequence[float], seeds: Sequence[int]) -> None:
    check_whole(**{f"seed {place}": seed for place, seed in enumerate(seeds)})
    for strength in strengths:
        if isinstance(strength, bool) or not isinstance(strength, Real) or not 0 <= strength <= STRONGEST:
            raise ValueError(f"a strength is {strength!r}; it must be a number from 0 to {STRONGEST}")


def _news(what: str, step: int) -> str:
    return what


def _named(strength: float) -> str:
    return f"σ = {strength:g}"


def _logits(model: PreTrainedModel, windows: torch.Tensor) -> torch.Tensor:
    with evaluating(model):
        device = next(model.parameters()).device
        return model(input_ids=windows.to(device), use_cache=False).logits.float().cpu()


def _marked(table: pd.DataFrame, strength: float, strengths: list[float]) -> DataFigure:
    """The curves with a line at a position of the dial."""
    figure = plot_curves(table, x="strength", hue="criterion")
    axes = figure.axes[0]
    axes.set_xlabel("strength of the outliers σ: channels are multiplied by exp(σ · N(0, 1))")
    # The whole dial, so that the curves stay where they are when points are added.
    margin = 0.04 * (strengths[-1] - strengths[0]) or 1
    axes.set_xlim(strengths[0] - margin, strengths[-1] + margin)
    axes.axvline(strength, color=GREY, linewidth=1, zorder=0)
    return figure
