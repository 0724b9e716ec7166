"""Reconstruction of one unit by gradients: Adam on the squared error of its output."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from ...pruning.layers import Matrix
from ...pruning.masks import Masks
from ..adapters.attach import attach, check_kind
from ..adapters.merge import merge
from ..adapters.modules import adapted_modules, take_off
from ..loop.settings import check_whole
from ..loop.weights import Weights
from ..schedules import llr

Forward = Callable[[int], torch.Tensor]


@dataclass(frozen=True)
class Descent:
    """How a unit is trained: its kept weights, `"full"`, or adapters on them that are merged afterwards.

    The rate rises over a tenth of the steps to `lr` and falls linearly to zero; each step takes one batch of
    the calibration data, every batch once before any comes again.

    Raises ValueError for bad settings, and for LoRA, which cannot be merged into pruned weights.

    >>> Descent(trainable="mask_lora").trainable
    'mask_lora'
    """

    trainable: str = "full"
    steps: int = 200
    lr: float = 1e-3
    rank: int = 16
    alpha: float = 32.0
    start: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_whole(steps=self.steps)
        if self.steps < 1 or not 0 < self.lr < math.inf:
            raise ValueError(f"steps={self.steps}, lr={self.lr}: want steps >= 1 and lr > 0")
        if self.trainable != "full":
            try:
                check_kind(self.trainable)
            except ValueError as error:
                raise ValueError(f"cannot train {self.trainable!r}: it is not 'full', and {error}") from None
        if self.trainable == "lora":
            raise ValueError(
                "trainable is 'lora', whose sum with a pruned weight is dense and cannot be merged; take "
                "'mask_lora', 'lora_prune' or 'scale_lora'"
            )

    def run(
        self,
        model: nn.Module,
        matrices: list[Matrix],
        masks: Masks,
        forward: Forward,
        targets: list[torch.Tensor],
        cancelled: Callable[[], bool] | None = None,
    ) -> bool:
        """Train the matrices in place towards the targets of all batches; False when it was cancelled.

        It ends early when the error is no longer finite. Pruned weights are exactly zero after every step.
        """
        energy = sum(float(t.float().square().sum()) for t in targets) / sum(len(t) for t in targets)
        order = self._order(len(targets))
        with self._trained(model, matrices, masks) as weights:
            optimizer = torch.optim.Adam(weights.masters, lr=self.lr)
            for step in range(self.steps):
                if cancelled is not None and cancelled():
                    return False
                for group in optimizer.param_groups:
                    group["lr"] = self.lr * llr(step, self.steps)
                i = next(order)
                with torch.enable_grad():
                    missed = (forward(i) - targets[i]).float().square().sum()
                    loss = missed / (energy * len(targets[i]))
                if not loss.isfinite():
                    break
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                weights.collect()
                optimizer.step()
                weights.settle()
        return True

    def _order(self, batches: int) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            yield from torch.randperm(batches, generator=generator).tolist()

    @contextmanager
    def _trained(self, model: nn.Module, matrices: list[Matrix], masks: Masks) -> Iterator[Weights]:
        """What is trained, the only parameters with gradients; adapters are merged at the end."""
        its = Masks({matrix.parameter: masks[matrix.parameter] for matrix in matrices})
        flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        trained: dict[str, nn.Parameter] = {}
        model.requires_grad_(False)
        try:
            if self.trainable == "full":
                trained = {matrix.parameter: matrix.weight() for matrix in matrices}
            else:
                shape = (self.trainable, self.rank, self.alpha)
                trained = attach(model, its, *shape, start=self.start, seed=self.seed)
            for parameter in trained.values():
                parameter.requires_grad_(True)
            yield Weights(trained, its)
            if self.trainable != "full":
                merge(model)
        finally:
            for module in adapted_modules(model).values():
                take_off(module)
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
                parameter.grad = None


@torch.no_grad()
def relative_error(forward: Forward, targets: list[torch.Tensor]) -> float:
    """The squared error of a unit's outputs over all batches, as a fraction of the targets' energy.

    >>> relative_error(lambda i: torch.tensor([1.0, 0.0]), [torch.tensor([1.0, 2.0])])
    0.8
    """
    missed = energy = 0.0
    for i, target in enumerate(targets):
        missed += float((forward(i) - target).float().square().sum())
        energy += float(target.float().square().sum())
    return missed / energy if energy else 0.0 if missed == 0 else math.nan
