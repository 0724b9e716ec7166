"""Adapters in files: they and nothing else of the model, as safetensors."""

import json
from pathlib import Path

from torch import nn

from ...pruning.masks import Masks
from ..loop.checkpoint import checksum
from .attach import (
    adapter_masks,
    adapter_parameters,
    adapters_of,
    check_fit,
    factors_of,
    install,
    mask_of,
)
from .modules import Adapter

FORMAT = "perpkit adapters 2"


def save_adapters(model: nn.Module, path: str | Path) -> None:
    """Write the adapters, and nothing else of the model, to a safetensors file.

    The file says by a checksum which mask each adapter belongs to.

    Raises ValueError without adapters and for a place that cannot be written.

    >>> save_adapters(nn.Linear(2, 2), "adapters.safetensors")
    Traceback (most recent call last):
    ValueError: the model has no adapters to save; attach(model, masks, kind) them first
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    if not (adapters := adapters_of(model)):
        raise ValueError("the model has no adapters to save; attach(model, masks, kind) them first")
    kinds = {name: [adapter.kind, adapter.scale, adapter.start] for name, adapter in adapters.items()}
    tensors = {name: p.detach().cpu().contiguous() for name, p in adapter_parameters(model).items()}
    metadata = {"adapters": json.dumps(kinds), "masks": json.dumps(checksum(adapter_masks(model)))}
    try:
        save_file(tensors, path, metadata={"format": FORMAT, **metadata})
    except (SafetensorError, OSError) as error:
        raise ValueError(f"cannot write adapters to {str(path)!r}: {error}") from error


def load_adapters(model: nn.Module, masks: Masks | None, path: str | Path) -> dict[str, nn.Parameter]:
    """Attach the adapters of a file written by `save_adapters` in place and return the parameters added.

    Raises ValueError for a file without adapters, for adapters or masks of another model, and for other masks
    than those of the training, which only plain LoRA allows; the model is then as it was.

    >>> load_adapters(nn.Linear(2, 2), None, "nothing.safetensors")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: cannot read adapters from 'nothing.safetensors': ...
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(f"{str(path)!r} holds no perpkit adapters")
            wanted = {
                name: (Adapter(*settings), *(file.get_tensor(factor) for factor in factors_of(name)))
                for name, settings in json.loads(metadata["adapters"]).items()
            }
            belonging = json.loads(metadata["masks"])
    except (SafetensorError, OSError) as error:
        raise ValueError(f"cannot read adapters from {str(path)!r}: {error}") from error
    masks = Masks({}) if masks is None else masks
    check_fit(model, masks, wanted)
    for name, (adapter, *_) in wanted.items():
        mask = mask_of(name, model.get_parameter(name), masks)
        if adapter.kind != "lora" and checksum({name: mask})[name] != belonging[name]:
            raise ValueError(
                f"the adapters of {name!r} were trained with another mask; load them with the masks that "
                "they were attached with"
            )
    return install(model, masks, wanted)
