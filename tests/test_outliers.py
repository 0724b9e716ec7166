"""Planted outliers: the same function from other weights."""

import copy

import pytest
import torch

from perpkit.sources.outliers import plant_outliers

NORMS = {
    "opt": {"self_attn_layer_norm": ("q_proj", "k_proj", "v_proj"), "final_layer_norm": ("fc1",)},
    "llama": {
        "input_layernorm": ("q_proj", "k_proj", "v_proj"),
        "post_attention_layernorm": ("gate_proj", "up_proj"),
    },
}


def pairs(model):
    """Every normalisation of a block with the matrices that read it."""
    for block in model.get_decoder().layers:
        modules = {name.rpartition(".")[2]: module for name, module in block.named_modules()}
        for norm, matrices in NORMS[model.config.model_type].items():
            yield modules[norm], [modules[matrix] for matrix in matrices]


@pytest.mark.parametrize("architecture", ["opt", "llama"])
@torch.no_grad()
def test_logits_stay_and_weights_change(make_model, windows, architecture, generators_unchanged):
    model = make_model(architecture, dtype=torch.float64)
    planted = copy.deepcopy(model)
    plant_outliers(planted, sigma=1.0, seed=0)
    before, after = model(windows).logits, planted(windows).logits
    assert (after - before).abs().max() < 1e-9 * before.abs().max()
    for (norm, matrices), (loud, quiet) in zip(pairs(model), pairs(planted), strict=True):
        factor = loud.weight / norm.weight
        assert factor.max() > 2
        assert factor.min() < 0.5
        for matrix, shrunken in zip(matrices, quiet, strict=True):
            # what Wanda looks at, weight times activation, stays
            torch.testing.assert_close(shrunken.weight * factor, matrix.weight, rtol=1e-12, atol=0)


@pytest.mark.parametrize("architecture", ["opt", "llama"])
def test_nothing_but_norms_and_their_readers_changes(make_model, architecture):
    model = make_model(architecture)
    planted = copy.deepcopy(model)
    plant_outliers(planted)
    changed = {id(p) for norm, _ in pairs(planted) for p in norm.parameters()}
    changed |= {id(matrix.weight) for _, matrices in pairs(planted) for matrix in matrices}
    for (name, old), new in zip(model.named_parameters(), planted.parameters(), strict=True):
        assert torch.equal(old, new) == (id(new) not in changed), name


def test_factors_are_log_normal_with_the_given_sigma(make_model):
    model = make_model("llama", hidden_size=512, num_hidden_layers=4)
    before = torch.cat([norm.weight.detach().clone() for norm, _ in pairs(model)])
    plant_outliers(model, sigma=0.7, seed=1)
    logs = (torch.cat([norm.weight.detach() for norm, _ in pairs(model)]) / before).log()
    assert logs.mean().abs() < 5 * 0.7 / len(logs) ** 0.5
    assert logs.std().item() == pytest.approx(0.7, rel=0.1)


def test_seed_and_sigma_decide(make_model):
    models = []
    for sigma, seed in ((1.0, 0), (1.0, 0), (1.0, 1), (0.0, 0)):
        models.append(make_model("opt"))
        plant_outliers(models[-1], sigma=sigma, seed=seed)
    weights = [model.model.decoder.layers[0].fc1.weight for model in models]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert torch.equal(weights[3], make_model("opt").model.decoder.layers[0].fc1.weight)


def test_negative_sigma(make_model):
    with pytest.raises(ValueError, match=r"sigma is -0\.5; it must not be negative"):
        plant_outliers(make_model("opt"), sigma=-0.5)


def test_unknown_architectures_are_refused_with_the_known_ones(make_model):
    with pytest.raises(ValueError, match="'gpt2' model; known are opt, llama"):
        plant_outliers(make_model("gpt2"))


def test_norms_after_the_block_are_refused(make_model):
    # as in OPT-350m: their output is the residual stream, which has other readers than these
    model = make_model("opt", do_layer_norm_before=False)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="do_layer_norm_before"):
        plant_outliers(model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
