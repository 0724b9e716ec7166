"""A model's modes and flags while it is retrained, and as they were afterwards."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..batchnorm import batchnorms, frozen_batchnorms
from ..subsets import dotted, subset_parts


@contextmanager
def training(
    model: nn.Module, trained: dict[str, nn.Parameter], subset: str
) -> Iterator[dict[str, torch.Tensor]]:
    """Inside, only the trained parameters get gradients; yields the statistics that move with them, by name.

    >>> model = nn.Linear(2, 1).eval()
    >>> with training(model, {"bias": model.bias}, "biases"):
    ...     model.training, model.weight.requires_grad, model.bias.requires_grad
    (True, False, True)
    >>> model.training, model.weight.requires_grad
    (False, True)
    """
    modes = [(module, module.training) for module in model.modules()]
    flags = [(p, p.requires_grad) for p in model.parameters()]
    frozen = frozen_batchnorms(model, subset_parts(subset), trained)
    try:
        model.train()
        for layer in frozen:
            layer.eval()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trained)
        yield {
            dotted(prefix, name): buffer
            for prefix, layer in batchnorms(model).items()
            if layer not in frozen
            for name, buffer in layer.named_buffers()
        }
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
            parameter.grad = None


def has_gradient_checkpointing(model: nn.Module) -> bool:
    """Whether a model can compute its activations again in the backward pass.

    >>> has_gradient_checkpointing(nn.Linear(2, 1))
    False
    """
    return bool(_checkpointed(model))


def check_gradient_checkpointing(model: nn.Module, wanted: bool) -> None:
    """Raise ValueError when gradient checkpointing is wanted of a model that has none.

    >>> check_gradient_checkpointing(nn.Linear(2, 1), wanted=False)
    """
    if wanted and not has_gradient_checkpointing(model):
        raise ValueError(f"a {type(model).__name__} has no gradient checkpointing; leave checkpointing=False")


@contextmanager
def gradient_checkpointing(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Inside, a model of transformers computes its activations again in the backward pass.

    >>> import perpkit as pk
    >>> model, _ = pk.load_model("tiny-opt", device="cpu")
    >>> with gradient_checkpointing(model, wanted=True):
    ...     model.model.decoder.layers[0].gradient_checkpointing
    True
    >>> model.model.decoder.layers[0].gradient_checkpointing
    False
    """
    modules = [module for module in _checkpointed(model) if not module.gradient_checkpointing]
    if not wanted:
        modules = []
    before = [dict(vars(module)) for module in modules]
    try:
        for module in modules:
            # The flags of transformers 5 themselves: its methods for them change names with its versions.
            # The reentrant kind needs inputs that require gradients, which frozen embeddings do not give.
            module.gradient_checkpointing = True  # type: ignore[assignment]
            module._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)  # type: ignore[assignment]
        yield
    finally:
        for module, attributes in zip(modules, before, strict=True):
            for name in ("gradient_checkpointing", "_gradient_checkpointing_func"):
                if name in attributes:
                    setattr(module, name, attributes[name])
                else:
                    delattr(module, name)


def _checkpointed(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]
