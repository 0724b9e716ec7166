"""Where a retraining runs: one process with its device, or the processes of an `accelerate.Accelerator`."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .settings import Settings
from .weights import HALVES, Weights

if TYPE_CHECKING:
    from accelerate import Accelerator  # type: ignore[import-untyped]


class Machine:
    """One process: autocast, loss scaling for float16, clipping, steps.

    >>> model = nn.Linear(2, 1)
    >>> from perpkit.pruning.masks import Masks
    >>> weights = Weights(dict(model.named_parameters()), Masks({}))
    >>> machine = Machine(model, Settings(subset="full", lr=0.1, steps=1))
    >>> called, optimizer = machine.prepare(weights)
    >>> machine.processes, called is model
    (1, True)
    """

    processes, rank = 1, 0

    def __init__(self, model: nn.Module, settings: Settings):
        self.model, self.settings = model, settings
        self.device = next(model.parameters()).device
        narrow = {settings.autocast_dtype()} | {p.dtype for p in model.parameters()}
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=torch.float16 in narrow)

    def prepare(self, weights: Weights) -> tuple[nn.Module, Any]:
        """The model to call and the optimiser of the weights."""
        return self.model, self.settings.make_optimizer(weights.masters)

    @contextmanager
    def forward(self, called: nn.Module, last: bool) -> Iterator[None]:
        """Around the loss of one batch; `last` is the last before a step."""
        dtype = self.settings.autocast_dtype()
        with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
            yield

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of a loss."""
        self.scaler.scale(loss).backward()

    def step(self, optimizer: torch.optim.Optimizer, weights: Weights) -> None:
        """Move the weights; a step whose float16 gradients overflowed is left out and the scale lowered."""
        self.scaler.unscale_(optimizer)
        if self.settings.clip is not None:
            weights.mask_gradients()
            nn.utils.clip_grad_norm_(weights.masters, self.settings.clip)
        self.scaler.step(optimizer)
        self.scaler.update()

    def mean(self, value: torch.Tensor) -> float:
        """The mean of a number over the processes."""
        return value.item()

    def close(self, called: nn.Module) -> None:
        """Give the model back as it came."""


class Accelerated(Machine):
    """The processes of an Accelerator, each with its share of every step's batches."""

    def __init__(self, model: nn.Module, settings: Settings, accelerator: "Accelerator"):
        self.model, self.settings, self.accelerator = model, settings, accelerator
        self.device = accelerator.device
        self.replaced = "forward" in vars(model)
        self.processes, self.rank = accelerator.num_processes, accelerator.process_index
        self.scaler = torch.amp.GradScaler(enabled=False)
        if settings.autocast is not None:
            raise ValueError(
                "autocast is the accelerator's choice: give Accelerator(mixed_precision='bf16') instead"
            )
        if accelerator.gradient_accumulation_steps != 1:
            raise ValueError(
                f"the accelerator accumulates {accelerator.gradient_accumulation_steps} steps; leave that at "
                "1 and give retrain accumulate="
            )
        if any(p.dtype in HALVES for p in model.parameters()):
            raise ValueError(
                "with an accelerator the model must be float32; give Accelerator(mixed_precision='bf16')"
            )

    def prepare(self, weights: Weights) -> tuple[nn.Module, Any]:
        called, optimizer = self.accelerator.prepare(
            self.model, self.settings.make_optimizer(weights.masters)
        )
        # FSDP has put its own parameters, spread over the processes, in the place of the model's.
        now = dict(self.accelerator.unwrap_model(called).named_parameters())
        weights.bind({name: now[name] for name in weights.trained})
        return called, optimizer

    @contextmanager
    def forward(self, called: nn.Module, last: bool) -> Iterator[None]:
        # Gradients travel once a step, with the last batch.
        with nullcontext() if last else self.accelerator.no_sync(called), self.accelerator.autocast():
            yield

    def backward(self, loss: torch.Tensor) -> None:
        self.accelerator.backward(loss)

    def step(self, optimizer: torch.optim.Optimizer, weights: Weights) -> None:
        if self.settings.clip is not None:
            weights.mask_gradients()
            self.accelerator.clip_grad_norm_(weights.masters, self.settings.clip)
        optimizer.step()

    def mean(self, value: torch.Tensor) -> float:
        return self.accelerator.reduce(value.detach().to(self.device), "mean").item()

    def close(self, called: nn.Module) -> None:
        self.accelerator.unwrap_model(called, keep_fp32_wrapper=False)
        for module in called.modules():
            # FSDP keeps the outermost parameters together after a forward pass
            if callable(reshard := getattr(module, "reshard", None)):
                reshard()
        if not self.replaced:
            # For mixed precision it puts a forward on the model and leaves the old one there in its place.
            vars(self.model).pop("forward", None)
