"""The adapter explorer: what low-rank adapters add to a pruned matrix, and what merging them does."""

import copy
import functools
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path

import ipywidgets as widgets
import torch
from transformers import PreTrainedModel

from ...evaluation.perplexity import perplexity
from ...experiments.experiment import recommended_lr
from ...experiments.shared import Cancelled
from ...pruning.masks import Masks
from ...pruning.prune import prune
from ...retraining.adapters.attach import attach
from ...retraining.adapters.merge import merge
from ...retraining.adapters.modules import KINDS, Adapted, adapted_modules
from ...retraining.loop.retrain import retrain
from ...retraining.subsets import trainable_share
from ...sources.models import load_model
from ...sources.text import load_text
from ..job import Pace, Request
from ..plots.adapter import plot_adapter
from ..plots.card import short_names
from ..plots.figure import DataFigure
from .explorer import Explorer, guarded
from .facts import described
from .scores import remember
from .versions import check_steps
from .words import bar

RANKS = (1, 2, 4, 8, 16, 32)
SPARSITIES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
SUMS = {
    "lora": ("σBA", "W + σBA"),
    "lora_prune": ("σBA", "M ⊙ (W + σBA)"),
    "scale_lora": ("BA", "W ⊙ BA"),
    "mask_lora": ("σBA", "W + M ⊙ σBA"),
}
# A picture takes a few steps' time, and so no more than a fifth of it all.
SECONDS_BETWEEN_PICTURES, TIMES_ITS_DRAWING = 0.5, 4


@dataclass
class Trained:
    """A model with its trained adapters: the losses on the way, and afterwards what is to be said of it."""

    model: PreTrainedModel
    masks: Masks
    losses: list[float] = field(default_factory=list)
    said: str = ""


class AdapterExplorer(Explorer):
    """Choose an adapter's kind and rank and how sparse the model is: watch it learn, then see it merged.

    The model is pruned by magnitude, adapters are attached to all its pruned matrices and trained for some
    `steps`; the loss and one layer's matrices, W, BA, M ⊙ BA and what they come to, follow the training.
    Then the message says what merging does to the perplexity and to the zeros: plain LoRA fills them, pruning
    its sum again (`lora_prune`) keeps them and loses what was learnt in their places, `scale_lora` and
    `mask_lora` keep both. `model` is an embedded name, a folder or a Hub id as `load_model` takes them.

    Raises ValueError for a model that cannot be loaded.

    >>> explorer = AdapterExplorer(steps=2, background=False)
    >>> explorer.message.value.partition(":")[0]
    'mask_lora, rank 4, 6.3 % of the parameters trained'
    """

    name = "adapters"

    def __init__(
        self,
        model: str = "tiny-opt",
        *,
        steps: int = 60,
        export_folder: str | Path = "exports",
        background: bool = True,
    ):
        check_steps(steps)
        self._name, self._steps = model, steps
        self._dense, tokenizer = load_model(model)
        text = load_text("storyworld", tokenizer, windows={"train": 256, "calibration": 1})
        self._train, self._test = text.train, text.test
        self._pruned: OrderedDict[float, tuple[PreTrainedModel, Masks, float]] = OrderedDict()
        self._trained: OrderedDict[tuple[str, int, float], Trained] = OrderedDict()
        # Which matrices there are, a pruning to nothing says without changing any.
        masks = prune(copy.deepcopy(self._dense), "magnitude", sparsity=0, progress=False)
        narrowest = min(min(mask.shape[-2:]) for mask in masks.values())
        wide = widgets.Layout(width="250px")
        self.kind = widgets.Dropdown(options=KINDS, value="mask_lora", description="adapter", layout=wide)
        self.rank = widgets.SelectionSlider(
            options=[rank for rank in RANKS if rank <= narrowest],
            value=min(4, narrowest),
            description="rank",
            continuous_update=False,
            layout=wide,
        )
        self.sparsity = widgets.SelectionSlider(
            options=[(f"{100 * value:g} %", value) for value in SPARSITIES],
            value=0.7,
            description="sparsity",
            continuous_update=False,
            layout=wide,
        )
        self.layer = widgets.Dropdown(
            options=list(zip(short_names(list(masks)), masks, strict=True)),
            value=max(masks, key=lambda name: masks[name].numel()),
            description="layer",
            layout=wide,
        )
        controls = {name: getattr(self, name) for name in ("kind", "rank", "sparsity", "layer")}
        super().__init__(controls, export_folder=export_folder, background=background)
        for control in controls.values():
            control.observe(self._on_change, names="value")
        self._on_change()

    def show(
        self,
        kind: str | None = None,
        rank: int | None = None,
        *,
        sparsity: float | None = None,
        layer: str | None = None,
    ) -> None:
        """Put the controls where a hand would, those that are given.

        `layer` is a name, or as much of its end as says which.

        Raises ValueError for what they do not offer.
        """
        self._put(kind=kind, rank=rank, sparsity=sparsity, layer=layer)

    @guarded
    def _on_change(self, _=None) -> None:
        if self._held:
            return
        key = self.kind.value, self.rank.value, self.sparsity.value
        self._ask("working", functools.partial(self._compute, key=key, layer=self.layer.value))

    # --- the work ----------------------------------------------------------------------------------

    def _compute(self, request: Request, key: tuple[str, int, float], layer: str) -> None:
        trained = self._trained.get(key)
        if trained is None:
            trained = remember(self._trained, key, self._trained_now(request, key, layer))
        self._publish(request, trained.said, figure=self._drawn(trained, key, layer))

    def _drawn(self, trained: Trained, key: tuple[str, int, float], layer: str) -> DataFigure:
        kind, rank, sparsity = key
        words = (
            f"{layer.removesuffix('.weight')} of {self._name}, pruned by magnitude to {100 * sparsity:g} %; "
            f"{kind} of rank {rank}"
        )
        figure = plot_adapter(_parts(trained.model, layer), trained.losses, self._steps, words=words)
        return described(figure, model=self._name, layer=layer, sparsity=sparsity, kind=kind, rank=rank)

    def _trained_now(self, request: Request, key: tuple[str, int, float], layer: str) -> Trained:
        """Prune, attach, train and measure, the picture following.

        Raises Cancelled when the request has become useless.
        """
        kind, rank, sparsity = key
        pruned, masks, before = self._pruned_to(sparsity)
        trained = Trained(copy.deepcopy(pruned), masks)
        # As the papers do, so that σ is the same for every rank.
        attach(trained.model, masks, kind, rank, alpha=2.0 * rank)
        text = f"{kind}, rank {rank}: perplexity {before:.2f} pruned"
        pace, drawn, took = Pace(), time.monotonic(), 0.0

        def news(_: int) -> str:
            done = len(trained.losses)
            left = bar(done, self._steps, pace.left(done, self._steps))
            return f"{text}, training step {done} of {self._steps} {left}"

        def on_step(_: int, loss: float) -> None:
            nonlocal drawn, took
            trained.losses.append(loss)
            started = time.monotonic()
            if started - drawn > max(SECONDS_BETWEEN_PICTURES, TIMES_ITS_DRAWING * took):
                self._publish(request, news(0), busy=True, figure=self._drawn(trained, key, layer))
                drawn = time.monotonic()
                took = drawn - started

        retrain(
            trained.model,
            self._train,
            masks=masks,
            subset="lora",
            steps=self._steps,
            lr=recommended_lr(self._name, kind),
            progress=False,
            on_step=on_step,
            cancelled=self._watch(request, news),
        )
        self._measure(request, key, trained, before)
        if request.cancelled():
            raise Cancelled
        return trained

    def _measure(
        self, request: Request, key: tuple[str, int, float], trained: Trained, before: float
    ) -> None:
        """Merge a copy, and say what became of the perplexity and of the zeros."""
        kind, rank, sparsity = key
        adapted = perplexity(trained.model, self._test, cancelled=request.cancelled)
        share = 100 * trainable_share(trained.model, "lora")
        filled = _zeros(trained.model, merged=False)
        pruned = f"{100 * sparsity:g} %"
        text = (
            f"{kind}, rank {rank}, {share:.2g} % of the parameters trained: perplexity {before:.2f} pruned → "
            f"<b>{adapted:.2f}</b> with adapters"
        )
        if kind == "lora":
            trained.said = (
                f"{text}. Merging would fill the zeros: in {SUMS[kind][1]} only {100 * filled:.2g} % of the "
                f"weights are zero, not {pruned}, so <b>plain LoRA makes the model dense</b>; it can only "
                "stay beside it"
            )
            return
        merged = copy.deepcopy(trained.model)
        merge(merged)
        after = perplexity(merged, self._test, cancelled=request.cancelled)
        lost = (
            ": what was learnt in the places of pruned weights is <b>lost in merging</b>"
            if kind == "lora_prune"
            else ": merging changes nothing"
        )
        trained.said = (
            f"{text} → <b>{after:.2f}</b> merged; zeros {pruned} pruned → {100 * filled:.2g} % with adapters "
            f"→ {100 * _zeros(trained.model, merged=True):.2g} % merged{lost}"
        )

    def _pruned_to(self, sparsity: float) -> tuple[PreTrainedModel, Masks, float]:
        found = self._pruned.get(sparsity)
        if found is None:
            model = copy.deepcopy(self._dense)
            masks = prune(model, "magnitude", sparsity=sparsity, progress=False)
            found = remember(self._pruned, sparsity, (model, masks, perplexity(model, self._test)))
        return found


def _parts(model: PreTrainedModel, layer: str) -> dict[str, torch.Tensor]:
    """A layer's weight, its adapter, the adapter under the mask, and what is left of them after merging."""
    name, _, key = layer.rpartition(".")
    module = model.get_submodule(name)
    assert isinstance(module, Adapted)
    adapter = module.adapters[key]
    with torch.no_grad():
        weight, mask = module.matrices(key)
        a, b = module.factors(key)
        update = b @ a if adapter.kind == "scale_lora" else adapter.scale * (b @ a)
        merged = _merged(module, key)
    term, total = SUMS[adapter.kind]
    parts = {
        "W, pruned": weight,
        term: update,
        f"M ⊙ {term}": torch.where(mask, update, 0.0),
        f"merged: {total}": merged,
    }
    # Of a fused mixture the first expert.
    return {name: part[0] if part.ndim == 3 else part for name, part in parts.items()}


@torch.no_grad()
def _merged(module: Adapted, key: str) -> torch.Tensor:
    """A weight with its adapter merged; plain LoRA's is dense, which `merge` refuses."""
    weight, mask = module.matrices(key)
    effective = module.adapters[key].effective(weight, mask, *module.factors(key))
    return effective if module.adapters[key].kind == "lora" else torch.where(mask, effective, 0.0)


@torch.no_grad()
def _zeros(model: PreTrainedModel, *, merged: bool) -> float:
    """The share of exact zeros in the adapted matrices, as they act in training or after merging."""
    zeros = total = 0
    for module in adapted_modules(model).values():
        for key in module.adapters:
            weight = _merged(module, key) if merged else module.effective(key)
            zeros += int((weight == 0).sum())
            total += weight.numel()
    return zeros / total
