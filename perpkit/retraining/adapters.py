"""Low-rank adapters on pruned layers: attach and merge."""

from collections.abc import Iterable, Mapping

import pandas as pd
import torch
from torch import Tensor, nn

from ..pruning.layers import Matrix, is_language_model
from ..pruning.masks import Masks
from ..sources.text import check_windows
from .adapted import (
    KINDS,
    STARTS,
    Adapted,
    Adapter,
    adapted_modules,
    factor_names,
    mask_name,
    matrices_of,
    put_on,
    take_off,
)
from .adapter_targets import chosen_matrices, matrices_by_parameter

# Token windows of a probe that go through the model at once.
PROBED = 8


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
    for name, (adapter, a, b) in wanted.items():
        module, weight = everything[name][0].module, everything[name][0].weight()
        dtype = torch.promote_types(weight.dtype, torch.float32)
        mask = masks[name] if name in masks else torch.ones_like(weight, dtype=torch.bool)
        factors = (factor.detach().to(weight.device, dtype, copy=True) for factor in (a, b))
        put_on(module, name.rpartition(".")[2], adapter, mask.to(weight.device), *factors)
    added = adapter_parameters(model)
    return {name: added[name] for parameter in wanted for name in factors_of(parameter)}


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
        f"{name}.{key}" if name else key: adapter
        for name, module in adapted_modules(model).items()
        for key, adapter in module.adapters.items()
    }


@torch.no_grad()
def merge(model: nn.Module, probe: Tensor | None = None) -> pd.DataFrame:
    """Merge the adapters into the weights in place, make the model plain again and report what changed.

    Every merged weight is its effective weight with the pruned entries exactly zero: `W + M ⊙ σBA` for
    `"lora_prune"` and `"mask_lora"`, `W ⊙ BA` for `"scale_lora"`. The columns are matrix, kind and change,
    `‖merged − in training‖_F / ‖in training‖_F`: zero for all kinds but `"lora_prune"`, up to the rounding of
    a weight in 16 bits. With a `probe`, token windows `[n, length]` or another model's inputs `[n, ...]`, a
    last row `"logits"` has the relative change of the model's outputs on it.

    Raises ValueError without adapters, for `"lora"` on a pruned layer, whose sum would be dense, and when a
    pruned weight is not zero; the model is then as it was.

    >>> import perpkit as pk
    >>> model, _ = pk.load_model("tiny-opt", device="cpu")
    >>> masks = pk.prune(model, "magnitude", sparsity=0.5)
    >>> _ = attach(model, masks, "mask_lora", targets=["layers.0.fc1"])
    >>> merge(model).to_dict("records")
    [{'matrix': 'model.decoder.layers.0.fc1.weight', 'kind': 'mask_lora', 'change': 0.0}]
    """
    modules = adapted_modules(model)
    if not modules:
        raise ValueError("the model has no adapters to merge; attach(model, masks, kind) them first")
    masks = {}
    for name, module in modules.items():
        for key, adapter in module.adapters.items():
            parameter = f"{name}.{key}" if name else key
            masks[parameter] = mask = module.get_buffer(mask_name(key))
            if adapter.kind == "lora" and not mask.all():
                raise ValueError(
                    f"{parameter!r} is pruned, and its merged weight W + σBA would be dense. Keep the "
                    "adapters beside the model (save_adapters), or attach 'mask_lora' or 'lora_prune' "
                    "instead, whose merged weights stay sparse"
                )
    Masks(masks).check(model)
    before = _outputs(model, probe)
    rows = []
    for name, module in modules.items():
        for key, adapter in module.adapters.items():
            for matrix in matrices_of(name, module, key):
                rows.append((matrix.name, adapter.kind, _merge(matrix, module, key, adapter)))
        take_off(module)
    Masks(masks).check(model)
    if probe is not None:
        after = _outputs(model, probe)
        change = sum(float((a - b).norm() ** 2) for a, b in zip(after, before, strict=True)) ** 0.5
        rows.append(("logits", "", change / sum(float(b.norm() ** 2) for b in before) ** 0.5))
    return pd.DataFrame(rows, columns=["matrix", "kind", "change"])


def _merge(matrix: Matrix, module: Adapted, key: str, adapter: Adapter) -> float:
    """Merge one matrix in place and return the relative change."""
    factors = module.factors(key)
    a, b = factors if matrix.expert is None else (factor[matrix.expert] for factor in factors)
    weight, mask = matrix.view(matrix.weight()), matrix.view(module.get_buffer(mask_name(key)))
    trained = adapter.effective(weight.to(a.dtype), mask, a, b)
    matrix.assign(matrix.weight(), torch.where(mask, trained, 0.0))
    norm = trained.norm()
    return float((matrix.view(matrix.weight()).to(a.dtype) - trained).norm() / norm) if norm else 0.0


def _outputs(model: nn.Module, probe: Tensor | None) -> list[Tensor]:
    """The model's float outputs on a probe, a few at a time, in evaluation mode."""
    if probe is None:
        return []
    language = is_language_model(model)
    if language:
        check_windows(model, probe)  # type: ignore[arg-type]
    modes = [(module, module.training) for module in model.modules()]
    device = next(model.parameters()).device
    model.eval()
    try:
        parts = (part.to(device) for part in probe.split(PROBED))
        found = [model(input_ids=part, use_cache=False) if language else model(part) for part in parts]
    finally:
        for module, mode in modes:
            module.training = mode
    return [getattr(output, "logits", output).float().cpu() for output in found]
