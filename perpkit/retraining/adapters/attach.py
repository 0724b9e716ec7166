"""Low-rank adapters on pruned layers: attached, found and checked."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ...pruning.masks import Masks
from ..subsets import dotted
from .modules import (
    KINDS,
    STARTS,
    Adapted,
    Adapter,
    adapted_modules,
    factor_names,
    mask_name,
    put_on,
)
from .targets import chosen_matrices, matrices_by_parameter


def attach(
    model: nn.Module,
    masks: Masks | None,
    kind: str,
    rank: int = 16,
    alpha: float = 32.0,
    targets: Iterable[str] | None = None,
    *,
    start: str | None = None,
    seed: int = 0,
) -> dict[str, nn.Parameter]:
    """Attach adapters to a pruned model in place and return the parameters added, by name.

    With `σ = alpha / rank`, `A` `[rank, in]` and `B` `[out, rank]` a layer's effective weight becomes
    `W + σBA` for `"lora"` and `"lora_prune"`, `W + M ⊙ σBA` for `"mask_lora"` (see `mask_lora_linear`), and
    for `"scale_lora"` `W ⊙ BA`, or with `start="symmetry_breaking"` `W ⊙ (1 + σBA)` (PERP; section 4 of the
    methods). `A` is uniform in ±1/√in (Kaiming, a = √5), drawn from `seed`, and `B` zero; the published start
    of `scale_lora` sets all entries to 1/√rank and does not use alpha. Either way the function starts
    unchanged. A convolution is the matrix `[n, c·d·d]`; every expert of a fused mixture has its own factors.

    `targets` are names of modules or parameters or the ends of such names, `["q_proj", "v_proj"]`; None means
    every masked matrix, or every prunable one when `masks` is None. Adapters are float32, or float64 like
    their weight. The weights themselves stay trainable or frozen as they are.

    Raises ValueError for an unknown kind, start or target, a rank or alpha out of range, masks of another
    model or that do not hold, and a layer that has adapters; the model is then as it was.

    >>> import perpkit as pk
    >>> model, _ = pk.load_model("tiny-opt", device="cpu")
    >>> masks = pk.prune(model, "magnitude", sparsity=0.5)
    >>> added = attach(model, masks, "mask_lora", rank=4, targets=["fc1"])
    >>> list(added)[:2]
    ['model.decoder.layers.0.fc1.lora_A', 'model.decoder.layers.0.fc1.lora_B']
    """
    check_kind(kind)
    if start is not None and (kind != "scale_lora" or start not in STARTS):
        raise ValueError(
            f"start={start!r} with kind={kind!r}: only scale_lora has a choice, {' or '.join(STARTS)}"
        )
    if not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank is {rank}; it must be a whole number of at least 1")
    if not 0 < alpha < float("inf"):
        raise ValueError(f"alpha is {alpha}; it must be positive")
    chosen = chosen_matrices(model, masks, targets)
    adapter = Adapter(kind, alpha / rank, start or "published")
    generator = torch.Generator().manual_seed(seed)
    wanted = {}
    for name, matrices in chosen.items():
        shape = matrices[0].view(matrices[0].weight()).shape
        if rank > min(shape):
            raise ValueError(
                f"rank is {rank}, larger than the {shape[0]} x {shape[1]} matrix {name!r}; take at most "
                f"{min(shape)}, or leave this layer out by targets"
            )
        experts = () if matrices[0].expert is None else (len(matrices),)
        wanted[name] = (adapter, *_initial(adapter, (*experts, rank, shape[1]), shape[0], generator))
    return install(model, masks, wanted)


def check_kind(kind: str) -> None:
    """Raise ValueError for an unknown kind of adapter.

    >>> check_kind("mask_lora")
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind of adapter {kind!r}; the kinds are {', '.join(KINDS)}")


def _initial(
    adapter: Adapter, shape: tuple[int, ...], rows: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    *experts, rank, columns = shape
    if adapter.kind == "scale_lora" and adapter.start == "published":
        return torch.full(shape, rank**-0.5), torch.full((*experts, rows, rank), rank**-0.5)
    bound = columns**-0.5
    return torch.empty(shape).uniform_(-bound, bound, generator=generator), torch.zeros(*experts, rows, rank)


def install(
    model: nn.Module, masks: Masks | None, wanted: Mapping[str, tuple[Adapter, Tensor, Tensor]]
) -> dict[str, nn.Parameter]:
    """Attach given factors `A` and `B` by parameter name, in place, and return the parameters added.

    Raises ValueError when masks or factors do not fit the model or a layer has adapters; the model is then as
    it was.

    >>> model = nn.Sequential(nn.Linear(3, 2))
    >>> factors = (Adapter("lora", scale=2.0), torch.ones(1, 3), torch.zeros(2, 1))
    >>> list(install(model, None, {"0.weight": factors}))
    ['0.lora_A', '0.lora_B']
    """
    masks = Masks({}) if masks is None else masks
    check_fit(model, masks, wanted)
    everything = matrices_by_parameter(model)
    for name, (adapter, a, b) in wanted.items():
        module, weight = everything[name][0].module, everything[name][0].weight()
        dtype = torch.promote_types(weight.dtype, torch.float32)
        factors = (factor.detach().to(weight.device, dtype, copy=True) for factor in (a, b))
        mask = mask_of(name, weight, masks)
        if adapter.kind == "mask_lora":
            # The others do not read it until they are merged: it may stay where it is.
            mask = mask.to(weight.device)
        put_on(module, name.rpartition(".")[2], adapter, mask, *factors)
    added = adapter_parameters(model)
    return {name: added[name] for parameter in wanted for name in factors_of(parameter)}


def mask_of(name: str, weight: Tensor, masks: Masks) -> Tensor:
    """The mask of a weight, all True (in the host's memory) where there is none.

    >>> mask_of("weight", torch.zeros(1, 2), Masks({}))
    tensor([[True, True]])
    """
    return masks[name] if name in masks else torch.ones(weight.shape, dtype=torch.bool)


def check_fit(model: nn.Module, masks: Masks, wanted: Mapping[str, tuple[Adapter, Tensor, Tensor]]) -> None:
    """Raise ValueError when masks or factors by parameter name do not fit the model or a layer has adapters.

    >>> factors = (Adapter("lora", scale=2.0), torch.ones(1, 3), torch.zeros(2, 1))
    >>> check_fit(nn.Linear(3, 2), Masks({}), {"weight": factors})
    """
    masks.check(model)
    everything = matrices_by_parameter(model)
    if foreign := set(masks) - set(everything):
        raise ValueError(f"{min(foreign)!r} has a mask but is no prunable matrix; adapters cannot go on it")
    if not wanted:
        raise ValueError("there is nothing to put adapters on: the masks are empty")
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for name, (_, a, b) in wanted.items():
        if name not in everything:
            raise ValueError(f"the adapters belong to another model: this one has no prunable {name!r}")
        first = everything[name][0]
        if isinstance(first.module, Adapted):
            raise ValueError(f"{name.rpartition('.')[0]!r} already has adapters; merge(model) first")
        if len(owners[id(first.weight())]) > 1:
            raise ValueError(
                f"{' and '.join(owners[id(first.weight())])} are one tied matrix; untie them, or name other "
                "targets"
            )
        rows, columns = first.view(first.weight()).shape
        experts = () if first.expert is None else (len(everything[name]),)
        if a.shape != (*experts, a.shape[-2], columns) or b.shape != (*experts, rows, a.shape[-2]):
            raise ValueError(
                f"the adapters belong to another model: A {list(a.shape)} and B {list(b.shape)} do not fit "
                f"{name!r}, {[*experts, rows, columns]}"
            )


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a model's adapters by name, empty without adapters.

    >>> adapter_parameters(nn.Linear(2, 2))
    {}
    """
    names = {name for parameter in adapters_of(model) for name in factors_of(parameter)}
    return {name: parameter for name, parameter in model.named_parameters() if name in names}


def factors_of(parameter: str) -> tuple[str, str]:
    """The names of a parameter's factors `A` and `B` within the model.

    >>> factors_of("fc1.weight")
    ('fc1.lora_A', 'fc1.lora_B')
    """
    module, dot, key = parameter.rpartition(".")
    a, b = factor_names(key)
    return f"{module}{dot}{a}", f"{module}{dot}{b}"


def adapters_of(model: nn.Module) -> dict[str, Adapter]:
    """How each adapted parameter of the model is adapted, by name.

    >>> adapters_of(nn.Linear(2, 2))
    {}
    """
    return {
        dotted(name, key): adapter
        for name, module in adapted_modules(model).items()
        for key, adapter in module.adapters.items()
    }


def adapter_masks(model: nn.Module) -> dict[str, Tensor]:
    """The masks that the model's adapters have, by the parameter that they are of; True = kept.

    >>> adapter_masks(nn.Linear(2, 2))
    {}
    """
    return {
        dotted(name, key): module.get_buffer(mask_name(key))
        for name, module in adapted_modules(model).items()
        for key in module.adapters
    }


def check_adapter_masks(model: nn.Module, masks: Masks) -> None:
    """Raise ValueError for an adapter whose merged weight would not hold the masks.

    Those of LoRA, which are not merged into pruned weights, may be any.

    >>> check_adapter_masks(nn.Linear(2, 2), Masks({}))
    """
    adapters = adapters_of(model)
    for name, mask in adapter_masks(model).items():
        if adapters[name].kind == "lora" or name not in masks:
            continue
        if (mask & ~masks[name].to(mask.device)).any():
            raise ValueError(
                f"the {adapters[name].kind} adapter of {name!r} keeps weights that the masks prune; merge "
                "it, prune again and attach(model, masks, kind) with these masks"
            )
