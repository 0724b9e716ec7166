"""Modules that carry low-rank adapters: the same module, its class exchanged for one that adds them.

The weight stays where it was, under its own name, so masks, `state_dict`, pickling and copies know it; only
reading the attribute (`module.weight`) gives the effective weight.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...pruning.layers import Matrix
from ..subsets import dotted
from .masklora import mask_lora_linear

KINDS = ("lora", "lora_prune", "scale_lora", "mask_lora")
STARTS = ("published", "symmetry_breaking")


@dataclass(frozen=True)
class Adapter:
    """How one weight is adapted; `start` matters to `scale_lora` only."""

    kind: str
    scale: float
    start: str = "published"

    def effective(self, weight: Tensor, mask: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """The weight in training, `[..., out, in]` (section 4 of the methods)."""
        update = b @ a
        if self.kind == "scale_lora":
            return weight * (update if self.start == "published" else 1 + self.scale * update)
        update = self.scale * update
        return weight + (torch.where(mask, update, 0.0) if self.kind == "mask_lora" else update)


class Adapted(nn.Module):
    """What every adapted module can do; the module's own class follows in the order of resolution."""

    plain: ClassVar[type[nn.Module]]
    adapters: dict[str, Adapter]
    formed: dict[str, Tensor]

    def forward(self, *inputs, **named):
        """The module's own function with its effective weights, each formed once."""
        self.formed = {key: self.effective(key) for key in self.adapters}
        try:
            return super().forward(*inputs, **named)
        finally:
            self.formed = {}

    def effective(self, key: str) -> Tensor:
        """The effective weight in the shape and type of the parameter."""
        weight, mask = self.matrices(key)
        # In the weight's own precision also under autocast, which casts the result when it is used.
        with torch.autocast(weight.device.type, enabled=False):
            formed = self.adapters[key].effective(weight, mask, *self.factors(key)).to(weight.dtype)
        parameter = self.raw(key)
        return self.as_matrices(key, formed) if self.swaps(key) else formed.view(parameter.shape)

    def raw(self, key: str) -> Tensor:
        """The parameter itself, which the attribute hides."""
        return self._parameters[key]  # type: ignore[return-value]

    def factors(self, key: str) -> tuple[Tensor, Tensor]:
        """`A` `[..., r, in]` and `B` `[..., out, r]` of one parameter."""
        a, b = factor_names(key)
        return self.raw(a), self.raw(b)

    def matrices(self, key: str) -> tuple[Tensor, Tensor]:
        """The weight and its mask as `[out, in]`, or `[experts, out, in]` for a fused mixture."""
        mask: Tensor = self._buffers[mask_name(key)]  # type: ignore[assignment]
        return self.as_matrices(key, self.raw(key)), self.as_matrices(key, mask)

    def as_matrices(self, key: str, tensor: Tensor) -> Tensor:
        if self.swaps(key):
            return tensor.transpose(-2, -1)
        return tensor if tensor.ndim == self.factors(key)[0].ndim else tensor.flatten(1)

    def swaps(self, key: str) -> bool:
        """Whether the parameter is stored as `[in, out]`."""
        if self.factors(key)[0].ndim == 3:
            return bool(getattr(self, "is_transposed", False))
        return type(self).__name__ == "Conv1D"

    def extra_repr(self) -> str:
        """The module's own description and the adapters'."""
        kinds = {
            f"{adapter.kind}, rank={self.factors(key)[0].shape[-2]}" for key, adapter in self.adapters.items()
        }
        return ", ".join(filter(None, (super().extra_repr(), *sorted(kinds))))

    def __reduce_ex__(self, protocol):
        # The class is made on demand and has no importable name: keep what it was made from.
        return _blank, (self.plain, tuple(self.adapters)), self.__dict__


class AdaptedLinear(Adapted):
    """A linear layer or GPT-2's Conv1D, in which no kind but `scale_lora` keeps an effective weight."""

    def forward(self, x: Tensor) -> Tensor:
        """`x W_effectiveᵀ + b` for `x` `[..., in]`."""
        adapter, (a, b) = self.adapters["weight"], self.factors("weight")
        weight, mask = self.matrices("weight")
        bias = self._parameters["bias"]
        if adapter.kind == "mask_lora":
            return mask_lora_linear(x, weight, mask, a, b, bias, scale=adapter.scale)
        if adapter.kind == "scale_lora":
            return F.linear(x, self.as_matrices("weight", self.effective("weight")), bias)
        low = F.linear(x, a.to(x.dtype))
        return F.linear(x, weight, bias) + adapter.scale * F.linear(low, b.to(low.dtype))


def factor_names(key: str) -> tuple[str, str]:
    """The names of `A` and `B` of a parameter within its module.

    >>> factor_names("weight"), factor_names("down_proj")
    (('lora_A', 'lora_B'), ('down_proj_lora_A', 'down_proj_lora_B'))
    """
    prefix = "" if key == "weight" else f"{key}_"
    return f"{prefix}lora_A", f"{prefix}lora_B"


def mask_name(key: str) -> str:
    """The name of a parameter's mask within its module.

    >>> mask_name("weight")
    'weight_mask'
    """
    return f"{key}_mask"


def adapted_modules(model: nn.Module) -> dict[str, Adapted]:
    """The modules that carry adapters, by name.

    >>> adapted_modules(nn.Linear(2, 2))
    {}
    """
    return {name: module for name, module in model.named_modules() if isinstance(module, Adapted)}


def matrices_of(name: str, module: Adapted, key: str) -> list[Matrix]:
    """The matrices that one adapted parameter holds, one for each expert of a fused mixture."""
    parameter = dotted(name, key)
    count = module.factors(key)[0]
    if count.ndim == 2:
        return [Matrix(parameter, parameter, module)]
    return [Matrix(f"{parameter}[{expert}]", parameter, module, expert) for expert in range(len(count))]


def put_on(module: nn.Module, key: str, adapter: Adapter, mask: Tensor, a: Tensor, b: Tensor) -> None:
    """Give one parameter of a module an adapter, in place; the mask has the parameter's shape."""
    adapters = {**getattr(module, "adapters", {}), key: adapter}
    base: Any = module.plain if isinstance(module, Adapted) else type(module)
    module.adapters, module.formed = adapters, {}  # type: ignore[assignment]
    for name, factor in zip(factor_names(key), (a, b), strict=True):
        module.register_parameter(name, nn.Parameter(factor))
    module.register_buffer(mask_name(key), mask, persistent=False)
    module.__class__ = _adapted_class(base, tuple(adapters))


def take_off(module: Adapted) -> None:
    """Make a module what it was before, in place: its class, parameters and attributes."""
    for key in module.adapters:
        for name in factor_names(key):
            delattr(module, name)
        delattr(module, mask_name(key))
    module.__class__ = module.plain  # type: ignore[assignment]
    del module.adapters, module.formed


@cache
def _adapted_class(base: Any, keys: tuple[str, ...]) -> Any:
    linear = base.forward is nn.Linear.forward or base.__name__ == "Conv1D"
    properties = {key: property(_reader(key)) for key in keys}
    # The name stays: transformers' modules are told apart by it.
    bases = (AdaptedLinear if linear else Adapted, base)
    return type(base.__name__, bases, {"__module__": base.__module__, "plain": base, **properties})


def _reader(key: str) -> Callable[[Adapted], Tensor]:
    return lambda module: module.formed[key] if key in module.formed else module.effective(key)


def _blank(base: Any, keys: tuple[str, ...]) -> Adapted:
    made = _adapted_class(base, keys)
    return made.__new__(made)
