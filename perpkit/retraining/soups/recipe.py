"""What the candidates of a soup are made of and by: understood, checked, and told apart from other runs."""

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

from ...pruning.masks import Masks
from ..adapters.attach import attach, check_kind
from ..loop.checkpoint import checksum, identity
from ..loop.retrain import retrain
from ..loop.settings import Settings, check_whole
from ..loop.tasks import Data
from ..subsets import needs_untied_head, subset_parts, untie_head
from .average import tensors_of
from .candidates import VARIED, Candidate, Variation, Vary, variation
from .files import digest

# Keywords of `retrain` that a soup uses itself, or that no process can be sent and no other run told from.
OWN = ("masks", "stop", "on_step", "checkpoint", "checkpoint_every", "accelerator")


@dataclass(frozen=True)
class Recipe:
    """How a soup's candidates are retrained: in what they differ, and the `common` settings.

    `dense` is a copy of the caller's model, and `adapter` has the keywords of `attach`, None without one.
    """

    dense: nn.Module
    data: Data
    variation: Variation
    common: dict[str, Any]
    adapter: dict[str, Any] | None

    def alone(self, steps: int) -> Callable[[int], list[Candidate]]:
        """The only candidate of each cycle of iterative pruning, retrained for so many steps."""

        def one(cycle: int) -> list[Candidate]:
            base = self.variation.base
            return [Candidate(cycle, 1, **{**base, "seed": base["seed"] + cycle - 1, "steps": steps})]

        return one

    def steps(self, name: str) -> int:
        """The steps of a cycle of the baseline: those of one candidate, or of all together."""
        every = [settings["steps"] for settings in self.variation.settings()]
        return sum(every) if name == "imp_m" else self.variation.base["steps"]

    def settings(self, varied: Mapping[str, Any]) -> Settings:
        """All settings of one retraining.

        Raises ValueError naming a bad value.
        """
        known = {**self.common, **varied}
        names = [field.name for field in fields(Settings) if field.init]
        return Settings(**{name: known[name] for name in names if name in known})

    def check(self) -> None:
        """Raise ValueError for whatever `attach` or `retrain` would refuse, on a copy that takes no step."""
        trial = copy.deepcopy(self.dense)
        if self.adapter is not None:
            attach(trial, None, **self.adapter)
        told = {**self.variation.base, **self.common, "progress": False, "cancelled": lambda: True}
        retrain(trial, self.data, masks=Masks({}), **told)

    def identity(self) -> dict[str, str]:
        """Digests of all that the candidates depend on, by a name that an error can say."""
        every = [self.settings(varied) for varied in (self.variation.base, *self.variation.settings())]
        data = self.data if isinstance(self.data, tuple) else (self.data,)
        same = identity(every[0], self.dense, {}, Masks({}), data)
        same["learning rates"] = digest([settings.rates for settings in every])
        same |= {"m": str(len(self.variation.values)), "adapter": str(self.adapter)}
        same["vary"] = f"{self.variation.name} {list(self.variation.values)}"
        if (teacher := self.common.get("distill")) is not None:
            softness = [self.common.get(name) for name in ("distill_weight", "temperature")]
            same["distillation"] = digest((softness, checksum(tensors_of(teacher))))
        return same


def recipe(
    model: nn.Module,
    data: Data,
    m: int,
    vary: Vary,
    seed: int,
    adapter: str | None,
    rank: int,
    alpha: float,
    retraining: Mapping[str, Any],
) -> Recipe:
    """Understand how candidates are to be retrained; the model is copied and not changed.

    Raises ValueError for what cannot be done, as `sms` says.

    >>> data = torch.zeros(4, 2), torch.arange(4) % 3
    >>> made = recipe(nn.Linear(2, 3), data, 2, "lr", 0, None, 1, 1.0, {"subset": "full", "lr": 0.1})
    >>> [candidate.lr for candidate in made.variation.candidates(cycle=1)]
    [0.05, 0.2]
    """
    check_whole(m=m, seed=seed)
    if m < 1:
        raise ValueError(f"m is {m}; a soup has at least 1 candidate")
    for name in OWN:
        if name in retraining:
            raise ValueError(f"a soup takes no {name!r} for its retrainings; leave it out")
    # Missing ones are refused in the words of a call of `retrain`.
    call = inspect.signature(retrain).bind(model, data, masks=Masks({}), **{"seed": seed, **retraining})
    call.apply_defaults()
    base = {name: call.arguments[name] for name in VARIED}
    common = {name: value for name, value in retraining.items() if name not in VARIED}
    attached = _adapter(adapter, rank, alpha, common["subset"])
    dense = copy.deepcopy(model)
    if needs_untied_head(common["subset"]):
        # Before all else: every file of the soup then has the same tensors.
        untie_head(dense)
    # What all candidates have in common first: the values of a bad base would be bad in other words.
    Recipe(dense, data, Variation("seed", (seed,), base), common, attached).check()
    made = Recipe(dense, data, variation(vary, m, base), common, attached)
    for settings in (*made.variation.settings(), {**base, "steps": made.steps("imp_m")}):
        made.settings(settings)
    return made


def pruning_identity(calibration: torch.Tensor | None, pruning: Mapping[str, Any]) -> dict[str, str]:
    """Digests of what pruning depends on beside the model; callbacks do not count.

    >>> sorted(pruning_identity(None, {"group": "row"}))
    ['calibration', 'pruning']
    """
    seen = None if calibration is None else checksum({"calibration": calibration})
    options = {name: value for name, value in sorted(pruning.items()) if not callable(value)}
    return {"calibration": digest(seen), "pruning": digest(options)}


def held_out_identity(score: Callable[[nn.Module], float] | None, validation: Data | None) -> str:
    """A digest of what a greedy soup is chosen by: the held-out data, or the name of a function.

    >>> held_out_identity(None, torch.zeros(2)) == held_out_identity(None, torch.ones(2))
    False
    """
    if validation is None:
        named: Any = score if hasattr(score, "__qualname__") else type(score)
        return f"{named.__module__}.{named.__qualname__}"
    parts = validation if isinstance(validation, tuple) else (validation,)
    return digest(checksum({str(number): part for number, part in enumerate(parts)}))


def _adapter(kind: str | None, rank: int, alpha: float, subset: str) -> dict[str, Any] | None:
    """The keywords of `attach`."""
    with_lora = "lora" in subset_parts(subset)
    if kind is None:
        if with_lora:
            raise ValueError(f"subset={subset!r} trains adapters; say which, adapter='mask_lora'")
        return None
    check_kind(kind)
    if kind == "lora":
        raise ValueError(
            "'lora' cannot be merged into pruned weights and so not be averaged; use 'mask_lora'"
        )
    if not with_lora:
        raise ValueError(f"adapter={kind!r} is not trained by subset={subset!r}; want subset='lora'")
    return {"kind": kind, "rank": rank, "alpha": alpha}
