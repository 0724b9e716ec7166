"""Perplexity: how many words a model hesitates between."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F
from tqdm.auto import tqdm

from ..sources.text import check_windows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Bounds the logits of one batch (values) and of one block of the loss (rows).
LOGITS_AT_ONCE = 2**22
LOSS_ROWS = 256


@torch.no_grad()
def perplexity(
    model: "PreTrainedModel",
    windows: torch.Tensor,
    *,
    progress: bool = False,
    cancelled: Callable[[], bool] | None = None,
) -> float:
    """The exponential of the mean negative log-likelihood of every token but the first of each window.

    `windows` are tokens `[windows, length]` cut without overlap, `length` at most the model's context
    (methods: PERP and Wanda evaluate so). The loss is computed in float32. Returns NaN when cancelled.

    Raises ValueError for windows of another shape, longer than the context, or of another vocabulary.

    >>> import perpkit as pk
    >>> model, tokenizer = pk.load_model("tiny-opt", device="cpu")
    >>> text = pk.load_text("storyworld", tokenizer, windows={"train": 8, "calibration": 8})
    >>> text.floor < perplexity(model, text.test) < 1.3 * text.floor
    True
    """

    def nats(logits: torch.Tensor, targets: torch.Tensor) -> float:
        return F.cross_entropy(logits.float(), targets, reduction="sum").item()

    mean = _mean(model, windows, nats, "perplexity", progress, cancelled)
    try:
        return math.exp(mean)
    except OverflowError:
        return math.inf


@torch.no_grad()
def token_accuracy(
    model: "PreTrainedModel",
    windows: torch.Tensor,
    *,
    progress: bool = False,
    cancelled: Callable[[], bool] | None = None,
) -> float:
    """The share of the tokens, all but the first of each window, that the model thinks the likeliest.

    `windows` are tokens `[windows, length]` as for `perplexity`. Returns NaN when cancelled.

    Raises ValueError for windows of another shape, longer than the context, or of another vocabulary.

    >>> import perpkit as pk
    >>> model, tokenizer = pk.load_model("tiny-opt", device="cpu")
    >>> text = pk.load_text("storyworld", tokenizer, windows={"train": 8, "calibration": 8, "test": 8})
    >>> 0.5 < token_accuracy(model, text.test) < 1
    True
    """

    def right(logits: torch.Tensor, targets: torch.Tensor) -> float:
        return (logits.argmax(-1) == targets).sum().item()

    return _mean(model, windows, right, "token accuracy", progress, cancelled)


def _mean(
    model: "PreTrainedModel",
    windows: torch.Tensor,
    summed: Callable[[torch.Tensor, torch.Tensor], float],
    what: str,
    progress: bool,
    cancelled: Callable[[], bool] | None,
) -> float:
    """The mean over all predicted tokens of what is summed over some logits and targets."""
    check_windows(model, windows)
    count, length = windows.shape
    batch = max(1, LOGITS_AT_ONCE // (length * model.config.get_text_config().vocab_size))
    device = next(model.parameters()).device
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    total = 0.0
    try:
        for tokens in tqdm(windows.split(batch), desc=what, disable=not progress, leave=False):
            if cancelled is not None and cancelled():
                return math.nan
            tokens = tokens.to(device)
            logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].flatten(0, 1)
            targets = tokens[:, 1:].flatten()
            for some, wanted in zip(logits.split(LOSS_ROWS), targets.split(LOSS_ROWS), strict=True):
                total += summed(some, wanted)
    finally:
        for module, mode in modes:
            module.training = mode
    return total / (count * (length - 1))
