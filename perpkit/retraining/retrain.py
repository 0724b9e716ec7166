"""The retraining loop: a parameter subset, AdamW, and masks that hold after every step."""

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pandas as pd
import torch
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from ..pruning.masks import Masks
from ..sources.text import check_windows
from .schedules import llr
from .subsets import subset_parameters, subset_parts, untie_head

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def retrain(
    model: "PreTrainedModel",
    windows: torch.Tensor,
    *,
    masks: Masks,
    subset: str,
    steps: int = 100,
    lr: float,
    batch: int = 8,
    warmup: float = 0.1,
    seed: int = 0,
    progress: bool = True,
    on_step: Callable[[int, float], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> pd.DataFrame:
    """Retrain a subset of a pruned model's parameters in place and return the history.

    `windows` are token windows `[n, length]`, drawn in batches without replacement, reshuffled when used up.
    AdamW without weight decay; the rate rises linearly over the first `warmup` of the steps to `lr` and falls
    linearly to zero (PERP, section 4). Pruned weights are exactly zero after every step. A head that is tied
    to the input embedding is untied first, so that the embedding stays as it is.

    `on_step(step, loss)` is called after every step; `cancelled()` is asked before each, and when it says
    True the model stays as the finished steps left it. The history has the columns step, loss and lr.

    Raises ValueError for windows that do not fit, an unknown or empty subset, masks of another model, a
    trainable parameter in 16 bits, and a loss that is not finite (the model is then as it was before).

    >>> import perpkit as pk
    >>> model, tokenizer = pk.load_model("tiny-opt", device="cpu")
    >>> text = pk.load_text("storyworld", tokenizer, windows={"train": 16})
    >>> masks = pk.prune(model, "magnitude", sparsity=0.5)
    >>> history = retrain(model, text.train, masks=masks, subset="biases", steps=2, lr=1e-2, progress=False)
    >>> list(history.columns), len(history)
    (['step', 'loss', 'lr'], 2)
    """
    check_windows(model, windows)
    if batch < 1:
        raise ValueError(f"batch is {batch}; it must be at least 1")
    if steps < 0 or not 0 < lr < math.inf or not 0 <= warmup <= 1:
        raise ValueError(
            f"steps={steps}, lr={lr}, warmup={warmup}: want steps >= 0, lr > 0, warmup in [0, 1]"
        )
    masks.check(model)
    for name, parameter in model.named_parameters():
        if parameter.dtype in (torch.float16, torch.bfloat16):
            raise ValueError(
                f"{name!r} is {parameter.dtype}: load the model with dtype='float32' to retrain it"
            )
    parts = subset_parts(subset)
    for part in parts:
        if part != "head":
            subset_parameters(model, part)
    # Last of all, so that an error leaves the model as it was.
    if "head" in parts:
        untie_head(model)
    trainable = subset_parameters(model, subset)

    device = next(model.parameters()).device
    pruned = [(p, ~masks[name].to(device)) for name, p in trainable.items() if name in masks]
    before = [p.detach().clone() for p in trainable.values()]
    optimizer = torch.optim.AdamW(trainable.values(), lr=lr, weight_decay=0.0, foreach=True)
    order = _batches(len(windows), batch, seed)
    history = []
    with _training(model, trainable), torch.random.fork_rng(_cuda(device)), _bar(steps, progress) as bar:
        _seed(device, seed)
        for step in range(steps):
            if cancelled is not None and cancelled():
                break
            rate = optimizer.param_groups[0]["lr"] = lr * llr(step, steps, warmup)
            tokens = windows[next(order)].to(device)
            loss = next_token_loss(model, tokens)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            value = loss.item()
            if value != value or value == float("inf"):
                with torch.no_grad():
                    for parameter, saved in zip(trainable.values(), before, strict=True):
                        parameter.copy_(saved)
                raise ValueError(
                    f"the loss became {value} at step {step + 1} with lr={lr}; the model is as it was. "
                    f"Try lr={lr / 10:g}"
                )
            optimizer.step()
            with torch.no_grad():
                for parameter, zeros in pruned:
                    parameter.masked_fill_(zeros, 0)
            history.append((step + 1, value, rate))
            bar.update()
            bar.set_postfix(loss=f"{value:.3f}", refresh=False)
            if on_step is not None:
                on_step(step + 1, value)
    masks.check(model)
    return pd.DataFrame(history, columns=["step", "loss", "lr"])


def next_token_loss(model: "PreTrainedModel", tokens: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood in nats of `tokens[:, 1:]`; tokens `[batch, length]`."""
    logits = model(input_ids=tokens, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


def _batches(count: int, batch: int, seed: int) -> Iterator[torch.Tensor]:
    """Indices of the windows of each batch, every window once before any comes again."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64)
    while True:
        while len(order) < batch:
            order = torch.cat([order, torch.randperm(count, generator=generator)])
        yield order[:batch]
        order = order[batch:]


class _training:
    """Only the trainable parameters get gradients inside; flags and modes are restored afterwards."""

    def __init__(self, model: "PreTrainedModel", trainable: dict[str, nn.Parameter]):
        self.model, self.trainable = model, trainable

    def __enter__(self) -> None:
        self.modes = [(module, module.training) for module in self.model.modules()]
        self.flags = [(p, p.requires_grad) for p in self.model.parameters()]
        self.model.train()
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in self.trainable)

    def __exit__(self, *_) -> None:
        for module, mode in self.modes:
            module.training = mode
        for parameter, flag in self.flags:
            parameter.requires_grad_(flag)
            parameter.grad = None


def _cuda(device: torch.device) -> list[torch.device]:
    return [device] if device.type == "cuda" else []


def _seed(device: torch.device, seed: int) -> None:
    # Not torch.manual_seed: it reseeds every device, and only these generators are restored.
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index].manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)


def _bar(steps: int, progress: bool) -> tqdm:
    return tqdm(total=steps, desc="retrain", unit="step", disable=not progress, leave=False)
