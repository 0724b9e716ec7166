"""The retraining loop: a parameter subset, an optimiser, and masks that hold after every step."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
from torch import nn
from tqdm.auto import tqdm

from ...pruning.masks import Masks
from ..adapters.attach import check_adapter_masks
from ..schedules import Schedule
from ..subsets import (
    head_is_tied,
    needs_untied_head,
    subset_parameters,
    subset_parts,
    tie_head,
    untie_head,
)
from .checkpoint import check_checkpoint
from .loss import Distillation
from .machine import Accelerated, Machine
from .modes import check_gradient_checkpointing, gradient_checkpointing, training
from .relu import byte_mask_relus
from .run import Run
from .settings import Augment, Settings
from .tasks import Data, Labelled, Windows, make_task
from .weights import Weights

if TYPE_CHECKING:
    from accelerate import Accelerator  # type: ignore[import-untyped]


def retrain(
    model: nn.Module,
    data: Data,
    *,
    masks: Masks,
    subset: str,
    steps: int = 100,
    lr: float,
    batch: int = 8,
    warmup: float = 0.1,
    seed: int = 0,
    schedule: str | Schedule = "llr",
    optimizer: str = "adamw",
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    accumulate: int = 1,
    augment: Augment | None = None,
    clip: float | None = None,
    autocast: str | None = None,
    checkpointing: bool = False,
    distill: nn.Module | None = None,
    distill_weight: float = 0.5,
    temperature: float = 1.0,
    stop: Callable[[Sequence[float]], bool] | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 100,
    accelerator: "Accelerator | None" = None,
    progress: bool = True,
    on_step: Callable[[int, float], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> pd.DataFrame:
    """Retrain a subset of a pruned model's parameters in place and return the history.

    `data` are token windows `[n, length]`, or for other models a tuple of inputs `[n, ...]` and labels `[n]`;
    batches are drawn without replacement, reshuffled when used up. Pruned weights are exactly zero after
    every step. A head tied to the input embedding is untied first when the subset names the head or the
    embeddings. Batch normalisations follow the batches where the subset trains them, and are frozen
    elsewhere.

    - A step takes `accumulate` batches of `batch` and moves the `subset` (`subset_parameters`) by AdamW, or
      by SGD with `momentum`; the gradient's norm is at most `clip`. `weight_decay` acts on all of the subset.
      The defaults are PERP's (section 4).
    - The rate is `lr` times the `schedule`: a name (`schedules`: llr, clr, slr, constant, …; the rate rises
      over the first `warmup` of the steps) or a function `schedule(step, steps)`.
    - `augment(images, generator)` makes each batch of inputs into what is trained on, such as
      `crop_and_flip`. The generator, one of the CPU, depends only on the seed and the number of the batch.
    - `autocast` "bfloat16" or "float16" computes in 16 bits beside float32 weights. A model in 16 bits is
      trained by way of float32 masters of the subset and keeps its dtype. `checkpointing` computes
      activations again in the backward pass instead of keeping them.
    - `distill` is the dense model: the loss is (1 − `distill_weight`) times the cross entropy plus
      `distill_weight` · T² times the divergence from its predictions at `temperature` T.
    - `stop(losses)` is asked before every step and ends the run when true (`plateau`); `cancelled()`
      likewise, and the model stays as the finished steps left it. `on_step(step, loss)` follows every step.
    - `checkpoint` names a file that holds the run every `checkpoint_every` steps and at its end. The same
      call on the same pruned model goes on from there, on a CPU to the same bits; a finished run comes back
      as it is.
    - `accelerator` spreads the batches over its processes: with n of them a step takes n · `accumulate`
      batches. Precision and sharding are the accelerator's; after FSDP the model stays sharded.

    The history has the columns step, loss and lr. An exception between the first step and the end, Ctrl-C
    too, carries that of the finished steps as `history`.

    Raises ValueError for data that does not fit, an unknown or empty subset, masks of another model, adapters
    that keep what the masks prune, bad settings and a checkpoint of other settings: the model is then as it
    was; and for a loss or weights that are no longer finite: the model then has its last good weights.

    >>> import perpkit as pk
    >>> model, tokenizer = pk.load_model("tiny-opt", device="cpu")
    >>> text = pk.load_text("storyworld", tokenizer, windows={"train": 16})
    >>> masks = pk.prune(model, "magnitude", sparsity=0.5)
    >>> history = retrain(model, text.train, masks=masks, subset="biases", steps=2, lr=1e-2, progress=False)
    >>> list(history.columns), len(history)
    (['step', 'loss', 'lr'], 2)
    """
    settings = Settings(
        subset=subset,
        lr=lr,
        steps=steps,
        batch=batch,
        accumulate=accumulate,
        warmup=warmup,
        schedule=schedule,
        optimizer=optimizer,
        momentum=momentum,
        weight_decay=weight_decay,
        clip=clip,
        autocast=autocast,
        seed=seed,
        augment=augment,
    )
    if checkpoint is not None:
        check_checkpoint(checkpoint, checkpoint_every)
    distillation = Distillation(distill_weight, temperature)
    machine, task = prepare(model, data, masks, settings, accelerator, checkpointing, distill, distillation)
    # Last of all, so that an error leaves the model as it was.
    tied = needs_untied_head(subset) and head_is_tied(model)
    if tied:
        untie_head(model)
    trained = subset_parameters(model, subset)

    with ExitStack() as inside:
        statistics = inside.enter_context(training(model, trained, subset))
        inside.enter_context(byte_mask_relus(model, trained))
        inside.enter_context(gradient_checkpointing(model, checkpointing))
        run = Run(machine, task, Weights(trained, masks, statistics), settings)
        inside.callback(run.close)
        try:
            if checkpoint is not None:
                run.open(checkpoint, checkpoint_every)
            bar = inside.enter_context(_bar(steps, len(run.history), progress and machine.rank == 0))
            while len(run.history) < steps and not (run.stopped(stop) or run.cancelled(cancelled)):
                step, loss = run.step()
                bar.update()
                bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
                if on_step is not None:
                    on_step(step, loss)
            run.finish()
        except BaseException as error:
            error.history = run.table()  # type: ignore[attr-defined]
            if tied and run.good == 0 and isinstance(error, ValueError):
                tie_head(model)
            raise
    return run.table()


def prepare(
    model: nn.Module,
    data: Data,
    masks: Masks,
    settings: Settings,
    accelerator: "Accelerator | None",
    checkpointing: bool,
    dense: nn.Module | None,
    distillation: Distillation,
) -> tuple[Machine, Windows | Labelled]:
    """Check what a retraining is asked to do and return where it runs and on what; nothing changes.

    Raises ValueError as `retrain` does for its arguments.

    >>> import torch
    >>> model, settings = nn.Linear(2, 3), Settings(subset="biases", lr=0.1)
    >>> data = torch.zeros(4, 2), torch.arange(4) % 3
    >>> machine, _ = prepare(model, data, Masks({}), settings, None, False, None, Distillation())
    >>> machine.device
    device(type='cpu')
    """
    if not isinstance(masks, Masks):
        raise ValueError(f"masks is a {type(masks).__name__}; give what prune has returned, or Masks({{}})")
    masks.check(model)
    check_adapter_masks(model, masks)
    machine = Machine(model, settings) if accelerator is None else Accelerated(model, settings, accelerator)
    task = make_task(model, data, machine.device, dense, distillation, settings.augment)
    check_gradient_checkpointing(model, checkpointing)
    _check_subset(model, settings.subset)
    return machine, task


def _check_subset(model: nn.Module, subset: str) -> None:
    """Raise ValueError for a part that is empty, while nothing has been untied yet."""
    parts = subset_parts(subset)
    for part in parts:
        if not (needs_untied_head(part) and head_is_tied(model)):
            subset_parameters(model, part)
    if set(parts) == {"perp_v1:bn_recalibrate"}:
        raise ValueError(f"{subset!r} has no parameters to train; call recalibrate_batchnorm(model, inputs)")


def _bar(steps: int, done: int, shown: bool) -> tqdm:
    return tqdm(total=steps, initial=done, desc="retrain", unit="step", disable=not shown, leave=False)
