"""Training speed and memory of the ways to retrain, on a model of random weights."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from ...evaluation.cost import Cost, free_memory
from ...pruning.masks import Masks
from ...pruning.prune import prune
from ...retraining.adapters.attach import attach
from ...retraining.loop.modes import gradient_checkpointing, training
from ...retraining.loop.retrain import retrain
from ...retraining.subsets import subset_parameters
from ...sources.models import check_device
from ..paper.tables import table
from .peft_lora import peft_lora
from .rows import Rows, asked_for, new_row, tried
from .shapes import check_length
from .weights import empty_model, random_model, retraining_bytes

# What is retrained, by the name that rows carry; adapters are trained alone, on all matrices of the blocks.
# "perp" is what PERP v1 has measured: biases, normalisations, and LoRA on queries, values and the head.
METHODS = ("full", "biases", "norms", "biases+norms", "mask_lora", "lora", "peft lora", "perp")
PERP_TARGETS = ("q_proj", "v_proj", "lm_head")
RANK, ALPHA = 16, 32.0
SPARSITY = 0.5


@dataclass(frozen=True)
class Setting:
    """One row's inputs: the shape, what is retrained, and the size of a step."""

    model: str
    method: str
    checkpointing: bool = False
    layers: int | None = None
    batch: int = 2
    length: int = 2048
    steps: int = 5
    warmup: int = 2
    dtype: str = "bfloat16"
    device: str = field(default_factory=lambda: check_device(None))

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"unknown method {self.method!r}; the methods are {', '.join(METHODS)}")
        for name in ("batch", "length", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.warmup < 0:
            raise ValueError(f"warmup is {self.warmup}; it must be at least 0")
        check_length(self.model, self.length)


def throughput(
    model: str,
    methods: tuple[str, ...] = METHODS,
    checkpointing: tuple[bool, ...] = (False, True),
    known: Rows | None = None,
    **settings: Any,
) -> Iterator[dict]:
    """Measure tokens a second and peak memory of retraining, a row for each method, as it is finished.

    `settings` are the other fields of `Setting`. A row that cannot be had (no biases, too little memory,
    PEFT not installed) says so in its `error`; `slowest_step` and `fastest_step` are tokens a second too.
    Full fine-tuning comes first: `ratio` is to its row, here or among the `known` rows, which are not
    measured again. `published_ratio` is that of PERP's section 3.2, where it has one for the same method and
    the whole of the same model. The weights are random; the speed does not depend on them.

    Raises ValueError for an unknown shape, method, dtype or device.

    >>> rows = list(throughput("opt-125m", ("biases",), (False,), layers=1, batch=1, length=8, device="cpu"))
    >>> rows[0]["tokens_per_second"] > 0, rows[0]["parameters"]
    (True, 47272704)
    """
    first = Setting(model, methods[0], **settings)
    in_order = sorted(methods, key=lambda method: method != "full")
    rows = dict(known or {})
    for way in checkpointing:
        for method in in_order:
            row = measure(replace(first, method=method, checkpointing=way), known)
            rows[asked_for(row)] = row
            full = rows.get(asked_for({**row, "method": "full"}), {}).get("tokens_per_second")
            speed = row["tokens_per_second"]
            row["ratio"] = speed / full if speed and full else None
            yield row


def measure(setting: Setting, known: Rows | None = None) -> dict:
    """Retrain a random model for a few steps: its row, with the error in words if it cannot be had."""
    row = new_row(**{**vars(setting), "what": "train"})
    row["published_ratio"] = published_ratio(setting)
    return tried(row, setting.device, lambda: _measured(setting), known)


def published_ratio(setting: Setting) -> float | None:
    """The ratio to full fine-tuning's tokens a second in PERP v1, section 3.2, on an A100, or None.

    >>> published_ratio(Setting("opt-2.7b", "perp", device="cpu"))
    1.8285714285714285
    """
    found = table("perp_v1_throughput")
    speeds = found[found["model"] == setting.model].set_index("method")["train_tokens_per_second"]
    if setting.layers is not None or setting.method == "full" or setting.method not in speeds:
        return None
    return float(speeds[setting.method] / speeds["full_ft"])


def _measured(setting: Setting) -> dict:
    s = setting
    fits(s)
    model: Any = random_model(s.model, layers=s.layers, dtype=s.dtype, device=s.device)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    masks = prune(model, "magnitude", sparsity=SPARSITY, progress=False)
    if s.method not in ("full", "mask_lora"):
        # Of no use on the device: what is pruned is not trained.
        masks = Masks({name: mask.cpu() for name, mask in masks.items()})
    tokens = torch.randint(model.config.vocab_size, (s.batch * 4, s.length), generator=_generator())
    clock = _Clock(s.device)
    with Cost(s.device) as cost:
        train = _peft if s.method in ("peft lora", "perp") else _retrain
        trained = train(model, tokens, masks, s, clock)
    seconds, step = clock.seconds(s.warmup), s.batch * s.length
    return {
        "parameters": parameters,
        "trainable_share": trained / parameters,
        "tokens_per_second": step * s.steps / sum(seconds),
        "slowest_step": step / max(seconds),
        "fastest_step": step / min(seconds),
        "peak_memory": cost.peak_memory,
    }


def _retrain(model: nn.Module, tokens: torch.Tensor, masks: Masks, s: Setting, clock: "_Clock") -> int:
    subset = s.method
    if s.method in ("mask_lora", "lora"):
        attach(model, masks, s.method, rank=RANK, alpha=ALPHA)
        subset = "lora"
    trained = sum(each.numel() for each in subset_parameters(model, subset).values())
    clock.tick()
    retrain(
        model,
        tokens,
        masks=masks,
        subset=subset,
        lr=1e-5,
        steps=s.warmup + s.steps,
        batch=s.batch,
        checkpointing=s.checkpointing,
        progress=False,
        on_step=clock.tick,
    )
    return trained


def _peft(model: nn.Module, tokens: torch.Tensor, masks: Masks, s: Setting, clock: "_Clock") -> int:
    """The plainest loop around PEFT's LoRA, on all matrices of the blocks or as PERP has it."""
    targets = [name.removesuffix(".weight") for name in masks]
    if s.method == "perp":
        # Adapters of our own go on pruned matrices, which the head is not.
        targets = [name for name, _ in model.named_modules() if name.rpartition(".")[2] in PERP_TARGETS]
    wrapped = peft_lora(model, targets, RANK, ALPHA)
    trained = {name: each for name, each in wrapped.named_parameters() if each.requires_grad}
    if s.method == "perp":
        # In the dtype of the weights: float32 masters of so few would change neither speed nor memory.
        trained |= subset_parameters(wrapped, "biases+norms")
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-5, weight_decay=0)
    clock.tick()
    with training(wrapped, trained, "lora"), gradient_checkpointing(wrapped, s.checkpointing):
        for step in range(s.warmup + s.steps):
            start = step * s.batch % len(tokens)
            some = tokens[start : start + s.batch].to(s.device)
            wrapped(input_ids=some, labels=some).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            clock.tick()
    return sum(each.numel() for each in trained.values())


def fits(setting: Setting) -> None:
    """Raise ValueError when the weights and what their optimiser keeps are more than the free memory.

    Of activations nothing is known beforehand: what passes may still run out of memory.
    """
    model = empty_model(setting.model, setting.layers)
    whole = sum(parameter.numel() for parameter in model.parameters())
    needed = retraining_bytes(whole, setting.dtype, full=setting.method == "full")
    free = free_memory(setting.device)
    if free is not None and needed > free:
        raise ValueError(f"needs more than {needed / 2**30:.0f} GiB; {free / 2**30:.0f} GiB are free")


class _Clock:
    """When each step was finished on the device."""

    def __init__(self, device: str):
        self._device = device
        self._ticks: list[float] = []

    def tick(self, *_) -> None:
        if self._device.startswith("cuda"):
            torch.cuda.synchronize(self._device)
        self._ticks.append(time.perf_counter())

    def seconds(self, warmup: int) -> list[float]:
        """Of each step after the warm-up."""
        return [end - start for start, end in pairwise(self._ticks[warmup:])]


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
