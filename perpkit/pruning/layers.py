"""Which parts of a model are decoder blocks and prunable matrices."""

from torch import nn


def decoder_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The qualified name and the list of a language model's decoder blocks.

    Raises ValueError when the model has none.

    >>> import perpkit as pk
    >>> model, _ = pk.load_model("tiny-opt", device="cpu")
    >>> name, blocks = decoder_blocks(model)
    >>> name, len(blocks)
    ('model.decoder.layers', 3)
    """
    depth = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return name, module
    raise ValueError(f"found no decoder blocks in a {type(model).__name__}")


def prunable_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every linear weight inside the decoder blocks, by parameter name; embeddings and head are not prunable.

    A weight keeps the layout its layer stores it in: `[out, in]` for `nn.Linear`, `[in, out]` for the
    `Conv1D` of GPT-2. Source: PERP and Wanda prune exactly these.

    Raises ValueError when the model has no decoder blocks, no linear layers in them, or fused experts.

    >>> import perpkit as pk
    >>> model, _ = pk.load_model("tiny-opt", device="cpu")
    >>> weights = prunable_weights(model)
    >>> len(weights), list(weights)[0]
    (18, 'model.decoder.layers.0.self_attn.k_proj.weight')
    """
    prefix, blocks = decoder_blocks(model)
    weights = {
        f"{prefix}.{name}.weight": module.weight
        for name, module in blocks.named_modules()
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    }
    for name, parameter in blocks.named_parameters():
        if parameter.ndim > 2:
            raise ValueError(
                f"{prefix}.{name} of shape {tuple(parameter.shape)} holds several matrices in one, as fused "
                "mixtures of experts do; these models cannot be pruned yet"
            )
    if not weights:
        raise ValueError(f"found no linear layers in the decoder blocks of a {type(model).__name__}")
    return weights
