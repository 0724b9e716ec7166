"""Adapters in files: they and nothing else of the model, as safetensors."""

import json
from pathlib import Path

from torch import nn

from ..pruning.masks import Masks
from .adapted import Adapter
from .adapters import adapter_parameters, adapters_of, factors_of, install


def save_adapters(model: nn.Module, path: str | Path) -> None:
    """Write the adapters, and nothing else of the model, to a safetensors file.

    Raises ValueError without adapters.

    >>> save_adapters(nn.Linear(2, 2), "adapters.safetensors")
    Traceback (most recent call last):
    ValueError: the model has no adapters to save; attach(model, masks, kind) them first
    """
    from safetensors.torch import save_file

    if not (adapters := adapters_of(model)):
        raise ValueError("the model has no adapters to save; attach(model, masks, kind) them first")
    kinds = {name: [adapter.kind, adapter.scale, adapter.start] for name, adapter in adapters.items()}
    tensors = {name: p.detach().cpu().contiguous() for name, p in adapter_parameters(model).items()}
    save_file(tensors, path, metadata={"format": "perpkit adapters 1", "adapters": json.dumps(kinds)})


def load_adapters(model: nn.Module, masks: Masks | None, path: str | Path) -> dict[str, nn.Parameter]:
    """Attach the adapters of a file written by `save_adapters` in place and return the parameters added.

    Raises ValueError for a file without adapters and for adapters or masks of another model; the model is
    then as it was.

    >>> load_adapters(nn.Linear(2, 2), None, "nothing.safetensors")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: cannot read adapters from 'nothing.safetensors': ...
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != "perpkit adapters 1":
                raise ValueError(f"{str(path)!r} holds no perpkit adapters")
            wanted = {
                name: (Adapter(*settings), *(file.get_tensor(factor) for factor in factors_of(name)))
                for name, settings in json.loads(metadata["adapters"]).items()
            }
    except (SafetensorError, OSError) as error:
        raise ValueError(f"cannot read adapters from {str(path)!r}: {error}") from error
    return install(model, masks, wanted)
