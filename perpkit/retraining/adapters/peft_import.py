"""LoRA adapters trained with PEFT, taken over so that they can be merged the sparse way."""

import json
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ...pruning.layers import Matrix
from ...pruning.masks import Masks
from .attach import check_kind, install
from .modules import Adapter
from .targets import matrices_by_parameter

if TYPE_CHECKING:
    from peft import PeftModel

# Options of PEFT that make the function another one than W + σBA.
_OTHER_FUNCTION = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "layer_replication",
)
# Initialisations that leave the weights beneath as they are; PiSSA, OLoRA, LoftQ and the like do not.
_HARMLESS_STARTS = (True, False, "gaussian", "eva", "orthogonal")
_FACTOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")


def import_peft(
    model: nn.Module,
    masks: Masks | None,
    source: "PeftModel | str | Path",
    *,
    kind: str = "mask_lora",
    adapter: str = "default",
) -> dict[str, nn.Parameter]:
    """Attach a LoRA trained with PEFT to a plain pruned model in place and return the parameters added.

    `source` is a folder written by `PeftModel.save_pretrained`, or a `PeftModel` around another copy of the
    model, of which the adapter called `adapter` is read. The factors are PEFT's, the scale its `alpha / r`,
    or `alpha / √r` for rank-stabilised LoRA. `kind="mask_lora"` masks the update at once, `"lora_prune"` when
    merged, both to the same weights; `"lora"` keeps PEFT's function. Linear layers, Conv1D, convolutions in
    one group and fused experts (`target_parameters`) are taken over; dropout is not.

    Raises ValueError for a source that is not a plain LoRA or does not fit the model, and for a model that
    still holds PEFT's layers; the model is then as it was.

    >>> import_peft(nn.Linear(2, 2), None, "no_such_folder")
    Traceback (most recent call last):
    ValueError: 'no_such_folder' holds no adapter_config.json; name the folder that save_pretrained wrote
    """
    check_kind(kind)
    if kind == "scale_lora":
        raise ValueError("a LoRA cannot become scale_lora; the kinds are lora, lora_prune, mask_lora")
    if any(hasattr(module, "base_layer") for module in model.modules()):
        raise ValueError(
            "the model still holds PEFT's layers: save the adapter with save_pretrained, take the layers off "
            "with peft_model.unload() and import from the folder, or give a copy made before get_peft_model"
        )
    config, tensors = _read_folder(Path(source)) if isinstance(source, str | Path) else _read(source, adapter)
    _check(config, tensors)
    everything = matrices_by_parameter(model)
    factors: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        match = _FACTOR.fullmatch(key)
        assert match is not None
        factors.setdefault(match["module"], {})[match["factor"]] = tensor
    wanted = {}
    for wrapped, found in factors.items():
        if set(found) != {"A", "B"}:
            raise ValueError(f"the adapter of {wrapped!r} is incomplete: it has only {' '.join(found)}")
        # PEFT wraps a module once for each of its parameters, the inner ones as `base_layer`.
        module = wrapped.replace(".base_layer", "")
        name, a, b = _fitted(module, found["A"], found["B"], everything)
        alpha = _alpha(config, module, name)
        rank = a.shape[-2]
        scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
        wanted[name] = (Adapter(kind, scale), a, b)
    return install(model, masks, wanted)


def _read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            raise ValueError(f"{str(folder)!r} holds no {name}; name the folder that save_pretrained wrote")
    try:
        config = json.loads((folder / "adapter_config.json").read_text())
        return config, load_file(folder / "adapter_model.safetensors")
    except (ValueError, SafetensorError, OSError) as error:
        raise ValueError(f"cannot read the adapter in {str(folder)!r}: {error}") from error


def _read(source: "PeftModel", adapter: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    configs = getattr(source, "peft_config", None)
    if not isinstance(configs, dict):
        raise ValueError(f"the source is a {type(source).__name__}; give a PeftModel or an adapter's folder")
    if adapter not in configs:
        raise ValueError(f"there is no adapter {adapter!r}; the adapters are {', '.join(configs)}")
    from peft import get_peft_model_state_dict

    return configs[adapter].to_dict(), get_peft_model_state_dict(source, adapter_name=adapter)


def _check(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    kind = getattr(config.get("peft_type"), "value", config.get("peft_type"))
    if kind != "LORA":
        raise ValueError(f"the adapter is {kind}; only LORA can be taken over")
    for option in _OTHER_FUNCTION:
        if config.get(option):
            raise ValueError(f"the adapter was trained with {option}, which is not W + σBA; train it without")
    if (start := config.get("init_lora_weights", True)) not in _HARMLESS_STARTS:
        raise ValueError(
            f"init_lora_weights={start!r} changes the weights beneath the adapter, which no longer are the "
            "pruned ones; train it with init_lora_weights=True"
        )
    for key in tensors:
        if not _FACTOR.fullmatch(key):
            raise ValueError(
                f"the adapter holds {key!r}, which is no LoRA factor of a linear layer or convolution; train "
                "it with bias='none', without modules_to_save and not on embeddings or the head"
            )


def _alpha(config: dict[str, Any], *names: str) -> float:
    for pattern, alpha in (config.get("alpha_pattern") or {}).items():
        if any(re.match(rf"(.*\.)?({pattern})$", name) for name in names):
            return float(alpha)
    return float(config["lora_alpha"])


def _fitted(
    module: str, a: torch.Tensor, b: torch.Tensor, everything: dict[str, list[Matrix]]
) -> tuple[str, torch.Tensor, torch.Tensor]:
    """The parameter that two factors belong to, and the factors in its layout."""
    if f"{module}.weight" in everything:
        return f"{module}.weight", a.flatten(1), b.flatten(1)
    for name, matrices in everything.items():
        if name.rpartition(".")[0] != module:
            continue
        rows, columns = matrices[0].view(matrices[0].weight()).shape
        # PEFT stacks all experts in two matrices: in A the expert varies slowest, in B fastest.
        if a.shape[1] == columns and b.shape[0] == rows and len(a) == b.shape[1]:
            experts = len(matrices)
            factor_b = b.reshape(rows, -1, experts).permute(2, 0, 1)
            return name, a.reshape(experts, -1, columns), factor_b
    raise ValueError(
        f"the adapter of {module!r}, A {list(a.shape)} and B {list(b.shape)}, fits no prunable matrix of "
        "this model"
    )
