"""Models of a shape with random weights, made where they are to run."""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ...sources.models import check_device, check_dtype
from .shapes import shape

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def random_model(
    name: str,
    *,
    layers: int | None = None,
    dtype: str | torch.dtype = "bfloat16",
    device: str | None = None,
    seed: int = 0,
) -> "PreTrainedModel":
    """A model of a bundled shape (`SHAPES`) with random weights: it costs what the real one costs.

    It is made on the device at once, in `dtype`; `layers` cuts it to its first blocks. What it says is
    meaningless.

    Raises ValueError for an unknown shape, dtype or device.

    >>> model = random_model("opt-125m", layers=1, device="cpu")
    >>> model.dtype, len(model.model.decoder.layers)
    (torch.bfloat16, 1)
    """
    kind, place = check_dtype(dtype), torch.device(check_device(device))
    model: Any = empty_model(name, layers, kind)
    for module in model.modules():
        for key, parameter in module.named_parameters(recurse=False):
            new = torch.empty(parameter.shape, dtype=kind, device=place)
            setattr(module, key, nn.Parameter(new, parameter.requires_grad))
    model.tie_weights()
    fill(model, seed)
    return model.to(place).eval()


def empty_model(
    name: str, layers: int | None = None, dtype: torch.dtype = torch.float32
) -> "PreTrainedModel":
    """A model of a bundled shape whose parameters take no memory, to be counted.

    >>> sum(parameter.numel() for parameter in empty_model("llama-2-7b").parameters())
    6738415616
    """
    from accelerate import init_empty_weights  # type: ignore[import-untyped]
    from transformers import AutoModelForCausalLM

    config = shape(name, layers)
    # Buffers such as the frequencies of rotary embeddings are computed, not filled.
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    # What was tied has been given empty weights of its own.
    model.tie_weights()
    return model


def retraining_bytes(parameters: int, dtype: str | torch.dtype, *, full: bool) -> int:
    """Bytes that retraining takes at least: the weights, and for all of them what moves them.

    Activations and masks (a byte a weight) come on top.

    >>> retraining_bytes(10, "bfloat16", full=False), retraining_bytes(10, "bfloat16", full=True)
    (20, 220)
    """
    width = check_dtype(dtype).itemsize
    # In float32: a gradient, two moments of Adam, the last good values, and a master of a 16-bit weight.
    beside = 4 + 8 + 4 + (4 if width < 4 else 0)
    return parameters * (width + (beside if full else 0))


@torch.no_grad()
def fill(model: nn.Module, seed: int = 0) -> None:
    """Give a model new random weights in place, of the size that training begins with.

    >>> fill(model := nn.Linear(2, 2)), model.bias.tolist()
    (None, [0.0, 0.0])
    """
    generators: dict[torch.device, torch.Generator] = {}
    for key, parameter in model.named_parameters():
        if parameter.ndim > 1:
            generator = generators.setdefault(
                parameter.device, torch.Generator(parameter.device).manual_seed(seed)
            )
            parameter.normal_(std=0.02, generator=generator)
        else:
            parameter.fill_(float(key.endswith("norm.weight")))
