"""Attaching adapters: the function in training, its gradients, and what is added."""

import copy

import pytest
import torch
from adapter_parts import (
    RANK,
    VARIANTS,
    attach_random,
    effective,
    names_of_factors,
    outputs,
    pruned,
    update_of,
)
from torch import nn
from torch.func import functional_call

from perpkit.pruning.layers import prunable_matrices
from perpkit.pruning.prune import prune
from perpkit.retraining.adapters.attach import adapter_parameters, attach


@pytest.fixture
def small(make_model):
    """A pruned OPT and its masks."""
    return pruned(make_model("opt"))


# --- the function -----------------------------------------------------------------------------------


def check_function(model, inputs, dtype=torch.float64):
    """Every kind against the effective weights put into the plain model, outputs and gradients."""
    plain, masks = pruned(model, dtype=dtype)
    inputs = inputs.to(dtype) if inputs.is_floating_point() else inputs
    for kind, start in VARIANTS:
        adapted = copy.deepcopy(plain)
        added = attach_random(adapted, masks, kind, start)
        factors = {name: p.detach().clone().requires_grad_() for name, p in added.items()}
        weights = {}
        for name, mask in masks.items():
            a, b = (factors[factor] for factor in names_of_factors(name))
            weight = plain.get_parameter(name).detach()
            weights[name] = effective(kind, start, weight, mask, update_of(plain, name, a, b))
        wanted = functional_call(plain, weights, (inputs,))
        wanted = getattr(wanted, "logits", wanted)
        found = outputs(adapted, inputs)
        close = {"rtol": 1e-7, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 1e-3, "atol": 1e-4}
        torch.testing.assert_close(found, wanted, **close)
        weigh = torch.linspace(-1, 1, found.numel(), dtype=found.dtype).view(found.shape)
        (found * weigh).sum().backward()
        (wanted * weigh).sum().backward()
        for name, parameter in added.items():
            assert factors[name].grad.any(), name
            torch.testing.assert_close(parameter.grad, factors[name].grad, **close)


def test_function_and_gradients_of_every_language_model(any_model, windows):
    # The default way to compute experts knows no float64.
    any_model.set_experts_implementation("eager")
    check_function(any_model, windows[:2])


def test_function_and_gradients_of_every_vision_model(any_vision, images):
    check_function(any_vision, images[:2])


@pytest.mark.parametrize("implementation", ["batched_mm", "grouped_mm"])
def test_experts_however_they_are_computed(make_model, windows, implementation):
    model = make_model("mixtral")
    model.set_experts_implementation(implementation)
    check_function(model, windows[:2], torch.float32)


def test_transposed_experts(windows):
    import transformers

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "head_dim": 8}
    config = transformers.GptOssConfig(
        **sizes,
        vocab_size=64,
        intermediate_size=24,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.GptOssForCausalLM(config).eval()
        nn.init.normal_(model.model.layers[0].mlp.experts.gate_up_proj_bias)
    masks = prune(model, "magnitude", sparsity=0.5)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    plain = model.get_parameter(name).detach().clone()
    attach_random(model, masks, "mask_lora")
    experts = model.model.layers[0].mlp.experts
    update = torch.einsum("eor,eri->eio", experts.gate_up_proj_lora_B, experts.gate_up_proj_lora_A)
    torch.testing.assert_close(experts.gate_up_proj, plain + masks[name] * 2.5 * update)
    outputs(model, windows[:2]).sum().backward()
    assert experts.down_proj_lora_A.grad.any()


@pytest.mark.parametrize(("kind", "start"), VARIANTS)
@pytest.mark.parametrize("architecture", ["opt", "gpt2", "qwen3_moe"])
def test_the_function_starts_unchanged(make_model, windows, architecture, kind, start):
    model, masks = pruned(make_model(architecture))
    before = model(windows).logits
    attach(model, masks, kind, RANK, start=start)
    torch.testing.assert_close(model(windows).logits, before)


def test_the_attribute_is_the_effective_weight_and_the_parameter_the_stored_one(small):
    model, masks = small
    stored = model.model.decoder.layers[0].fc1.weight.detach().clone()
    added = attach_random(model, masks, "mask_lora")
    layer, name = model.model.decoder.layers[0].fc1, "model.decoder.layers.0.fc1"
    a, b = added[f"{name}.lora_A"], added[f"{name}.lora_B"]
    torch.testing.assert_close(layer.weight, stored + masks[f"{name}.weight"] * (2.5 * b @ a))
    assert torch.equal(dict(model.named_parameters())[f"{name}.weight"], stored)
    masks.check(model)


@pytest.mark.parametrize(("kind", "start"), VARIANTS)
@pytest.mark.parametrize(
    ("architecture", "target"), [("opt", "fc1"), ("gpt2", "mlp.c_fc"), ("mixtral", "experts")]
)
@pytest.mark.parametrize("autocast", [False, True])
def test_sixteen_bits_and_autocast(make_model, windows, architecture, target, kind, start, autocast):
    model, masks = pruned(make_model(architecture), dtype=torch.float32 if autocast else torch.bfloat16)
    plain = copy.deepcopy(model)
    added = attach_random(model, masks, kind, start, targets=[target])
    for name in (name for name in masks if f".{target}." in name):
        a, b = (added[factor].detach() for factor in names_of_factors(name))
        weight = plain.get_parameter(name).data
        weight.copy_(effective(kind, start, weight.float(), masks[name], update_of(plain, name, a, b)))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found, wanted = model(windows).logits, plain(windows).logits
    assert found.dtype == torch.bfloat16
    assert (found - wanted).norm() < 0.02 * wanted.norm()
    found.float().sum().backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in added.values())


@pytest.mark.parametrize("kind", ["lora", "mask_lora", "scale_lora"])
def test_gradient_checkpointing_of_a_model(make_model, windows, kind):
    model, masks = pruned(make_model("llama"))
    added = attach_random(model, masks, kind)
    gradients = []
    for on in (False, True):
        if on:
            model.activation_checkpointing_enable()
        model.train()
        model(windows, use_cache=False).logits.sum().backward()
        gradients.append([p.grad.clone() for p in added.values()])
        model.zero_grad()
    for mine, plain in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, plain)


@pytest.mark.parametrize(("kind", "start"), VARIANTS)
def test_compile(kind, start):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 5))
    masks = prune(model, "magnitude", sparsity=0.5)
    attach_random(model, masks, kind, start)
    x = torch.linspace(-1, 1, 96).view(2, 3, 4, 4)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))


# --- what is added ----------------------------------------------------------------------------------


def test_names_shapes_and_types(any_model):
    model, masks = pruned(any_model)
    matrices = list(prunable_matrices(model).values())
    added = attach(model, masks, "mask_lora", RANK)
    assert len(added) == 2 * len(masks)
    for matrix in matrices:
        a, b = (added[name] for name in names_of_factors(matrix.parameter))
        a, b = (a, b) if matrix.expert is None else (a[matrix.expert], b[matrix.expert])
        rows, columns = matrix.view(masks[matrix.parameter]).shape
        assert (a.shape, b.shape) == ((RANK, columns), (rows, RANK))
        assert 0.5 * columns**-0.5 < a.abs().max() <= columns**-0.5
        assert not b.any()
    named = dict(model.named_parameters())
    assert all(named[name] is p and p.requires_grad and "lora_" in name for name, p in added.items())
    assert added == adapter_parameters(model)


@pytest.mark.usefixtures("generators_unchanged")
def test_factors_come_from_the_seed(small):
    model, masks = small
    drawn = [attach(copy.deepcopy(model), masks, "lora", RANK, seed=seed) for seed in (0, 0, 1)]
    first, again, other = (torch.cat([p.flatten() for p in added.values()]) for added in drawn)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_published_start_of_scale_lora(small):
    model, masks = small
    added = attach(model, masks, "scale_lora", 4)
    assert all(torch.equal(p, torch.full_like(p, 0.5)) for p in added.values())


def test_the_published_start_keeps_rank_one_and_the_other_breaks_the_symmetry(small, windows):
    model, masks = small
    for start, rank_one in (("published", True), ("symmetry_breaking", False)):
        adapted = copy.deepcopy(model)
        added = attach(adapted, masks, "scale_lora", 4, start=start)
        optimizer = torch.optim.SGD(added.values(), lr=1e-2)
        for _ in range(2):
            optimizer.zero_grad()
            adapted(windows, labels=windows).loss.backward()
            optimizer.step()
        b = added["model.decoder.layers.0.fc1.lora_B"].detach()
        same = (b - b[:, :1]).norm() < 1e-5 * b.norm()
        assert same == rank_one


@pytest.mark.parametrize("kind", ["lora", "mask_lora"])
def test_only_the_adapters_and_nothing_else_is_added(small, kind):
    model, masks = small
    before = copy.deepcopy(model)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    added = attach(model, masks, kind, RANK)
    now = dict(model.named_parameters())
    assert set(now) == set(flags) | set(added)
    assert all(now[name].requires_grad == flag for name, flag in flags.items())
    assert all(torch.equal(now[name], p) for name, p in before.named_parameters())
    assert "mask_lora, rank=3" in repr(model) or kind == "lora"
    assert set(model.state_dict()) == set(before.state_dict()) | set(added)
