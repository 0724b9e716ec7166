"""Iterative magnitude pruning and its like: prune a little, retrain, and again."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any

import pandas as pd
from torch import nn

from ..pruning.masks import Masks
from ..pruning.prune import prune
from .freezing import Freezer, gradual_plan
from .loop.checkpoint import check_checkpoint
from .loop.loss import Distillation
from .loop.retrain import prepare, retrain
from .loop.settings import Settings, check_whole
from .loop.tasks import Data
from .schedules import allr_start, check_share, started
from .subsets import trainable_share

STEPS: int = inspect.signature(retrain).parameters["steps"].default
# Keywords of `prune` that every cycle, or another argument, sets.
PRUNING = ("sparsity", "calibration", "masks", "progress", "cancelled")
COLUMNS = ["cycle", "sparsity", "step", "loss", "lr", "trainable_share"]


@dataclass(frozen=True)
class Cycle:
    """One cycle is done: what `on_cycle` is told, when the model is pruned to `sparsity` and retrained.

    `cycle` of `cycles` counts from 1; `loss` is that of the last step, None when there was none.
    """

    cycle: int
    cycles: int
    sparsity: float
    masks: Masks
    loss: float | None


def geometric_sparsities(sparsity: float, cycles: int) -> list[float]:
    """The sparsity after each cycle, `1 − (1 − s)^{p/P}`: every cycle prunes the same share of what is left.

    Raises ValueError for a sparsity outside [0, 1] and fewer cycles than one.

    >>> [round(100 * each, 1) for each in geometric_sparsities(0.9, 3)]
    [53.6, 78.5, 90.0]
    """
    if not isinstance(sparsity, Real) or not 0 <= sparsity <= 1:
        raise ValueError(
            f"sparsity is {sparsity!r}; it is the fraction of pruned weights at the end, between 0 and 1"
        )
    check_whole(cycles=cycles)
    if cycles < 1:
        raise ValueError(f"cycles is {cycles}; there must be at least 1")
    return [1 - (1 - sparsity) ** (cycle / cycles) for cycle in range(1, cycles)] + [sparsity]


def checked_pruning(pruning: Mapping[str, Any] | None) -> dict[str, Any]:
    """The further keywords of `prune` for every cycle.

    Raises ValueError for those that are not the caller's to set there, and for no mapping.

    >>> checked_pruning({"group": "row"}), checked_pruning(None)
    ({'group': 'row'}, {})
    """
    if not isinstance(pruning, Mapping | None):
        raise ValueError(f"pruning is {pruning!r}; it is a mapping from keywords of prune to values")
    for name in pruning or {}:
        if name in PRUNING:
            raise ValueError(
                f"pruning has {name!r}, which is not set there; sparsity and calibration are arguments of "
                "their own, and masks, progress and cancelled belong to the cycles"
            )
    return dict(pruning or {})


def imp(
    model: nn.Module,
    criterion: str,
    data: Data,
    *,
    sparsity: float,
    cycles: int,
    calibration: Any = None,
    pruning: Mapping[str, Any] | None = None,
    gradual: str | None = None,
    reverse: bool = False,
    stages: int = 5,
    share: float | None = None,
    seed: int = 0,
    progress: bool = True,
    on_cycle: Callable[[Cycle], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
    **retraining: Any,
) -> tuple[Masks, pd.DataFrame]:
    """Prune a model in place in several cycles, retraining it after each: iterative pruning (IMP).

    Cycle p of P prunes to `1 − (1 − s)^{p/P}` with `prune(model, criterion, …)`, `sparsity` being s; what is
    pruned stays so. The criterion sees `calibration`, and `pruning` has further keywords of `prune`, such as
    `{"group": "row"}`. Then the model is retrained on `data` with the further keywords of `retrain`, `subset`
    and `lr` at least; cycle p takes its batches by seed + p − 1. A `checkpoint` is one file for each cycle,
    `name-1` and so on, or `name-freeze-5-1` with a `gradual` in five stages: the same call on the same dense
    model goes on where it was killed.

    `gradual="freeze"` freezes one more part of the layers in each of the `stages` of a cycle, from the first
    on until none trains; `"unfreeze"` begins with one part and ends with all; from the input on, or with
    `reverse` from the output back (`gradual_plan`; PERP v1, section 3.4, with an epoch a stage).

    `schedule="allr"` starts every cycle by what it has pruned of what was left (`allr_start`); `share` is
    T_rt/T, the length of one cycle's retraining against that of the pre-training.

    Returns the masks and the history of all steps, with the columns cycle, sparsity, step, loss, lr and
    trainable_share, the fraction of all parameters that the step trained; its mean is PERP's aggregated
    share.

    `on_cycle(Cycle(...))` is called after each cycle, the model being what it is then. When `cancelled()`
    says True, masks and history of what is done are returned. An exception after the first pruning, Ctrl-C
    too, carries the masks that the model has then as `masks` and the history of the finished steps as
    `history`.

    Raises ValueError, leaving the model as it was, for whatever `prune` and `retrain` do not accept.

    >>> import perpkit as pk
    >>> model, tokenizer = pk.load_model("tiny-opt", device="cpu")
    >>> text = pk.load_text("storyworld", tokenizer, windows={"train": 16})
    >>> settings = {"subset": "full", "steps": 2, "lr": 1e-3, "progress": False}
    >>> masks, history = imp(model, "magnitude", text.train, sparsity=0.9, cycles=3, **settings)
    >>> masks, history.groupby("cycle")["sparsity"].first().round(3).tolist()
    (Masks(18 matrices, sparsity 0.9000), [0.536, 0.785, 0.9])
    """
    targets, pruning = geometric_sparsities(sparsity, cycles), checked_pruning(pruning)
    adaptive = check_share(retraining.get("schedule"), share)
    _checked(model, data, {"seed": seed, **(started(retraining, 1.0) if adaptive else retraining)})
    subset, steps = retraining["subset"], retraining.get("steps", STEPS)
    plan = gradual_plan(model, gradual, reverse=reverse, stages=stages, subset=subset) if gradual else None
    if (checkpoint := retraining.pop("checkpoint", None)) is not None:
        scheme = _scheme(gradual, reverse, stages)
        files = [f"{checkpoint}{scheme}-{cycle}" for cycle in range(1, cycles + 1)]
        for file in files:
            check_checkpoint(file, retraining.get("checkpoint_every", 1))

    def table(history: pd.DataFrame) -> pd.DataFrame:
        # Only now: a tied head is untied by the first retraining, and its subset has no size before.
        shares = [trainable_share(model, subset)] if plan is None else plan["trainable_share"].tolist()
        return _table(history, cycle, target, shares, steps)

    asked = latched(cancelled)
    pruning = {"calibration": calibration, "seed": seed, **pruning}
    masks, histories = Masks({}), []
    for cycle, target in enumerate(targets, start=1):
        if asked():
            break
        try:
            earlier = masks if cycle > 1 else None
            before = {name: p.detach().clone() for name, p in model.named_parameters()} if adaptive else {}
            masks = prune(
                model,
                criterion,
                sparsity=target,
                masks=earlier,
                progress=progress,
                cancelled=asked,
                **pruning,
            )
            if asked():
                break
            options: dict[str, Any] = {
                "seed": seed + cycle - 1,
                "progress": progress,
                "cancelled": asked,
                **retraining,
            }
            if adaptive:
                assert share is not None
                start = allr_start(model, masks, before, share=share, earlier=earlier)
                options = started(options, start)
            if gradual is not None:
                freezer = Freezer(model, subset, steps, stages, gradual, reverse)
                options["stop"] = freezer.stop(retraining.get("stop"))
                options["cancelled"] = freezer.cancelled(asked)
            if checkpoint is not None:
                options["checkpoint"] = files[cycle - 1]
            done = retrain(model, data, masks=masks, **options)
        except BaseException as error:
            if len(masks) and not hasattr(error, "masks"):
                error.masks = masks  # type: ignore[attr-defined]
                error.add_note(f"in cycle {cycle} of {cycles}; the masks are in this exception's masks")
            if (part := getattr(error, "history", None)) is not None:
                histories.append(table(part))
            error.history = _joined(histories)  # type: ignore[attr-defined]
            raise
        histories.append(table(done))
        if on_cycle is not None and not asked():
            loss = float(done["loss"].iloc[-1]) if len(done) else None
            on_cycle(Cycle(cycle, cycles, target, masks, loss))
    return masks, _joined(histories)


def _scheme(gradual: str | None, reverse: bool, stages: int) -> str:
    """What a checkpoint's name says of the gradual scheme, so that no other scheme goes on from it."""
    return "" if gradual is None else f"-{gradual}{'-reverse' if reverse else ''}-{stages}"


def _checked(model: nn.Module, data: Data, told: dict[str, Any]) -> None:
    """Raise what `retrain` would for its arguments, before anything is pruned."""
    call = inspect.signature(retrain).bind(model, data, masks=Masks({}), **told)
    call.apply_defaults()
    known = call.arguments
    settings = Settings(**{field.name: known[field.name] for field in fields(Settings) if field.init})
    distillation = Distillation(known["distill_weight"], known["temperature"])
    prepare(
        model,
        data,
        known["masks"],
        settings,
        known["accelerator"],
        known["checkpointing"],
        known["distill"],
        distillation,
    )


def _joined(histories: list[pd.DataFrame]) -> pd.DataFrame:
    return pd.concat(histories, ignore_index=True) if histories else pd.DataFrame(columns=COLUMNS)


def latched(cancelled: Callable[[], bool] | None) -> Callable[[], bool]:
    """Once cancelled, always cancelled: pruning, retraining and the cycles must agree.

    >>> answers = iter([False, True, False])
    >>> asked = latched(lambda: next(answers))
    >>> asked(), asked(), asked()
    (False, True, True)
    """
    said = False

    def asked() -> bool:
        nonlocal said
        said = said or (cancelled is not None and cancelled())
        return said

    return asked


def _table(
    history: pd.DataFrame, cycle: int, sparsity: float, shares: list[float], steps: int
) -> pd.DataFrame:
    share = [shares[(step - 1) * len(shares) // steps] for step in history["step"]]
    table = history.assign(cycle=cycle, sparsity=sparsity, trainable_share=share)
    return table[COLUMNS]
