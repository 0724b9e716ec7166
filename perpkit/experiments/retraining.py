"""The retraining of one run."""

from typing import TYPE_CHECKING

import pandas as pd

from ..pruning.masks import Masks
from ..retraining.adapters.attach import attach
from ..retraining.adapters.merge import merge
from ..retraining.loop.retrain import retrain
from ..retraining.subsets import needs_untied_head, trainable_share, untie_head
from ..sources.text import Text
from .experiment import Experiment
from .shared import Cancel, check

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def retrained(
    model: "PreTrainedModel",
    masks: Masks,
    text: Text,
    experiment: Experiment,
    checkpointing: bool,
    cancelled: Cancel,
) -> tuple[float, int]:
    """Retrain a pruned model in place; the share of the parameters that were trained, and the tokens."""
    e = experiment
    parts = e.retrain.split("+")
    if e.adapter is not None:
        assert e.rank is not None
        assert e.alpha is not None
        start = e.start if e.adapter == "scale_lora" else None
        attach(model, masks, e.adapter, rank=e.rank, alpha=e.alpha, start=start, seed=e.seed)
    subset = "+".join("lora" if part == e.adapter else part for part in parts)
    if needs_untied_head(subset):
        untie_head(model)
    share = trainable_share(model, subset)
    history: pd.DataFrame = retrain(
        model,
        text.train,
        masks=masks,
        subset=subset,
        steps=e.steps,
        lr=e.lr or 0.0,
        batch=e.batch,
        accumulate=e.accumulate,
        schedule=e.schedule,
        weight_decay=e.weight_decay,
        seed=e.seed,
        checkpointing=checkpointing,
        progress=False,
        cancelled=cancelled,
    )
    check(cancelled)
    if e.adapter not in (None, "lora"):
        # A plain LoRA on pruned weights cannot be merged: it is measured beside them.
        merge(model)
    return share, len(history) * e.batch * e.accumulate * text.train.shape[1]
