"""The shapes of models that are measured with random weights, so that nothing needs to be downloaded."""

import difflib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def _opt(width: int, layers: int, heads: int, **more: Any) -> tuple[str, dict[str, Any]]:
    shape = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    shape |= {"ffn_dim": 4 * width, "word_embed_proj_dim": width}
    return "opt", {**shape, "vocab_size": 50272, "max_position_embeddings": 2048, **more}


_LLAMA = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32000}
_MISTRAL = {**_LLAMA, "num_key_value_heads": 8, "intermediate_size": 14336, "max_position_embeddings": 32768}

# Each as in the configuration that was published with the weights.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "opt-125m": _opt(768, 12, 12),
    "opt-350m": _opt(1024, 24, 16, word_embed_proj_dim=512, do_layer_norm_before=False),
    "opt-1.3b": _opt(2048, 24, 32),
    "opt-2.7b": _opt(2560, 32, 32),
    "opt-6.7b": _opt(4096, 32, 32),
    "opt-13b": _opt(5120, 40, 40),
    "opt-30b": _opt(7168, 48, 56),
    "llama-2-7b": ("llama", {**_LLAMA, "intermediate_size": 11008, "max_position_embeddings": 4096}),
    "mistral-7b": ("mistral", {**_MISTRAL, "sliding_window": 4096}),
    "mixtral-8x7b": ("mixtral", {**_MISTRAL, "num_local_experts": 8, "num_experts_per_tok": 2}),
}


def check_length(name: str, length: int) -> None:
    """Raise ValueError for an unknown shape, and for more tokens than it has positions.

    >>> check_length("opt-2.7b", 4096)
    Traceback (most recent call last):
    ValueError: length is 4096; opt-2.7b has 2048 positions
    """
    positions = shape(name).max_position_embeddings
    if not 1 <= length <= positions:
        raise ValueError(f"length is {length}; {name} has {positions} positions")


def shape(name: str, layers: int | None = None) -> "PretrainedConfig":
    """The configuration of a model by name, without dropout, cut to its first `layers` blocks if told.

    Raises ValueError for an unknown name and for fewer than one or more layers than there are.

    >>> shape("opt-2.7b").hidden_size, shape("opt-2.7b", layers=2).num_hidden_layers
    (2560, 2)
    """
    if name not in SHAPES:
        near = difflib.get_close_matches(name, SHAPES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(f"unknown shape {name!r}{hint} Valid: {', '.join(SHAPES)}")
    kind, settings = SHAPES[name]
    whole = settings["num_hidden_layers"]
    if layers is not None and not 1 <= layers <= whole:
        raise ValueError(f"layers is {layers}; {name} has {whole}")
    from transformers import AutoConfig

    # A decoder alone has no step before it whose keys and values it would keep.
    return AutoConfig.for_model(
        kind,
        **{**settings, "num_hidden_layers": layers or whole},
        dropout=0.0,
        attention_dropout=0.0,
        use_cache=False,
    )
