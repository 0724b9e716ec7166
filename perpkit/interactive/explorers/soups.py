"""The soup explorer: three candidates, what lies between them, and what averaging does to their sparsity."""

import copy
import functools
import html
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import numpy as np
import pandas as pd
from torch import nn

from ...evaluation.accuracy import accuracy
from ...evaluation.perplexity import token_accuracy
from ...experiments.shared import Cancelled
from ...pruning.prune import prune
from ...retraining.batchnorm import recalibrate_batchnorm
from ...retraining.loop.retrain import retrain
from ...retraining.loop.tasks import Data
from ...retraining.soups.average import average
from ...retraining.soups.comparison import held_out
from ...retraining.soups.landscape import barrier, naive_average_sparsity, plane, segment
from ...sources.classifiers import load_classifier
from ...sources.embedded import EMBEDDED_CLASSIFIERS
from ...sources.images import load_images
from ...sources.models import load_model
from ...sources.text import load_text
from ..job import Pace, Request
from ..plots.curves import plot_curves
from ..plots.figure import DataFigure
from ..plots.plane import plot_plane
from .explorer import Explorer, guarded
from .facts import described
from .versions import check_steps, make_room
from .words import bar

TRIANGLE, EDGES = "triangle", {"edge A–B": (0, 1), "edge A–C": (0, 2), "edge B–C": (1, 2)}
COMMON, OWN = "one mask for all", "a mask for each"
SPARSITIES = [0.5, 0.6, 0.7, 0.8, 0.9]


@dataclass(frozen=True)
class Subject:
    """What is pruned and retrained, and on what it is measured."""

    dense: nn.Module
    train: Data
    test: Data
    accuracy: Callable[[nn.Module], float]
    settings: dict[str, Any]
    pruning: dict[str, Any] = field(default_factory=dict)
    prepare: Callable[[nn.Module], None] | None = None
    points: int = 9


class SoupExplorer(Explorer):
    """Three candidates retrained from one pruned model: move a point between them and see its loss.

    The sliders move the point along the edge from A to B and towards C; the message says the loss, the
    accuracy and the sparsity of that mixture. The edges show the loss along a segment and its barrier. With a
    mask for each, the three are pruned on their own, and their mixtures lose the sparsity. `model` is an
    embedded name, a folder or a Hub id as `load_model` takes them, or `"shapes-resnet"`; `steps` is the
    length of each retraining.

    Raises ValueError for a model that cannot be loaded, and for less than one step.

    >>> explorer = SoupExplorer(steps=2, background=False)
    >>> explorer.message.value[:24]
    'A 33 %, B 33 %, C 33 %: '
    """

    name = "soup"

    def __init__(
        self,
        model: str = "tiny-opt",
        *,
        steps: int = 40,
        export_folder: str | Path = "exports",
        background: bool = True,
    ):
        check_steps(steps)
        self._name, self._subject = model, _subject(model, steps)
        self._made: OrderedDict[tuple[str, float], tuple[list[nn.Module], str]] = OrderedDict()
        self._tables: dict[tuple[str, float, str], pd.DataFrame] = {}
        wide = widgets.Layout(width="300px")
        self.sparsity = widgets.SelectionSlider(
            options=[(f"{100 * value:g} %", value) for value in SPARSITIES],
            value=0.7,
            description="sparsity",
            continuous_update=False,
            layout=wide,
        )
        self.masks = widgets.Dropdown(options=[COMMON, OWN], description="masks", layout=wide)
        self.view = widgets.Dropdown(options=[TRIANGLE, *EDGES], description="view", layout=wide)
        self.along = widgets.FloatSlider(
            0.5, min=0, max=1, step=0.05, description="A → B", continuous_update=False, layout=wide
        )
        self.up = widgets.FloatSlider(
            1 / 3, min=0, max=1, step=1 / 30, description="→ C", continuous_update=False, layout=wide
        )
        controls = {name: getattr(self, name) for name in ("sparsity", "masks", "view", "along", "up")}
        super().__init__(controls, export_folder=export_folder, background=background)
        for control in controls.values():
            control.observe(self._on_change, names="value")
        self._on_change()

    def show(
        self,
        along: float | None = None,
        up: float | None = None,
        *,
        sparsity: float | None = None,
        masks: str | None = None,
        view: str | None = None,
    ) -> None:
        """Put the controls where a hand would, those that are given.

        Raises ValueError for what they do not offer.
        """
        self._put(along=along, up=up, sparsity=sparsity, masks=masks, view=view)

    @guarded
    def _on_change(self, _=None) -> None:
        if self._held:
            return
        chosen = self.masks.value, self.sparsity.value
        up, along = self.up.value, self.along.value
        shares = [(1 - up) * (1 - along), (1 - up) * along, up]
        work = functools.partial(self._compute, chosen=chosen, view=self.view.value, shares=shares)
        self._ask("working", work)

    # --- the work ----------------------------------------------------------------------------------

    def _compute(self, request: Request, chosen: tuple[str, float], view: str, shares: list[float]) -> None:
        models, said = self._candidates(request, *chosen)
        mixture = average(models, weights=shares)
        if self._subject.prepare is not None:
            self._subject.prepare(mixture)
        loss = -held_out(self._subject.test, 64)(mixture)
        zeros = naive_average_sparsity([mixture])["average"].iloc[-1]
        right = 100 * self._subject.accuracy(mixture)
        text = (
            f"{_named(shares)}: loss <b>{loss:.3f}</b>, accuracy {right:.1f} %, "
            f"sparsity {100 * zeros:.1f} %{said}"
        )
        self._publish(request, text, busy=True)
        figure, more = self._picture(request, chosen, view, shares, text)
        self._publish(request, text + more, figure=figure)

    def _candidates(self, request: Request, masks: str, sparsity: float) -> tuple[list[nn.Module], str]:
        """Three retrained models, and what is to be said of their masks."""
        if (masks, sparsity) in self._made:
            return self._made[masks, sparsity]
        subject, models = self._subject, []
        parent = copy.deepcopy(subject.dense)
        common = prune(parent, "magnitude", sparsity=sparsity, progress=False, **subject.pruning)
        for seed, name in enumerate("ABC"):
            if masks == COMMON:
                model, kept = copy.deepcopy(parent), common
            else:
                # Random masks stand for models that went their own ways: magnitudes of one dense model agree.
                model = copy.deepcopy(subject.dense)
                kept = prune(model, "random", sparsity=sparsity, seed=seed, progress=False, **subject.pruning)
            news = functools.partial(_news, f"retraining {name}", subject.settings["steps"], Pace())
            watch = self._watch(request, news)
            retrain(
                model,
                subject.train,
                masks=kept,
                seed=seed,
                progress=False,
                cancelled=watch,
                **subject.settings,
            )
            if request.cancelled():
                raise Cancelled
            models.append(model)
        zeros = naive_average_sparsity(models).iloc[-1]
        said = "" if masks == COMMON else f" (each of the three: {100 * zeros['models']:.1f} %)"
        make_room(self._made, models)
        self._made[masks, sparsity] = models, said
        return models, said

    def _picture(
        self, request: Request, chosen: tuple[str, float], view: str, shares: list[float], text: str
    ) -> tuple[DataFigure, str]:
        models, _ = self._candidates(request, *chosen)
        table = self._tables.get((*chosen, view))
        if table is None:
            points = self._subject.points
            total = points**2 + 3 if view == TRIANGLE else points
            watch = self._watch(request, functools.partial(_news, f"{text} · drawing", total, Pace()))
            score = held_out(self._subject.test, 64)

            def loss(model: nn.Module) -> float:
                if watch():
                    raise Cancelled
                return -score(model)

            told: dict[str, Any] = {"points": points, "prepare": self._subject.prepare}
            if view == TRIANGLE:
                a, b, c = models
                table = plane(a, b, c, loss, **told)
            else:
                a, b = (models[place] for place in EDGES[view])
                table = segment(a, b, loss, **told)
            self._tables[(*chosen, view)] = table
        masks, sparsity = chosen
        steps = self._subject.settings["steps"]
        words = f"{self._name} pruned to {100 * sparsity:g} %, {masks}, each retrained for {steps} steps"
        facts = {"parent": self._name, "sparsity": sparsity, "masks": masks, "steps": steps}
        if view == TRIANGLE:
            figure = described(plot_plane(table), f"{words}; star: {_named(shares)}", **facts)
            corners = table.dropna(subset="model")[["x", "y"]].to_numpy(float)
            x, y = np.array(shares) @ corners
            figure.axes[0].plot(x, y, "*", markersize=16, color="white", markeredgecolor="black")
            return figure, ""
        share = f"share of {view[-1]}"
        curve = table.assign(edge=view, seed=0).rename(columns={"t": share})
        figure = described(plot_curves(curve, x=share, y="loss", hue="edge"), words, **facts)
        return figure, f" · barrier of {html.escape(view)}: {barrier(table):.4f}"


def _named(shares: list[float]) -> str:
    return ", ".join(f"{name} {100 * share:.0f} %" for name, share in zip("ABC", shares, strict=True))


def _news(what: str, total: int, pace: Pace, step: int) -> str:
    done = min(step, total)
    return f"{what}, {done} of {total} {bar(done, total, pace.left(done, total))}"


def _subject(name: str, steps: int) -> Subject:
    """The embedded classifier or a language model, with few data: every point has to be measured at once."""
    if name in EMBEDDED_CLASSIFIERS:
        images = load_images("shapes", counts={"train": 2048, "test": 512}, progress=False)
        settings = {"subset": "full", "steps": steps, "lr": 0.03, "batch": 64, "optimizer": "sgd"}
        dense = load_classifier(name)
        inputs = images.train[0][:512]
        return Subject(
            dense,
            images.train,
            images.test,
            lambda model: accuracy(model, images.test),
            settings,
            {"group": "global"},
            lambda model: recalibrate_batchnorm(model, inputs, batch=64),
            points=5,
        )
    language, tokenizer = load_model(name)
    text = load_text("storyworld", tokenizer, windows={"train": 256, "test": 32})
    settings = {"subset": "full", "steps": steps, "lr": 3e-3}

    def right(model: Any) -> float:
        return token_accuracy(model, text.test)

    return Subject(language, text.train, text.test, right, settings)
