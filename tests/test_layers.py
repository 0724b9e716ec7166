"""Which matrices are prunable: every linear map of a block, nothing else, in any architecture."""

import pytest
import torch
import transformers
from torch import nn

from perpkit.pruning.layers import decoder_blocks, prunable_weights

# Per block: the matrices' names with their shapes at width 32, key-value width 16 and inner width 48.
LLAMA = {
    "self_attn.q_proj": (32, 32),
    "self_attn.k_proj": (16, 32),
    "self_attn.v_proj": (16, 32),
    "self_attn.o_proj": (32, 32),
    "mlp.gate_proj": (48, 32),
    "mlp.up_proj": (48, 32),
    "mlp.down_proj": (32, 48),
}
MATRICES = {
    "opt": {
        **{f"self_attn.{name}": (32, 32) for name in ("q_proj", "k_proj", "v_proj", "out_proj")},
        "fc1": (48, 32),
        "fc2": (32, 48),
    },
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "gemma": LLAMA,
    "gpt2": {
        # Conv1D, stored [in, out]
        "attn.c_attn": (32, 96),
        "attn.c_proj": (32, 32),
        "mlp.c_fc": (32, 128),
        "mlp.c_proj": (128, 32),
    },
    "gpt_neox": {
        "attention.query_key_value": (96, 32),
        "attention.dense": (32, 32),
        "mlp.dense_h_to_4h": (48, 32),
        "mlp.dense_4h_to_h": (32, 48),
    },
    "phi3": {
        "self_attn.qkv_proj": (64, 32),
        "self_attn.o_proj": (32, 32),
        "mlp.gate_up_proj": (96, 32),
        "mlp.down_proj": (32, 48),
    },
    "bloom": {
        "self_attention.query_key_value": (96, 32),
        "self_attention.dense": (32, 32),
        "mlp.dense_h_to_4h": (128, 32),
        "mlp.dense_4h_to_h": (32, 128),
    },
    "falcon": {
        # one key and value head for all queries
        "self_attention.query_key_value": (48, 32),
        "self_attention.dense": (32, 32),
        "mlp.dense_h_to_4h": (128, 32),
        "mlp.dense_4h_to_h": (32, 128),
    },
}
BLOCKS = {
    "opt": "model.decoder.layers",
    **dict.fromkeys(("llama", "mistral", "qwen2", "gemma", "phi3"), "model.layers"),
    **dict.fromkeys(("gpt2", "bloom", "falcon"), "transformer.h"),
    "gpt_neox": "gpt_neox.layers",
}


def test_every_matrix_of_every_block_and_its_shape(any_model):
    kind = any_model.config.model_type
    weights = prunable_weights(any_model)
    assert {name: tuple(weight.shape) for name, weight in weights.items()} == {
        f"{BLOCKS[kind]}.{block}.{name}.weight": shape
        for block in range(2)
        for name, shape in MATRICES[kind].items()
    }


def test_weights_are_the_models_own_parameters(any_model):
    for name, weight in prunable_weights(any_model).items():
        assert weight is any_model.get_parameter(name)


def test_embeddings_head_and_norms_are_not_prunable(any_model):
    prunable = {id(weight) for weight in prunable_weights(any_model).values()}
    assert id(any_model.get_input_embeddings().weight) not in prunable
    assert id(any_model.get_output_embeddings().weight) not in prunable
    rest = {name: p for name, p in any_model.named_parameters() if id(p) not in prunable}
    # what is left in two dimensions are embeddings and the head
    left = {name for name, parameter in rest.items() if parameter.ndim > 1}
    assert all("embed" in name or name.split(".")[-2] in ("wte", "wpe", "lm_head") for name in left), left


def test_matrices_are_ordered_by_block(any_model):
    prefix, _ = decoder_blocks(any_model)
    numbers = [int(name.removeprefix(f"{prefix}.").split(".")[0]) for name in prunable_weights(any_model)]
    assert numbers == sorted(numbers)


def test_blocks_are_the_decoders(any_model):
    name, blocks = decoder_blocks(any_model)
    assert name == BLOCKS[any_model.config.model_type]
    assert blocks is any_model.get_submodule(name)
    assert len(blocks) == 2


def test_a_model_without_blocks_is_refused():
    for model in (nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2))):
        with pytest.raises(ValueError, match=f"found no decoder blocks in a {type(model).__name__}"):
            decoder_blocks(model)


def test_blocks_without_matrices_are_refused(make_model):
    model = make_model("opt")
    model.model.decoder.layers = nn.ModuleList([nn.LayerNorm(32), nn.LayerNorm(32)])
    with pytest.raises(ValueError, match="found no linear layers in the decoder blocks of a OPTForCausalLM"):
        prunable_weights(model)


def test_fused_experts_are_refused_by_name():
    config = transformers.MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=3,
    )
    model = transformers.MixtralForCausalLM(config)
    with pytest.raises(
        ValueError, match=r"model\.layers\.0\.mlp\.experts\.gate_up_proj of shape \(3, 96, 32\)"
    ):
        prunable_weights(model)


def test_the_published_model_has_its_published_number_of_matrices():
    config = transformers.OPTConfig(
        hidden_size=2560,
        num_hidden_layers=32,
        num_attention_heads=32,
        ffn_dim=10240,
        word_embed_proj_dim=2560,
    )
    with torch.device("meta"):
        model = transformers.OPTForCausalLM(config)
    weights = prunable_weights(model)
    assert len(weights) == 32 * 6
    assert sum(weight.numel() for weight in weights.values()) == 32 * (4 * 2560**2 + 2 * 2560 * 10240)
