"""Planting outlier features: the same function, with a few channels much louder than the rest."""

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Which matrices read the output of each normalisation, by architecture.
READERS = {
    "opt": {"self_attn_layer_norm": ("self_attn", "qkv"), "final_layer_norm": ("", "fc1")},
    "llama": {"input_layernorm": ("self_attn", "qkv"), "post_attention_layernorm": ("mlp", "gate_up")},
}
MATRICES = {"qkv": ("q_proj", "k_proj", "v_proj"), "fc1": ("fc1",), "gate_up": ("gate_proj", "up_proj")}


@torch.no_grad()
def plant_outliers(model: "PreTrainedModel", sigma: float = 1.0, seed: int = 0) -> None:
    """Rescale channels between normalisations and the matrices reading them, in place.

    Every gain and shift of a block's normalisations is multiplied per channel by `exp(sigma · N(0, 1))` and
    the reading columns are divided by the same factor, so the function stays as it was (logits equal up to
    rounding) while activations get outlier channels as in large language models. Magnitude pruning sees only
    the shrunken columns; Wanda sees the product, which has not changed.

    Raises ValueError for an architecture whose normalisations are not known, for normalisations that come
    after the block (OPT-350M) and for a negative sigma.

    >>> from perpkit.sources.models import load_model
    >>> model, _ = load_model("tiny-opt", device="cpu")
    >>> plant_outliers(model, sigma=1.0, seed=0)
    """
    if sigma < 0:
        raise ValueError(f"sigma is {sigma}; it must not be negative")
    kind = model.config.model_type
    if kind not in READERS:
        raise ValueError(f"cannot plant outliers in a {kind!r} model; known are {', '.join(READERS)}")
    if not getattr(model.config, "do_layer_norm_before", True):
        # Then the normalised values are the residual stream, which other matrices read too.
        raise ValueError("cannot plant outliers in a model with do_layer_norm_before=False")
    generator = torch.Generator().manual_seed(seed)
    decoder = model.get_decoder()
    for block in decoder.layers:
        for norm_name, (parent, matrices) in READERS[kind].items():
            norm = getattr(block, norm_name)
            factor = torch.exp(sigma * torch.randn(norm.weight.shape, generator=generator))
            factor = factor.to(norm.weight)
            norm.weight *= factor
            if getattr(norm, "bias", None) is not None:
                norm.bias *= factor
            owner = getattr(block, parent) if parent else block
            for matrix in MATRICES[matrices]:
                getattr(owner, matrix).weight /= factor
