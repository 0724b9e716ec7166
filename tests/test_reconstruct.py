"""Reconstruction: every error is what it says, weights are the optimum, and nothing else has moved."""

import copy

import pytest
import torch
from torch import nn

import perpkit as pk
from perpkit.pruning.layers import decoder_blocks, prunable_matrices
from perpkit.pruning.masks import Masks
from perpkit.retraining.layerwise.descent import Descent
from perpkit.retraining.layerwise.reconstruct import reconstruct

QUIET = {"progress": False, "batch": 5}


def pruned(dense, criterion="magnitude", **options):
    model = copy.deepcopy(dense)
    masks = pk.prune(model, criterion, **{"sparsity": 0.5, "progress": False, **options})
    return model, masks


def snapshot(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def unchanged(model, before):
    return all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@torch.no_grad()
def seen(model, windows, module, *, outputs):
    """What enters or leaves a module in one full forward pass."""
    found = []

    def enters(module, arguments):
        found.append(arguments[0])

    def leaves(module, arguments, output):
        # Falcon adds to it in place afterwards.
        found.append((output[0] if isinstance(output, tuple) else output).clone())

    with module.register_forward_hook(leaves) if outputs else module.register_forward_pre_hook(enters):
        model(windows)
    return found[0].flatten(0, -2).double()


def relative(made, wanted):
    return float((made - wanted).square().sum() / wanted.square().sum())


@torch.no_grad()
@pytest.mark.parametrize("target", ["dense", "propagated"])
def test_every_matrix_of_every_architecture_is_at_its_optimum(any_model, windows, target):
    """In the final model no kept weight of any linear layer can lower the error of its layer's output."""
    # The experts of a fused mixture are not computed in 64 bits.
    dense = any_model if hasattr(any_model.config, "num_experts_per_tok") else any_model.double()
    model, masks = pruned(dense)
    before = snapshot(dense)
    table = reconstruct(model, dense, masks, windows, unit="matrix", target=target, **QUIET)
    assert unchanged(dense, before)
    masks.check(model)
    assert sorted(table["unit"]) == sorted(prunable_matrices(model))
    assert (table["after"] <= table["before"]).all()
    assert (table["after"] <= table["optimum"] * 1.000001 + 1e-7).all()
    errors = table.set_index("unit")["after"]
    checked = 0
    for name, matrix in prunable_matrices(model).items():
        if matrix.expert is not None:
            continue
        other = dense.get_submodule(matrix.parameter.rpartition(".")[0])
        x = seen(model, windows, matrix.module, outputs=False)
        wanted = seen(dense, windows, other, outputs=False) if target == "dense" else x
        kept = matrix.view(masks[matrix.parameter])
        weight, old = matrix.view(matrix.weight()).double(), matrix.view(other.weight).double()
        goal = wanted @ old.T
        assert errors[name] == pytest.approx(relative(x @ weight.T, goal), rel=1e-3, abs=1e-7)
        slope, first = (((x @ w.T - goal).T @ x)[kept].norm() for w in (weight, old * kept))
        assert slope < 0.02 * first, name
        checked += 1
    assert checked >= 4


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("target", ["dense", "propagated"])
def test_each_expert_answers_for_the_tokens_routed_to_it(make_model, windows, architecture, target):
    dense = make_model(architecture)
    model, masks = pruned(dense)
    table = reconstruct(model, dense, masks, windows, unit="matrix", target=target, **QUIET)
    errors = table.set_index("unit")["after"]
    name = f"{decoder_blocks(model)[0]}.1.mlp.experts"

    def entering(which):
        found = []
        hook = which.get_submodule(name).register_forward_pre_hook(lambda _, args: found.append(args))
        with hook, torch.no_grad():
            which(windows)
        return found[0]

    hidden, chosen, _ = entering(model)
    dense_hidden = entering(dense)[0] if target == "dense" else hidden
    new, old = model.get_submodule(name), dense.get_submodule(name)
    for expert in range(len(new.down_proj)):
        mine = (chosen == expert).any(-1)
        x, wanted = hidden[mine], dense_hidden[mine]
        first = relative(x @ new.gate_up_proj[expert].T, wanted @ old.gate_up_proj[expert].T)
        assert errors[f"{name}.gate_up_proj[{expert}]"] == pytest.approx(first, rel=1e-3)
        (gate, up), (old_gate, old_up) = (
            (rows @ which.gate_up_proj[expert].T).chunk(2, -1)
            for rows, which in ((x, new), (wanted, old if target == "dense" else new))
        )
        inner = nn.functional.silu(gate) * up
        old_inner = nn.functional.silu(old_gate) * old_up
        second = relative(inner @ new.down_proj[expert].T, old_inner @ old.down_proj[expert].T)
        assert errors[f"{name}.down_proj[{expert}]"] == pytest.approx(second, rel=1e-3)


def test_attention_and_mlp_are_found_in_every_architecture(any_model, windows):
    """Two units a block; the errors after are those that the final model shows against the dense one."""
    dense = any_model
    model, masks = pruned(dense)
    before = snapshot(dense)
    others = {n: p.clone() for n, p in model.named_parameters() if n not in masks}
    modes, flags = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
    table = reconstruct(model, dense, masks, windows, unit="submodule", steps=10, lr=5e-4, **QUIET)
    assert unchanged(dense, before)
    masks.check(model)
    assert all(torch.equal(value, model.get_parameter(name)) for name, value in others.items())
    assert modes == [m.training for m in model.modules()]
    assert flags == [p.requires_grad for p in model.parameters()]
    assert all(p.grad is None for p in model.parameters())
    prefix, _ = decoder_blocks(model)
    assert [unit.rpartition(".")[0] for unit in table["unit"]] == [f"{prefix}.{i // 2}" for i in range(4)]
    assert "att" in table["unit"][0]
    assert "mlp" in table["unit"][1] or table["unit"][1].endswith("fc1+fc2")
    assert (table["after"] < table["before"]).all()
    assert table["optimum"].isna().all()
    for unit, after in zip(table["unit"], table["after"], strict=True):
        last = unit.replace("fc1+fc2", "fc2")
        made, wanted = (
            seen(which, windows, which.get_submodule(last), outputs=True) for which in (model, dense)
        )
        assert after == pytest.approx(relative(made, wanted), rel=1e-3), unit


@pytest.mark.parametrize("unit", ["block", "window:2"])
def test_blocks_and_windows_of_every_architecture(any_model, windows, unit):
    dense = any_model
    model, masks = pruned(dense)
    table = reconstruct(model, dense, masks, windows, unit=unit, steps=10, lr=5e-4, **QUIET)
    masks.check(model)
    assert (table["after"] < table["before"]).all()
    prefix, blocks = decoder_blocks(model)
    ends = {f"{prefix}.0": 0, f"{prefix}.1": 1} if unit == "block" else {f"{prefix}.0-1": 1}
    assert list(table["unit"]) == list(ends)
    for block, after in zip(ends.values(), table["after"], strict=True):
        made, wanted = (
            seen(which, windows, decoder_blocks(which)[1][block], outputs=True) for which in (model, dense)
        )
        assert after == pytest.approx(relative(made, wanted), rel=1e-3)
    assert len(blocks) == 2


def test_a_propagated_target_is_the_dense_unit_on_the_pruned_models_inputs(make_model, windows):
    dense = make_model("llama", dtype=torch.float64)
    model, masks = pruned(dense)
    options = {"target": "propagated", "steps": 5, "lr": 1e-3, **QUIET}
    table = reconstruct(model, dense, masks, windows, unit="block", **options)
    # A model whose first block is the pruned one's and whose second is dense.
    mixed = copy.deepcopy(dense)
    mixed.model.layers[0].load_state_dict(model.model.layers[0].state_dict())
    made, wanted = (seen(which, windows, which.model.layers[1], outputs=True) for which in (model, mixed))
    assert table["after"][1] == pytest.approx(relative(made, wanted))
    start = copy.deepcopy(mixed)
    start.model.layers[1].load_state_dict(pruned(dense)[0].model.layers[1].state_dict())
    made = seen(start, windows, start.model.layers[1], outputs=True)
    assert table["before"][1] == pytest.approx(relative(made, wanted))


@pytest.mark.parametrize("target", ["dense", "propagated"])
def test_gradients_come_near_the_optimum_of_a_matrix_and_never_beat_it(make_model, windows, target):
    dense = make_model("opt", dtype=torch.float64)
    model, masks = pruned(dense)
    options = {"target": target, "solver": "gradients", "steps": 300, "lr": 2e-2, **QUIET}
    table = reconstruct(model, dense, masks, windows, unit="matrix", **options)
    assert (table["after"] >= table["optimum"] * (1 - 1e-6)).all()
    gap = (table["after"] - table["optimum"]) / (table["before"] - table["optimum"])
    assert (gap < 0.25).all()
    exact, masks = pruned(dense)
    best = reconstruct(exact, dense, masks, windows, unit="matrix", target=target, **QUIET)
    assert best["after"].iloc[0] == pytest.approx(table["optimum"].iloc[0])


@pytest.mark.parametrize("kind", ["mask_lora", "lora_prune", "scale_lora"])
@pytest.mark.parametrize("architecture", ["opt", "gpt2", "qwen3_moe"])
def test_adapters_are_merged_and_gone(make_model, windows, architecture, kind):
    dense = make_model(architecture)
    model, masks = pruned(dense)
    names = list(model.state_dict())
    options = {"trainable": kind, "rank": 4, "alpha": 8.0, "steps": 8, "lr": 3e-3, **QUIET}
    start = {"start": "symmetry_breaking"} if kind == "scale_lora" else {}
    table = reconstruct(model, dense, masks, windows, **options, **start)
    masks.check(model)
    assert list(model.state_dict()) == names
    assert (table["after"] < table["before"]).any()
    assert (table["after"] <= table["before"]).all()


def test_any_criterions_masks_can_be_reconstructed(make_model, windows):
    dense = make_model("llama")
    for criterion in ("wanda", "sparsegpt"):
        model, masks = pruned(dense, criterion, calibration=windows)
        changed = snapshot(model)
        table = reconstruct(model, dense, masks, windows, unit="matrix", **QUIET)
        assert (table["after"] <= table["before"]).all()
        assert table["after"].mean() < 0.95 * table["before"].mean()
        masks.check(model)
        assert not unchanged(model, changed)


def test_only_masked_matrices_move(make_model, windows):
    dense = make_model("opt")
    model, masks = pruned(dense)
    some = Masks({name: mask for name, mask in masks.items() if ".1." in name and "fc" not in name})
    kept = {name: p.clone() for name, p in model.named_parameters() if name not in some}
    table = reconstruct(model, dense, some, windows, steps=3, **QUIET)
    assert list(table["unit"]) == ["model.decoder.layers.1.self_attn"]
    assert all(torch.equal(model.get_parameter(name), value) for name, value in kept.items())


def test_an_unpruned_model_has_nothing_to_mend(make_model, windows):
    dense = make_model("opt")
    model, masks = pruned(dense, sparsity=0.0)
    before = snapshot(model)
    for unit in ("matrix", "submodule"):
        table = reconstruct(model, dense, masks, windows, unit=unit, steps=3, **QUIET)
        assert (table[["before", "after"]] == 0).all(axis=None)
        assert unchanged(model, before)


@pytest.mark.parametrize("unit", ["matrix", "submodule"])
def test_models_in_16_bits_keep_their_type(make_model, windows, unit):
    dense = make_model("llama", dtype=torch.bfloat16)
    model, masks = pruned(dense)
    table = reconstruct(model, dense, masks, windows, unit=unit, steps=20, lr=1e-3, **QUIET)
    assert (table["after"] < table["before"]).all()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    masks.check(model)


def test_the_seed_decides_and_the_global_generators_stay(make_model, windows, generators_unchanged):
    dense = make_model("opt", dropout=0.1)
    made = []
    for seed in (0, 0, 1):
        model, masks = pruned(dense)
        options = {"trainable": "mask_lora", "rank": 2, "steps": 4, "seed": seed, **QUIET}
        reconstruct(model, dense, masks, windows, **options)
        made.append(snapshot(model))
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])
    assert any(not torch.equal(made[0][name], made[2][name]) for name in made[0])


def test_every_batch_comes_once_before_any_comes_again():
    order = Descent(seed=3)._order(4)
    assert sorted(next(order) for _ in range(4)) == sorted(next(order) for _ in range(4)) == [0, 1, 2, 3]
