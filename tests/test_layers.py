"""Which matrices are prunable: every linear map of a block, nothing else, in any architecture."""

import pytest
import torch
import transformers
from torch import nn

from perpkit.pruning.layers import (
    Matrix,
    block_name,
    decoder_blocks,
    is_language_model,
    prunable_matrices,
)

# Per block: the matrices' names and shapes [out, in] at width 32, key-value width 16, inner width 48.
LLAMA = {
    "self_attn.q_proj": (32, 32),
    "self_attn.k_proj": (16, 32),
    "self_attn.v_proj": (16, 32),
    "self_attn.o_proj": (32, 32),
    "mlp.gate_proj": (48, 32),
    "mlp.up_proj": (48, 32),
    "mlp.down_proj": (32, 48),
}
ATTENTION = {name: shape for name, shape in LLAMA.items() if "self_attn" in name}


def experts(count, inner):
    """The matrices of a fused mixture."""
    shapes = {"gate_up_proj": (2 * inner, 32), "down_proj": (32, inner)}
    return {f"mlp.experts.{key}[{i}]": shape for key, shape in shapes.items() for i in range(count)}


MATRICES = {
    "opt": {
        **{f"self_attn.{name}": (32, 32) for name in ("q_proj", "k_proj", "v_proj", "out_proj")},
        "fc1": (48, 32),
        "fc2": (32, 48),
    },
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gemma": LLAMA,
    "gemma2": LLAMA,
    "gemma3_text": LLAMA,
    "mixtral": {**ATTENTION, **experts(4, 48)},
    "qwen3_moe": {**ATTENTION, **experts(6, 24)},
    "gpt2": {
        # Conv1D, stored [in, out]
        "attn.c_attn": (96, 32),
        "attn.c_proj": (32, 32),
        "mlp.c_fc": (128, 32),
        "mlp.c_proj": (32, 128),
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
    **dict.fromkeys(MATRICES, "model.layers"),
    "opt": "model.decoder.layers",
    **dict.fromkeys(("gpt2", "bloom", "falcon"), "transformer.h"),
    "gpt_neox": "gpt_neox.layers",
}


# --- which ------------------------------------------------------------------------------------------


def test_every_matrix_of_every_block_and_its_shape(any_model):
    kind = any_model.config.model_type
    matrices = prunable_matrices(any_model)
    assert {name: tuple(matrix.view(matrix.weight()).shape) for name, matrix in matrices.items()} == {
        f"{BLOCKS[kind]}.{block}.{name}" + ("" if name.endswith("]") else ".weight"): shape
        for block in range(2)
        for name, shape in MATRICES[kind].items()
    }
    assert all(name == matrix.name for name, matrix in matrices.items())


def test_every_vision_matrix_and_its_shape(make_vision):
    shapes = {
        n: tuple(m.view(m.weight()).shape) for n, m in prunable_matrices(make_vision("sequential")).items()
    }
    assert shapes == {"0.weight": (8, 27), "3.weight": (12, 18), "7.weight": (10, 48)}
    assert len(prunable_matrices(make_vision("cifar"))) == 20


def test_only_biases_norms_and_scales_of_a_vision_model_are_left(any_vision):
    matrices = prunable_matrices(any_vision)
    left = {name: p for name, p in any_vision.named_parameters() if name not in matrices}
    assert all(parameter.ndim == 1 for parameter in left.values()), left.keys()


def test_weights_are_the_models_own_parameters(any_model):
    for matrix in prunable_matrices(any_model).values():
        assert matrix.weight() is any_model.get_parameter(matrix.parameter)


def test_embeddings_head_norms_and_routers_are_not_prunable(any_model):
    prunable = {id(matrix.weight()) for matrix in prunable_matrices(any_model).values()}
    assert id(any_model.get_input_embeddings().weight) not in prunable
    assert id(any_model.get_output_embeddings().weight) not in prunable
    rest = {name: p for name, p in any_model.named_parameters() if id(p) not in prunable}
    # what is left in two dimensions are embeddings, the head and routers
    left = {name for name, parameter in rest.items() if parameter.ndim > 1}
    known = ("wte", "wpe", "lm_head", "gate")
    assert all("embed" in name or name.split(".")[-2] in known for name in left), left


def test_matrices_are_ordered_by_block(any_model):
    prefix, _ = decoder_blocks(any_model)
    numbers = [int(name.removeprefix(f"{prefix}.").split(".")[0]) for name in prunable_matrices(any_model)]
    assert numbers == sorted(numbers)


def test_blocks_are_the_decoders(any_model):
    name, blocks = decoder_blocks(any_model)
    assert name == BLOCKS[any_model.config.model_type]
    assert blocks is any_model.get_submodule(name)
    assert len(blocks) == 2


def test_tokens_or_pictures(make_model, make_vision):
    assert is_language_model(make_model("gpt2"))
    assert not any(is_language_model(make_vision(kind)) for kind in ("resnet", "convnext", "sequential"))


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
    matrices = prunable_matrices(model)
    assert len(matrices) == 32 * 6
    assert sum(m.weight().numel() for m in matrices.values()) == 32 * (4 * 2560**2 + 2 * 2560 * 10240)


def test_a_shared_weight_is_one_matrix_and_a_shared_embedding_none(make_model):
    one, two = nn.Linear(3, 3), nn.Linear(3, 3)
    two.weight = one.weight
    assert list(prunable_matrices(nn.Sequential(one, nn.ReLU(), two, one))) == ["0.weight"]
    model = make_model("opt", ffn_dim=64)
    model.model.decoder.layers[1].fc1.weight = model.get_input_embeddings().weight
    names = list(prunable_matrices(model))
    assert len(names) == 11
    assert "model.decoder.layers.1.fc1.weight" not in names


# --- seen as [out, in] ------------------------------------------------------------------------------


@torch.no_grad()
def test_the_view_is_what_multiplies_the_inputs(any_model, windows):
    """The output of every plain layer is its input times the transposed view, plus its bias."""
    seen = {}
    for name, matrix in prunable_matrices(any_model).items():
        if matrix.expert is None:
            matrix.module.register_forward_hook(
                lambda _, x, y, name=name: seen.update({name: (x[0], y.clone())})  # Falcon adds to y in place
            )
    any_model(windows[:2])
    assert seen
    for name, (x, y) in seen.items():
        matrix = prunable_matrices(any_model)[name]
        bias = 0 if matrix.module.bias is None else matrix.module.bias
        torch.testing.assert_close(x @ matrix.view(matrix.weight()).T + bias, y)


def test_what_is_assigned_is_viewed(any_model):
    for number, matrix in enumerate(prunable_matrices(any_model).values()):
        before = matrix.weight().detach().clone()
        values = torch.full_like(matrix.view(before), float(number)).cumsum(1)
        matrix.assign(matrix.weight(), values)
        assert torch.equal(matrix.view(matrix.weight()), values)
        if matrix.expert is not None:
            others = [i for i in range(len(before)) if i != matrix.expert]
            assert torch.equal(matrix.weight()[others], before[others])


def test_a_convolution_is_flattened_in_the_order_of_its_weight():
    layer = nn.Conv2d(2, 3, (1, 2))
    matrix = prunable_matrices(nn.Sequential(layer))["0.weight"]
    assert torch.equal(matrix.view(matrix.weight()), layer.weight.reshape(3, 4))
    target = torch.zeros(3, 2, 1, 2)
    matrix.assign(target, torch.arange(12.0).view(3, 4))
    assert target.flatten().tolist() == list(range(12))


def test_a_transposed_mixture(make_model):
    """GPT-OSS stores its experts [in, out]."""
    shape = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 24, "num_local_experts": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    config = transformers.AutoConfig.for_model("gpt_oss", vocab_size=64, **shape, **heads)
    matrices = prunable_matrices(transformers.AutoModelForCausalLM.from_config(config))
    stored = matrices["model.layers.0.mlp.experts.gate_up_proj[2]"]
    assert stored.weight().shape == (3, 32, 48)
    assert torch.equal(stored.view(stored.weight()), stored.weight()[2].T)
    down = matrices["model.layers.0.mlp.experts.down_proj[0]"]
    assert down.view(down.weight()).shape == (32, 24)


def test_the_parameter_is_found_where_an_adapter_shadows_it():
    layer = nn.Linear(2, 2)
    vars(layer)["weight"] = torch.zeros(2, 2)
    assert Matrix("weight", "weight", layer).weight() is layer._parameters["weight"]


@pytest.mark.parametrize(
    ("parameter", "block"),
    [
        ("model.layers.12.mlp.experts.3.w1.weight", "model.layers.12"),
        ("model.layers.0.mlp.experts.down_proj[3]", "model.layers.0"),
        ("layer1.2.conv1.weight", "layer1.2"),
        ("conv1.weight", "conv1"),
        ("0.weight", "0"),
        ("weight", ""),
    ],
)
def test_the_block_of_a_parameter(parameter, block):
    assert block_name(parameter) == block


# --- what is refused --------------------------------------------------------------------------------


def test_a_model_without_blocks_is_refused():
    for model in (nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2))):
        with pytest.raises(ValueError, match=f"found no decoder blocks in a {type(model).__name__}"):
            decoder_blocks(model)


def test_blocks_without_matrices_are_refused(make_model):
    model = make_model("opt")
    model.model.decoder.layers = nn.ModuleList([nn.LayerNorm(32), nn.LayerNorm(32)])
    with pytest.raises(ValueError, match="found no linear layers in the decoder blocks of a OPTForCausalLM"):
        prunable_matrices(model)


def test_a_network_without_matrices_is_refused():
    with pytest.raises(ValueError, match="found no linear layers or convolutions in a Sequential"):
        prunable_matrices(nn.Sequential(nn.BatchNorm2d(3)))


def test_a_mixture_laid_out_in_its_own_way_is_refused_by_name():
    shape = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 24, "num_local_experts": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size_mlp": 24}
    config = transformers.Llama4TextConfig(vocab_size=64, **shape, **heads)
    model = transformers.Llama4ForCausalLM(config)
    with pytest.raises(ValueError, match=r"feed_forward\.experts\.\w+_proj of shape .* Llama4TextExperts is"):
        prunable_matrices(model)


@pytest.mark.parametrize("key", ["up_proj", "router"])
def test_unknown_parameters_of_several_matrices_are_refused_by_name(make_model, key):
    model = make_model("mixtral")
    model.model.layers[1].mlp.experts.register_parameter(key, nn.Parameter(torch.zeros(4, 3, 2)))
    with pytest.raises(
        ValueError, match=rf"layers\.1\.mlp\.experts\.{key} of shape \(4, 3, 2\) holds several"
    ):
        prunable_matrices(model)
