"""What the tests of the adapters share: random adapters, and the formulas written out once more."""

import torch
from torch import nn

from perpkit.pruning.prune import prune
from perpkit.retraining.adapters.attach import attach

RANK, ALPHA = 3, 7.5
SIGMA = ALPHA / RANK
# kind, start
VARIANTS = (
    ("lora", None),
    ("lora_prune", None),
    ("mask_lora", None),
    ("scale_lora", "published"),
    ("scale_lora", "symmetry_breaking"),
)


def pruned(model, *, dtype=torch.float32, sparsity=0.5):
    """The model in a type, without dropout and pruned, and its masks."""
    model = model.to(dtype).eval()
    return model, prune(model, "magnitude", sparsity=sparsity)


def attach_random(model, masks, kind, start=None, **options):
    """Attach adapters whose factors are all random and return them."""
    added = attach(model, masks, kind, RANK, ALPHA, start=start, **options)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in added.values():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return added


def names_of_factors(name):
    """The names of A and B beside a parameter."""
    module, _, key = name.rpartition(".")
    prefix = "lora" if key == "weight" else f"{key}_lora"
    return f"{module}.{prefix}_A", f"{module}.{prefix}_B"


def update_of(model, name, a, b):
    """`BA` in the shape and layout of a plain model's parameter."""
    module = model.get_submodule(name.rpartition(".")[0])
    weight = model.get_parameter(name)
    if type(module).__name__ == "Conv1D":
        return torch.einsum("or,ri->io", b, a)
    if isinstance(module, nn.Linear | nn.Conv2d):
        return torch.einsum("or,ri->oi", b, a).reshape(weight.shape)
    return torch.einsum("eor,eri->eoi", b, a)


def effective(kind, start, weight, mask, update):
    """The weight in training, by the table of the methods."""
    if kind == "mask_lora":
        return weight + mask * SIGMA * update
    if kind == "scale_lora":
        return weight * update if start == "published" else weight * (1 + SIGMA * update)
    return weight + SIGMA * update


def outputs(model, inputs):
    """Logits of token windows or images."""
    found = model(inputs)
    return getattr(found, "logits", found)
