"""Training speed and memory of the ways to retrain, on a model of random weights."""

import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from ...evaluation.cost import Cost, device_name, free_memory
from ...pruning.masks import Masks
from ...pruning.prune import prune
from ...retraining.adapters.attach import attach
from ...retraining.loop.modes import gradient_checkpointing, training
from ...retraining.loop.retrain import retrain
from ...retraining.subsets import subset_parameters
from ...sources.models import check_device, check_dtype
from .rows import tried
from .shapes import check_length
from .weights import empty_model, random_model

# What is retrained, by the name that rows carry; adapters are trained alone, as PEFT's.
METHODS = ("full", "biases", "norms", "biases+norms", "mask_lora", "lora", "peft lora")
RANK, ALPHA = 16, 32.0
SPARSITY = 0.5
# Ratios to full fine-tuning, PERP v1, section 3.2 (7600 / 3500 and 6400 / 3500 tokens a second, OPT-2.7B on
# an A100). Its "perp" trains biases, normalisations, the head and LoRA on queries and values.
PUBLISHED = {"biases+norms": 7600 / 3500, "mask_lora": 6400 / 3500}


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
    **settings: Any,
) -> Iterator[dict]:
    """Measure tokens a second and peak memory of retraining, a row for each method, as it is finished.

    `settings` are the other fields of `Setting`. A row that cannot be had (no biases, too little memory,
    PEFT not installed) says so in its `error`; `ratio` is to the row of full fine-tuning, `published_ratio`
    that of PERP's section 3.2. The weights are random; the speed does not depend on them.

    Raises ValueError for an unknown shape, method, dtype or device.

    >>> rows = list(throughput("opt-125m", ("biases",), (False,), layers=1, batch=1, length=8, device="cpu"))
    >>> rows[0]["tokens_per_second"] > 0, rows[0]["parameters"]
    (True, 47272704)
    """
    first = Setting(model, methods[0], **settings)
    chosen = [replace(first, method=each, checkpointing=way) for way in checkpointing for each in methods]
    full: dict[bool, float] = {}
    for setting in chosen:
        row = measure(setting)
        speed = row["tokens_per_second"]
        if setting.method == "full" and speed:
            full[setting.checkpointing] = speed
        reference = full.get(setting.checkpointing)
        row["ratio"] = speed / reference if speed and reference else None
        row["published_ratio"] = PUBLISHED.get(setting.method)
        yield row


def measure(setting: Setting) -> dict:
    """Retrain a random model for a few steps: its row, with the error in words if it cannot be had."""
    row: dict[str, Any] = {**vars(setting), "tokens_per_second": None, "peak_memory": None}
    row |= {"device": device_name(setting.device), "trainable_share": None, "parameters": None}
    return tried(row, setting.device, lambda: _measured(setting))


def _measured(setting: Setting) -> dict:
    s = setting
    fits(s)
    model: Any = random_model(s.model, layers=s.layers, dtype=s.dtype, device=s.device)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    masks = prune(model, "magnitude", sparsity=SPARSITY, progress=False)
    if s.method not in ("full", "mask_lora", "lora"):
        # Of no use on the device: what is pruned is not trained.
        masks = Masks({name: mask.cpu() for name, mask in masks.items()})
    tokens = torch.randint(model.config.vocab_size, (s.batch * 4, s.length), generator=_generator())
    clock = _Clock(s.device)
    with Cost(s.device) as cost:
        train = _peft if s.method == "peft lora" else _retrain
        trained = train(model, tokens, masks, s, clock)
    return {
        "parameters": parameters,
        "trainable_share": trained / parameters,
        "tokens_per_second": s.batch * s.length * s.steps / clock.seconds(s.warmup),
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
    """The plainest loop around PEFT's LoRA on all matrices of the blocks."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise ValueError("PEFT is not installed: pip install peft") from None
    targets = [name.removesuffix(".weight") for name in masks]
    config = LoraConfig(r=RANK, lora_alpha=int(ALPHA), target_modules=targets)
    with warnings.catch_warnings():
        # PEFT asks transformers for a name that is to go.
        warnings.simplefilter("ignore", FutureWarning)
        wrapped: Any = get_peft_model(model, config)
    factors = {name: each for name, each in wrapped.named_parameters() if each.requires_grad}
    optimizer = torch.optim.AdamW(factors.values(), lr=1e-5, weight_decay=0)
    clock.tick()
    with training(wrapped, factors, "lora"), gradient_checkpointing(wrapped, s.checkpointing):
        for step in range(s.warmup + s.steps):
            start = step * s.batch % len(tokens)
            some = tokens[start : start + s.batch].to(s.device)
            wrapped(input_ids=some, labels=some).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            clock.tick()
    return sum(factor.numel() for factor in factors.values())


def fits(setting: Setting) -> None:
    """Raise ValueError when the weights and what their optimiser keeps are more than the free memory.

    Of activations nothing is known beforehand: what passes may still run out of memory.
    """
    model = empty_model(setting.model, setting.layers)
    width = check_dtype(setting.dtype).itemsize
    whole = sum(parameter.numel() for parameter in model.parameters())
    # A gradient, two moments of Adam in float32, and a float32 master of a 16-bit weight.
    trained = whole if setting.method == "full" else 0
    needed = whole * width + trained * (4 + 8 + (4 if width < 4 else 0))
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

    def seconds(self, warmup: int) -> float:
        """From the end of the last step of the warm-up."""
        return self._ticks[-1] - self._ticks[warmup]


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
