"""Learning-rate schedules: pure functions from a step to a factor of the largest rate.

A schedule takes the step, counted from 0, and the number of steps. The names are those of "How I Learned To
Stop Worrying And Love Retraining" (ICLR 2023): T is the length of the pre-training and T_rt that of the
retraining, both in epochs or both in steps; η₁ is the largest rate, and `share` is T_rt/T.

- FT keeps the last rate η_T: `constant`, with lr=η_T.
- LRW runs the last T_rt epochs of the original schedule again: `lrw`.
- SLR squeezes the whole original schedule into T_rt, with a warm-up: `slr`.
- CLR falls from η₁ like a cosine, with a warm-up: `clr`.
- LLR falls linearly from η₁ to zero, with a warm-up: `llr`.
- ALLR is LLR from a lower start, the lower the less was pruned away: `allr` with `allr_start`; `imp` and
  `sms` compute the start of every cycle themselves.
- BIMP trains the dense model with LLR in as many steps as the budget leaves, prunes it, and retrains with
  ALLR: `retrain` with `llr`, `prune`, and `retrain` with `allr`.
"""

import difflib
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import nn

from ..pruning.masks import Masks

Schedule = Callable[[int, int], float]


def llr(step: int, steps: int, warmup: float = 0.1) -> float:
    """Linear schedule with warm-up: the factor of the largest rate at a step counted from 0.

    It rises linearly over the first `warmup` of the steps and falls linearly to zero after the last one
    (LLR of "How I Learned To Stop Worrying And Love Retraining", ICLR 2023).

    >>> [llr(step, 10, warmup=0.2) for step in range(10)]
    [0.5, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]
    """
    rising = round(warmup * steps)
    if step < rising:
        return (step + 1) / rising
    return (steps - step) / (steps - rising)


def clr(step: int, steps: int, warmup: float = 0.1) -> float:
    """Cosine schedule with warm-up: it rises as `llr` does and falls to zero along half a cosine (CLR).

    >>> [round(clr(step, 4, warmup=0.0), 3) for step in range(4)]
    [1.0, 0.854, 0.5, 0.146]
    """
    rising = round(warmup * steps)
    if step < rising:
        return (step + 1) / rising
    return (1 + math.cos(math.pi * (step - rising) / (steps - rising))) / 2


def constant(step: int, steps: int, warmup: float = 0.0) -> float:
    """The same rate throughout, after a warm-up if one is wanted (FT, where lr is the last rate η_T).

    >>> constant(0, 100), constant(99, 100)
    (1.0, 1.0)
    """
    rising = round(warmup * steps)
    return (step + 1) / rising if step < rising else 1.0


def linear_decay(progress: float) -> float:
    """The pre-training schedule of PERP's vision models: linearly to zero; `progress` runs from 0 to 1.

    >>> linear_decay(0.25)
    0.75
    """
    return 1 - progress


def lrw(step: int, steps: int, *, share: float, original: Callable[[float], float] = linear_decay) -> float:
    """The end of the original schedule once more, as long as the retraining is (LRW).

    `share` is T_rt/T; `original(progress)` is the factor of η₁ after that part of the pre-training, from 0
    to 1.

    Raises ValueError for a share outside (0, 1].

    >>> [round(lrw(step, 4, share=0.5), 3) for step in range(4)]
    [0.5, 0.375, 0.25, 0.125]
    """
    if not 0 < share <= 1:
        raise ValueError(
            f"share is {share}; it is T_rt/T, the length of the retraining against that of the pre-training, "
            "above 0 and at most 1"
        )
    return original(1 - share + share * step / steps)


def slr(
    step: int, steps: int, warmup: float = 0.1, original: Callable[[float], float] = linear_decay
) -> float:
    """The whole original schedule squeezed into the retraining (SLR), its start rising over the warm-up.

    `original(progress)` is the factor of η₁ after that part of the pre-training, from 0 to 1.

    >>> stepwise = lambda progress: 0.1 ** int(3 * progress)
    >>> [round(slr(step, 6, warmup=0.0, original=stepwise), 3) for step in range(6)]
    [1.0, 1.0, 0.1, 0.1, 0.01, 0.01]
    """
    rising = round(warmup * steps)
    if step < rising:
        return original(0.0) * (step + 1) / rising
    return original((step - rising) / (steps - rising))


def allr(step: int, steps: int, warmup: float = 0.1, *, start: float) -> float:
    """LLR from `start` instead of 1 (ALLR); `start` comes from `allr_start`.

    >>> [allr(step, 4, warmup=0.0, start=0.5) for step in range(4)]
    [0.5, 0.375, 0.25, 0.125]
    """
    return start * llr(step, steps, warmup)


@torch.no_grad()
def allr_start(
    model: nn.Module,
    masks: Masks,
    dense: nn.Module | Mapping[str, torch.Tensor] | float,
    *,
    share: float,
    earlier: Masks | None = None,
) -> float:
    """Where ALLR starts: clip(‖θ−θ_pruned‖₂ / (‖θ‖₂ √s), min(share, 1), 1), a factor of η₁.

    θ are the masked matrices before pruning, θ_pruned those of the pruned `model`, s the masks' sparsity, and
    `share` is T_rt/T. `dense` is the model before pruning, its parameters by name, or only the norm ‖θ‖₂ of
    its masked matrices: enough when the kept weights are unchanged, for then
    ‖θ−θ_pruned‖² = ‖θ‖² − ‖θ_pruned‖². In a later cycle of iterative pruning `dense` is the model before that
    cycle's pruning and `earlier` its masks; s is then the share of what they had left that was pruned.

    Raises ValueError for masks that prune nothing, another model, a norm below the pruned one's, or a share
    that is not positive.

    >>> model = nn.Linear(4, 1, bias=False)
    >>> _ = model.weight.data.copy_(torch.tensor([[0.0, 0.0, 2.0, 4.0]]))
    >>> masks = Masks({"weight": model.weight != 0})
    >>> round(allr_start(model, masks, {"weight": torch.tensor([[2.0, 1.0, 2.0, 4.0]])}, share=0.1), 4)
    0.6325
    """
    if not share > 0:
        raise ValueError(f"share is {share}; it is T_rt/T and must be positive")
    gone = 0.0 if earlier is None else earlier.sparsity()
    sparsity = (masks.sparsity() - gone) / (1 - gone) if gone < 1 else 0.0
    if sparsity <= 0:
        raise ValueError("the masks prune nothing, so ALLR has no pruning to adapt to; use the schedule llr")
    masks.check(model)
    pruned = {name: p for name, p in model.named_parameters() if name in masks}
    if not isinstance(dense, nn.Module | Mapping):
        whole = float(dense) ** 2
        moved = whole - sum(_square(p) for p in pruned.values())
        if not (whole > 0 and moved >= -1e-6 * whole):
            raise ValueError(
                f"the norm {dense} is below that of the pruned weights; want that before pruning"
            )
    else:
        before = dict(dense.named_parameters()) if isinstance(dense, nn.Module) else dense
        for name in pruned:
            if name not in before or before[name].shape != pruned[name].shape:
                raise ValueError(f"the dense model is another one: it has no {name!r} of the same shape")
        whole = sum(_square(before[name]) for name in pruned)
        moved = sum(_square(before[name].to(p.device).double() - p.double()) for name, p in pruned.items())
    distance = math.sqrt(max(moved, 0.0) / (whole * sparsity))
    return min(max(distance, min(share, 1.0)), 1.0)


def check_share(schedule: object, share: float | None) -> bool:
    """Whether cycles of pruning and retraining are to start ALLR themselves, each by what it has pruned.

    Raises ValueError for the schedule `"allr"` without a share, and for a share that nothing reads.

    >>> check_share("allr", 0.1), check_share("llr", None)
    (True, False)
    """
    adaptive = isinstance(schedule, str) and schedule == "allr"
    if adaptive and (isinstance(share, bool) or not isinstance(share, Real) or not 0 < share < math.inf):
        raise ValueError(
            f"share is {share!r}; the schedule 'allr' needs T_rt/T, the length of one cycle's retraining "
            "against that of the pre-training, such as share=0.1"
        )
    if share is not None and not adaptive:
        raise ValueError(f"share is {share!r}, which only the schedule 'allr' reads; leave it out")
    return adaptive


def started(retraining: Mapping[str, Any], start: float) -> dict[str, Any]:
    """The keywords of `retrain` with ALLR from that start as their schedule.

    >>> factors(started({"warmup": 0.5}, start=0.4)["schedule"], 4, 0.1)
    [0.2, 0.4, 0.4, 0.2]
    """
    warmup = {"warmup": retraining["warmup"]} if "warmup" in retraining else {}
    return {**retraining, "schedule": functools.partial(allr, start=start, **warmup)}


def _square(values: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2


def plateau(window: int, improvement: float = 0.0) -> Callable[[Sequence[float]], bool]:
    """An early stop: the mean loss of the last `window` steps is not lower than that of the `window` before.

    It must be lower by `improvement`, in nats, for the run to go on.

    Raises ValueError for a window below 1.

    >>> stop = plateau(2)
    >>> stop([4.0, 3.0, 2.0, 1.0]), stop([4.0, 3.0, 3.0, 4.0]), stop([3.0])
    (False, True, False)
    """
    if window < 1:
        raise ValueError(f"window is {window}; a mean needs at least 1 step")

    def stop(losses: Sequence[float]) -> bool:
        if len(losses) < 2 * window:
            return False
        last, before = losses[-window:], losses[-2 * window : -window]
        return not sum(before) / window - sum(last) / window > improvement

    return stop


SCHEDULES: dict[str, Callable[..., float]] = {
    "llr": llr,
    "linear": llr,
    "clr": clr,
    "cosine": clr,
    "constant": constant,
    "ft": constant,
    "slr": slr,
}
_WITH_SETTINGS = {
    "lrw": "functools.partial(pk.lrw, share=T_rt/T, original=…)",
    "allr": "functools.partial(pk.allr, start=pk.allr_start(model, masks, dense, share=T_rt/T))",
}


def factors(schedule: str | Schedule, steps: int, warmup: float) -> list[float]:
    """The factor of the largest rate at every step; a function `schedule(step, steps)` has its own warm-up.

    Raises ValueError for an unknown name, a schedule that needs settings, or a factor that is no rate.

    >>> factors("constant", 3, 0.0)
    [1.0, 1.0, 1.0]
    """
    if callable(schedule):
        found = [float(schedule(step, steps)) for step in range(steps)]
    elif schedule in _WITH_SETTINGS:
        raise ValueError(f"the schedule {schedule!r} needs settings: pass {_WITH_SETTINGS[schedule]}")
    elif schedule in SCHEDULES:
        # FT is a constant rate by definition.
        rising = 0.0 if schedule in ("constant", "ft") else warmup
        found = [SCHEDULES[schedule](step, steps, rising) for step in range(steps)]
    else:
        names = (*SCHEDULES, *_WITH_SETTINGS)
        near = difflib.get_close_matches(str(schedule).lower(), names, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(f"unknown schedule {schedule!r}{hint} The schedules are {', '.join(names)}")
    for step, factor in enumerate(found):
        if not 0 <= factor < math.inf:
            raise ValueError(
                f"the schedule's factor at step {step} is {factor}; it must be finite and not negative"
            )
    return found
