"""Adapters merged into their weights, the pruned ones exactly zero."""

import pandas as pd
import torch
from torch import Tensor, nn

from ...pruning.layers import Matrix, is_language_model
from ...pruning.masks import Masks
from ...sources.text import check_windows
from ..loop.evaluating import evaluating
from .attach import adapter_masks, adapters_of
from .modules import Adapted, Adapter, adapted_modules, mask_name, matrices_of, take_off

# Token windows of a probe that go through the model at once.
PROBED = 8


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
    >>> _ = pk.attach(model, masks, "mask_lora", targets=["layers.0.fc1"])
    >>> merge(model).to_dict("records")
    [{'matrix': 'model.decoder.layers.0.fc1.weight', 'kind': 'mask_lora', 'change': 0.0}]
    """
    modules = adapted_modules(model)
    if not modules:
        raise ValueError("the model has no adapters to merge; attach(model, masks, kind) them first")
    masks = adapter_masks(model)
    for parameter, adapter in adapters_of(model).items():
        if adapter.kind == "lora" and not masks[parameter].all():
            raise ValueError(
                f"{parameter!r} is pruned, and its merged weight W + σBA would be dense. Keep the adapters "
                "beside the model (save_adapters), or attach 'mask_lora' or 'lora_prune' instead, whose "
                "merged weights stay sparse"
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
    weight = matrix.view(matrix.weight())
    mask = matrix.view(module.get_buffer(mask_name(key))).to(weight.device)
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
        check_windows(model, probe)
    device = next(model.parameters()).device
    with evaluating(model):
        parts = (part.to(device) for part in probe.split(PROBED))
        found = [model(input_ids=part, use_cache=False) if language else model(part) for part in parts]
    return [getattr(output, "logits", output).float().cpu() for output in found]
