"""How a retraining runs: the settings of its optimiser, schedule and precision, checked."""

import math
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from numbers import Real

import torch
from torch import nn

from ..schedules import Schedule, factors
from ..subsets import subset_parts

OPTIMIZERS = ("adamw", "sgd")
PRECISIONS = ("bfloat16", "float16")

Augment = Callable[[torch.Tensor, torch.Generator], torch.Tensor]


def check_whole(**values: object) -> None:
    """Raise ValueError naming the first value that is no whole number.

    >>> check_whole(steps=2.0)
    Traceback (most recent call last):
    ValueError: steps is 2.0; it must be a whole number
    """
    for name, value in values.items():
        try:
            operator.index(value)  # type: ignore[arg-type]
        except TypeError:
            raise ValueError(f"{name} is {value!r}; it must be a whole number") from None


@dataclass(frozen=True)
class Settings:
    """What `retrain` was told about the run itself; the meanings are in its docstring.

    Raises ValueError naming a bad value and the valid ones.

    >>> Settings(subset="biases", lr=0.1, steps=2).rates
    [0.1, 0.05]
    """

    subset: str
    lr: float
    steps: int = 100
    batch: int = 8
    accumulate: int = 1
    warmup: float = 0.1
    schedule: str | Schedule = field(default="llr", repr=False)
    optimizer: str = "adamw"
    momentum: float = 0.9
    weight_decay: float = 0.0
    clip: float | None = None
    autocast: str | None = None
    seed: int = 0
    augment: Augment | None = field(default=None, repr=False)
    rates: list[float] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        subset_parts(self.subset)
        check_whole(steps=self.steps, batch=self.batch, accumulate=self.accumulate)
        for name in ("lr", "warmup", "momentum", "weight_decay"):
            if not isinstance(getattr(self, name), Real):
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be a number")
        if self.batch < 1 or self.accumulate < 1:
            raise ValueError(
                f"batch is {self.batch} and accumulate is {self.accumulate}; both must be at least 1"
            )
        if self.steps < 0 or not 0 < self.lr < math.inf or not 0 <= self.warmup <= 1:
            raise ValueError(
                f"steps={self.steps}, lr={self.lr}, warmup={self.warmup}: want steps >= 0, lr > 0, warmup in "
                "[0, 1]"
            )
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(
                f"unknown optimizer {self.optimizer!r}; the optimizers are {' and '.join(OPTIMIZERS)}"
            )
        if not 0 <= self.momentum < 1 or not 0 <= self.weight_decay < math.inf:
            raise ValueError(
                f"momentum={self.momentum}, weight_decay={self.weight_decay}: want momentum in [0, 1), "
                "weight_decay >= 0"
            )
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip is {self.clip}; it is the largest norm of the gradient, or None")
        if self.autocast is not None and self.autocast not in PRECISIONS:
            raise ValueError(f"unknown autocast {self.autocast!r}; want {', '.join(PRECISIONS)} or None")
        if self.augment is not None and not callable(self.augment):
            raise ValueError(
                f"augment is {self.augment!r}; it is a function of images and a generator, such as "
                "pk.crop_and_flip, or None"
            )
        steps = factors(self.schedule, self.steps, self.warmup)
        object.__setattr__(self, "rates", [self.lr * factor for factor in steps])

    def make_optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimiser, at the rate of the first step."""
        lr, decay = self.lr, self.weight_decay
        if self.optimizer == "sgd":
            return torch.optim.SGD(
                parameters, lr=lr, momentum=self.momentum, weight_decay=decay, foreach=True
            )
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=decay, foreach=True)

    def autocast_dtype(self) -> torch.dtype | None:
        """The dtype of autocast, None without."""
        return None if self.autocast is None else getattr(torch, self.autocast)
