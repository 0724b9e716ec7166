"""The generation explorer: the same words continued by the dense, the pruned and the retrained model."""

import dataclasses
import functools
import html
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import pandas as pd

from ...evaluation.generation import generate, room_after
from ...evaluation.perplexity import perplexity
from ...experiments.shared import Cancelled
from ..job import Pace, Request
from ..plots.texts import plot_texts
from .explorer import Explorer, guarded
from .facts import described, of_versions
from .offers import offered
from .versions import RETRAININGS, SPARSITIES, text_versions
from .views import unknown_said
from .words import bar

GREEDY, SAMPLED = "greedy", "sampled"
ROOM = "<br>the model's context has room for {} tokens after this prompt"
COLUMN = "vertical-align: top; padding: 0 20px 8px 0; min-width: 150px; max-width: 230px"


@dataclass(frozen=True)
class Chosen:
    """Where the controls stood when the work was asked for."""

    prompt: str
    sparsity: float
    retrain: str
    tokens: int
    temperature: float
    seed: int


class GenerationExplorer(Explorer):
    """Let the dense, the pruned and the retrained model continue the same prompt, side by side.

    Words are chosen greedily, or drawn at a temperature by a seed, with the same noise for all three models;
    they appear as they are made. Above each text stands the model's perplexity on the story world. `model` is
    a language model by the names that `load_model` takes; it is pruned by magnitude, and retrained for
    `steps` steps, 80 unless told. Retrained models are kept.

    Raises ValueError for a model that cannot be loaded.

    >>> explorer = GenerationExplorer(steps=1, background=False)
    >>> explorer.show("It is a", sparsity=0.5, tokens=4)
    >>> explorer.figure().table["version"].tolist()
    ['dense', 'pruned 50 %', 'retrained biases+norms']
    """

    name = "generation"

    def __init__(
        self,
        model: str = "tiny-opt",
        *,
        steps: int | None = None,
        export_folder: str | Path = "exports",
        background: bool = True,
    ):
        self._name = model
        self._versions, self._tokenizer, self._text = text_versions(model, steps)
        self._measured: dict[tuple, float] = {}
        wide = widgets.Layout(width="300px")
        self.prompt = widgets.Textarea(
            "It is a",
            description="prompt",
            rows=2,
            continuous_update=False,
            layout=widgets.Layout(width="608px"),
        )
        self.sparsity = widgets.SelectionSlider(
            options=[(f"{100 * value:g} %", value) for value in SPARSITIES],
            value=0.7,
            description="sparsity",
            continuous_update=False,
            layout=wide,
        )
        self.retrain = widgets.Dropdown(options=RETRAININGS, description="retrain", layout=wide)
        self.tokens = widgets.IntSlider(
            50, min=1, max=100, description="tokens", continuous_update=False, layout=wide
        )
        self.sampling = widgets.Dropdown(options=[GREEDY, SAMPLED], description="words", layout=wide)
        self.temperature = widgets.FloatSlider(
            0.8,
            min=0.1,
            max=2,
            step=0.1,
            description="temperature",
            continuous_update=False,
            layout=wide,
            style={"description_width": "90px"},
        )
        self.seed = widgets.BoundedIntText(
            0, min=0, max=9999, description="seed", layout=widgets.Layout(width="160px")
        )
        names = ("prompt", "sparsity", "retrain", "tokens", "sampling", "temperature", "seed")
        controls = {name: getattr(self, name) for name in names}
        super().__init__(controls, export_folder=export_folder, background=background)
        self.texts = widgets.HTML()
        self.texts.add_class("perpkit-texts")
        # In the place of the picture: text that can be read in any theme, and copied.
        shown = [self.texts if part is self.picture else part for part in self.children]
        self.set_trait("children", shown)
        for control in self._controls.values():
            control.observe(self._on_change, names="value")
        self._on_change()

    def show(
        self,
        prompt: str | None = None,
        *,
        sparsity: float | None = None,
        retrain: str | None = None,
        tokens: int | None = None,
        temperature: float | None = None,
        seed: int | None = None,
    ) -> None:
        """Put the controls where a hand would, those that are given.

        Temperature 0 is greedy, whatever the seed.

        Raises ValueError for what they do not offer, and for a prompt that the model cannot continue.
        """
        low, high = self.temperature.min, self.temperature.max
        if isinstance(temperature, Real) and temperature != 0 and not low <= temperature <= high:
            raise ValueError(f"temperature is {temperature}; want 0, which is greedy, or {low:g} to {high:g}")
        if prompt is not None:
            self._room(offered(self.prompt, "prompt", prompt))
        greedy = temperature == 0 and temperature is not False
        self._put(
            prompt=prompt,
            sparsity=sparsity,
            retrain=retrain,
            tokens=tokens,
            sampling=None if temperature is None else GREEDY if greedy else SAMPLED,
            temperature=None if greedy else temperature,
            seed=seed,
        )

    @guarded
    def _on_change(self, _=None) -> None:
        with self._job.lock:
            if self._held:
                return
            greedy = self.sampling.value == GREEDY
            self.temperature.disabled = self.seed.disabled = greedy
            chosen = Chosen(
                prompt=self.prompt.value,
                sparsity=self.sparsity.value,
                retrain=self.retrain.value,
                tokens=self.tokens.value,
                temperature=0.0 if greedy else self.temperature.value,
                seed=self.seed.value,
            )
            # The texts grow in the page: until they are whole there is nothing to be exported.
            self._figure = None
            for button in self.exports.values():
                button.disabled = True
            self._ask("working", functools.partial(self._compute, chosen=chosen))

    # --- the work ----------------------------------------------------------------------------------

    def _compute(self, request: Request, chosen: Chosen) -> None:
        versions, sparsity, subset = self._versions, chosen.sparsity, chosen.retrain
        rows: list[dict] = []
        self._continue(request, chosen, rows, "dense", versions.dense, ())
        pruned = versions.pruned(sparsity)
        self._continue(request, chosen, rows, f"pruned {100 * sparsity:g} %", pruned, (sparsity,))
        pace = Pace()

        def news(step: int) -> str:
            return (
                f"retraining {html.escape(subset)}, step {min(step, versions.steps)} of {versions.steps} "
                f"{bar(step, versions.steps, pace.left(step, versions.steps))}"
            )

        retrained = versions.retrained(sparsity, subset, self._watch(request, news))
        self._continue(request, chosen, rows, f"retrained {subset}", retrained, (sparsity, subset))
        how = (
            "greedy" if chosen.temperature == 0 else f"temperature {chosen.temperature:g}, seed {chosen.seed}"
        )
        said = (
            f"{100 * sparsity:g} % pruned by magnitude, {subset} retrained for {versions.steps} steps; "
            f"{how}; perplexities on {len(self._text.test)} test windows"
        )
        figure = plot_texts(pd.DataFrame(rows), prompt=chosen.prompt, words=f"{self._name}, {said}")
        of = of_versions(figure.table["version"], sparsity, subset, versions.steps)
        described(figure, model=self._name, **{**dataclasses.asdict(chosen), **of})
        full = "" if chosen.tokens <= self._room(chosen.prompt) else ROOM.format(self._room(chosen.prompt))
        unknown = unknown_said(self._tokenizer, chosen.prompt)
        self._publish(request, f"{html.escape(said)}{full}{unknown}", figure=figure)

    def _room(self, prompt: str) -> float:
        """How many tokens may follow a prompt, at least one."""
        return room_after(self._versions.dense, self._tokenizer, prompt, least=1)

    def _continue(
        self, request: Request, chosen: Chosen, rows: list[dict], version: str, model: Any, key: tuple
    ) -> None:
        """Add one model's continuation to the rows, showing them as it grows."""
        if key not in self._measured:
            measured = perplexity(model, self._text.test, cancelled=request.cancelled)
            if request.cancelled():
                raise Cancelled
            self._measured[key] = measured
        row = {"version": version, "text": "", "perplexity": self._measured[key]}
        rows.append(row)

        def news(step: int) -> str:
            drawn = _texts(chosen.prompt, rows)
            request.show(lambda: setattr(self.texts, "value", drawn))
            return f"{html.escape(version)}: token {step} of {chosen.tokens} {bar(step, chosen.tokens)}"

        row["text"] = generate(
            model,
            self._tokenizer,
            chosen.prompt,
            tokens=chosen.tokens,
            temperature=chosen.temperature,
            seed=chosen.seed,
            on_token=lambda said: row.update(text=said),
            cancelled=self._watch(request, news),
        )
        if request.cancelled():
            raise Cancelled
        drawn = _texts(chosen.prompt, rows)
        request.show(lambda: setattr(self.texts, "value", drawn))


def _texts(prompt: str, rows: list[dict]) -> str:
    """The texts in HTML, side by side, the prompt before each of them fainter."""
    begun = html.escape(prompt)
    cells = [
        f'<td style="{COLUMN}"><b>{html.escape(row["version"])}</b><br>'
        f'<span style="opacity: 0.7">perplexity {row["perplexity"]:.2f}</span>'
        f'<div style="white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.4; margin-top: 6px">'
        f'<span style="opacity: 0.6">{begun}</span>{html.escape(row["text"])}</div></td>'
        for row in rows
    ]
    return f"<table><tr>{''.join(cells)}</tr></table>"
