"""Which matrices of a model are prunable, and each of them seen as `[out, in]`."""

import re
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

# The 3-D parameters of fused mixture experts in transformers, in the order in which data passes them.
FUSED = ("gate_up_proj", "down_proj")


@dataclass(frozen=True)
class Matrix:
    """One prunable matrix `[out, in]`: which parameter of which module it lies in, and how.

    `name` is the parameter's name, for one expert of a fused mixture with its number, `….down_proj[3]`. A
    convolution `[n, c, d, d]` is the matrix `[n, c·d·d]`; GPT-2's Conv1D is stored transposed.
    """

    name: str
    parameter: str
    module: nn.Module
    expert: int | None = None

    def weight(self) -> nn.Parameter:
        """The parameter that the matrix lies in."""
        # Not by attribute: an adapter puts the effective weight in its place.
        return dict(self.module.named_parameters(recurse=False))[self.parameter.rpartition(".")[2]]

    def part(self, tensor: torch.Tensor) -> torch.Tensor:
        """The part of a tensor of the parameter's shape that is this matrix, as it is stored."""
        return tensor if self.expert is None else tensor[self.expert]

    def view(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the parameter's shape, such as its mask, seen as this matrix `[out, in]`."""
        part = self.part(tensor)
        return part.t() if self._transposed() else part.flatten(1)

    @torch.no_grad()
    def assign(self, tensor: torch.Tensor, values: torch.Tensor) -> None:
        """Write a matrix `[out, in]` into its place in a tensor of the parameter's shape, in place."""
        part = self.part(tensor)
        part.copy_(values.t() if self._transposed() else values.reshape(part.shape))

    def _transposed(self) -> bool:
        if self.expert is not None:
            return bool(getattr(self.module, "is_transposed", False))
        return type(self.module).__name__ == "Conv1D"


def is_language_model(model: nn.Module) -> bool:
    """Whether the model reads tokens.

    >>> is_language_model(nn.Linear(2, 2))
    False
    """
    return getattr(_text_config(model), "vocab_size", None) is not None


def _text_config(model: nn.Module):
    """The configuration of a transformers model's text part; None for other models."""
    config = getattr(model, "config", None)
    return config.get_text_config() if config is not None and hasattr(config, "get_text_config") else None


def decoder_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The qualified name and the list of a language model's decoder blocks.

    Raises ValueError when the model has none.

    >>> import perpkit as pk
    >>> model, _ = pk.load_model("tiny-opt", device="cpu")
    >>> name, blocks = decoder_blocks(model)
    >>> name, len(blocks)
    ('model.decoder.layers', 3)
    """
    depth = getattr(_text_config(model), "num_hidden_layers", None)
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return name, module
    raise ValueError(f"found no decoder blocks in a {type(model).__name__}")


def block_name(parameter: str) -> str:
    """The block that a parameter belongs to: its name up to the first number, else its module's name.

    >>> block_name("model.layers.12.mlp.experts.3.w1.weight"), block_name("conv1.weight")
    ('model.layers.12', 'conv1')
    """
    found = re.match(r"(?:.*?\.)?\d+(?=\.)", parameter)
    return found[0] if found else parameter.rpartition(".")[0]


def prunable_matrices(model: nn.Module) -> dict[str, Matrix]:
    """Every prunable matrix by name, in the order of the model.

    Of a language model these are the linear maps inside the decoder blocks, each expert of a fused mixture
    one matrix; embeddings, head and the routers of mixtures are not prunable (PERP and Wanda prune exactly
    these). Of any other model they are the weights of all linear layers and convolutions (section 1 of the
    methods: everything but biases and normalisations), transposed ones aside.

    Raises ValueError when there are none, and for a parameter of a decoder block that holds several matrices
    in a way that is not known.

    >>> import perpkit as pk
    >>> model, _ = pk.load_model("tiny-opt", device="cpu")
    >>> matrices = prunable_matrices(model)
    >>> len(matrices), list(matrices)[0]
    (18, 'model.decoder.layers.0.self_attn.k_proj.weight')
    """
    language = is_language_model(model)
    prefix, root = decoder_blocks(model) if language else ("", model)
    found = []
    for path, module in root.named_modules():
        name = ".".join(filter(None, (prefix, path)))
        if isinstance(module, nn.Linear | _ConvNd) or type(module).__name__ == "Conv1D":
            if not isinstance(module, _ConvTransposeNd):
                found.append(Matrix(_join(name, "weight"), _join(name, "weight"), module))
        elif language:
            found += _fused_experts(name, module)
    # What several modules share is one matrix, under the name that the model gives it, or none: an embedding.
    own = dict(model.named_parameters())
    found = [matrix for matrix in found if matrix.parameter in own]
    if not found:
        where = "the decoder blocks of " if language else ""
        raise ValueError(
            f"found no linear layers{'' if language else ' or convolutions'} in {where}a "
            f"{type(model).__name__}"
        )
    return {matrix.name: matrix for matrix in found}


def _fused_experts(name: str, module: nn.Module) -> list[Matrix]:
    several = {key: p for key, p in module.named_parameters(recurse=False) if p.ndim > 2}
    # A class without `is_transposed` routes and lays out its experts in a way of its own, as Llama 4's does.
    known = FUSED if hasattr(module, "is_transposed") else ()
    if unknown := set(several) - set(known):
        key = min(unknown)
        raise ValueError(
            f"{_join(name, key)} of shape {tuple(several[key].shape)} holds several matrices in one, and a "
            f"{type(module).__name__} is not known: of mixtures of experts those with the parameters "
            f"{' and '.join(FUSED)} can be pruned that transformers lays out like Mixtral's"
        )
    return [
        Matrix(f"{_join(name, key)}[{expert}]", _join(name, key), module, expert)
        for key in FUSED
        if key in several
        for expert in range(len(several[key]))
    ]


def _join(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key
