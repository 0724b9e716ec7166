"""What enters a matrix: rows, patches and routed tokens, their norms and Gram matrices."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pruning_parts import patches, untouched
from torch import nn

from perpkit.pruning.inputs import Inputs, expert_rows, input_rows, recorded
from perpkit.pruning.layers import prunable_matrices

MODES = st.sampled_from(["zeros", "reflect", "replicate", "circular"])


def randn(*shape, seed=0, **kind):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **kind)


# --- sums -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_sums_over_several_batches(dtype):
    rows = randn(3, 50, 7).to(dtype)
    inputs = Inputs()
    for part in rows.split((20, 29, 1), dim=1):
        inputs.add(part, True)
    exact = rows.double()
    assert inputs.tokens == 50
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(inputs.gram.double(), exact.mT @ exact, rtol=tolerance, atol=30 * tolerance)
    torch.testing.assert_close(
        inputs.squares.double(), exact.square().sum(1), rtol=tolerance, atol=30 * tolerance
    )
    assert inputs.gram.dtype == inputs.squares.dtype == torch.promote_types(dtype, torch.float32)


def test_squares_of_half_precision_do_not_overflow():
    inputs = Inputs()
    inputs.add(torch.full((1, 4, 2), 60_000.0, dtype=torch.float16), False)
    assert inputs.norms(1).tolist() == [120_000.0, 120_000.0]
    assert inputs.gram is None


def test_norms_of_one_group_and_of_several():
    inputs = Inputs(1, torch.tensor([[9.0, 16.0]]))
    assert inputs.norms(3).tolist() == [3.0, 4.0]
    inputs = Inputs(1, torch.tensor([[1.0, 4.0], [9.0, 16.0]]))
    assert inputs.norms(4).tolist() == [[1.0, 2.0], [1.0, 2.0], [3.0, 4.0], [3.0, 4.0]]


# --- rows -------------------------------------------------------------------------------------------


def test_rows_of_a_linear_layer():
    x = randn(2, 3, 4)
    assert torch.equal(input_rows(nn.Linear(4, 5), x), x.reshape(1, 6, 4))


@st.composite
def convolutions(draw):
    """A convolution in one or two dimensions, and inputs for it."""
    dimensions = draw(st.integers(1, 2))
    sizes = st.tuples(*[st.integers(1, 3)] * dimensions)
    kernel, dilation = draw(sizes), draw(st.tuples(*[st.integers(1, 2)] * dimensions))
    padding = draw(
        st.one_of(st.tuples(*[st.integers(0, 3)] * dimensions), st.sampled_from(["same", "valid"]))
    )
    stride = (1,) * dimensions if padding == "same" else draw(sizes)
    groups = draw(st.integers(1, 3))
    kind = nn.Conv1d if dimensions == 1 else nn.Conv2d
    options = {"padding": padding, "stride": stride, "dilation": dilation, "groups": groups}
    channels = groups * draw(st.integers(1, 2))
    layer = kind(channels, 2 * groups, kernel, **options, padding_mode=draw(MODES), dtype=torch.float64)
    return layer, randn(2, channels, *draw(st.tuples(*[st.integers(6, 8)] * dimensions)), dtype=torch.float64)


@settings(max_examples=60)
@given(convolutions())
def test_rows_of_a_convolution_are_its_patches(drawn):
    layer, x = drawn
    rows = input_rows(layer, x)
    assert torch.equal(rows, patches(layer, x))
    # they are what the matrix multiplies
    weights = layer.weight.flatten(1).chunk(layer.groups)
    made = torch.cat([part @ weight.T for part, weight in zip(rows, weights, strict=True)], 1) + layer.bias
    wanted = layer(x).movedim(1, -1).reshape(-1, layer.out_channels)
    torch.testing.assert_close(made, wanted)


def test_three_dimensional_convolutions_are_refused():
    with pytest.raises(ValueError, match="three-dimensional convolutions can be pruned by magnitude"):
        input_rows(nn.Conv3d(1, 1, 2), torch.zeros(1, 1, 4, 4, 4))


# --- experts ----------------------------------------------------------------------------------------


def mixture(kind, make_model):
    """The experts' module of a tiny mixture."""
    if kind != "gpt_oss":
        return make_model(kind).model.layers[0].mlp.experts
    import transformers

    shape = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 24, "num_local_experts": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    config = transformers.AutoConfig.for_model("gpt_oss", vocab_size=64, **shape, **heads)
    module = transformers.AutoModelForCausalLM.from_config(config).model.layers[0].mlp.experts
    for number, parameter in enumerate(module.parameters()):
        parameter.data = 0.3 * randn(*parameter.shape, seed=number)
    return module


@torch.no_grad()
@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_an_experts_rows_are_the_tokens_routed_to_it(make_model, kind):
    module = mixture(kind, make_model)
    hidden = randn(9, 32)
    chosen = torch.tensor([[0, 2], [2, 3], [3, 0], [0, 3], [2, 0], [3, 2], [0, 2], [0, 3], [3, 0]])
    for expert in range(4):
        mine = [t for t in range(9) if expert in chosen[t]]
        first, inner = expert_rows(module, expert, hidden, chosen)
        assert torch.equal(first[0], hidden[mine])
        # what the module itself makes of these tokens if all of them go to this expert alone
        routed = torch.full((len(mine), 1), expert)
        wanted = module(hidden[mine], routed, torch.ones(len(mine), 1))
        down = module.down_proj[expert]
        made = inner[0] @ (down if kind == "gpt_oss" else down.T)
        torch.testing.assert_close(made + (module.down_proj_bias[expert] if kind == "gpt_oss" else 0), wanted)
    assert len(expert_rows(module, 1, hidden, chosen)[0][0]) == 0


# --- recording --------------------------------------------------------------------------------------


class Reader(nn.Module):
    """Two layers that read one tensor, a third that reads it after it was written to, a fourth another."""

    def __init__(self, between):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(4)])
        self.between = between

    def forward(self, x):
        one, two, three, four = self.layers
        y = one(x) + two(x)
        self.between(x)
        return three(x) + four(y)


@torch.no_grad()
@pytest.mark.parametrize("inference", [False, True])
def test_layers_that_read_one_tensor_share_their_sums(inference):
    model = Reader(lambda x: None)
    matrices = prunable_matrices(model)
    with torch.inference_mode(inference), recorded(matrices, gram=True) as inputs:
        for seed in range(3):
            model(randn(5, 4, seed=seed))
    one, two, three, four = inputs.values()
    assert one is two
    assert two is three
    assert four is not one
    assert one.tokens == four.tokens == 15
    exact = torch.cat([randn(5, 4, seed=seed) for seed in range(3)])
    torch.testing.assert_close(one.gram[0], exact.T @ exact)


@torch.no_grad()
def test_a_tensor_that_was_written_to_is_another():
    model = Reader(lambda x: x.mul_(3))
    with recorded(prunable_matrices(model), gram=False) as inputs:
        for seed in range(2):
            model(randn(5, 4, seed=seed))
    one, two, three, _ = inputs.values()
    assert one is two
    torch.testing.assert_close(three.squares, 9 * one.squares)


@torch.no_grad()
def test_a_layer_used_twice_has_seen_both():
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    x = randn(5, 4)
    with recorded(prunable_matrices(model), gram=False) as inputs:
        model(x)
    assert inputs["0.weight"].tokens == 10
    torch.testing.assert_close(
        inputs["0.weight"].squares[0], x.square().sum(0) + layer(x).relu().square().sum(0)
    )


@torch.no_grad()
def test_what_no_token_reaches_has_seen_none(make_model, windows):
    model = make_model("mixtral")
    # All scores are equal, and of equal scores the same two win for every token.
    for block in model.model.layers:
        block.mlp.gate.weight.zero_()
    with recorded(prunable_matrices(model), gram=True) as inputs:
        model(windows[:2])
    experts = {name: seen for name, seen in inputs.items() if "experts" in name}
    assert sorted(seen.tokens for seen in experts.values()) == [0] * 8 + [32] * 8
    for seen in experts.values():
        assert (seen.tokens == 0) == (seen.squares is None) == (seen.gram is None)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_named(value):
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    nn.init.constant_(model[0].bias, value)
    model[1] = nn.Identity()
    with (
        pytest.raises(ValueError, match=r"an activation that enters '2\.weight' is NaN or infinite"),
        recorded(prunable_matrices(model), gram=False),
    ):
        model(torch.ones(1, 2))
    assert untouched(model)


def test_hooks_are_gone_after_an_error():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with pytest.raises(RuntimeError, match="stop"), recorded(prunable_matrices(model), gram=False):
        raise RuntimeError("stop")
    assert untouched(model)
    assert untouched(copy.deepcopy(model))
