"""Pruning by what enters a layer: each block sees the pruned blocks before it, each expert its own tokens."""

import copy
import warnings

import pytest
import torch
from pruning_parts import entered, parts_of, snapshot
from torch import nn

from perpkit.pruning import calibration as calibrating
from perpkit.pruning.frank_wolfe import sparsefw
from perpkit.pruning.layers import prunable_matrices
from perpkit.pruning.method import CALIBRATED
from perpkit.pruning.prune import prune
from perpkit.pruning.sparsegpt import sparsegpt


def precise(model):
    """In double precision, but for mixtures, whose grouped products are not made for it."""
    return model if hasattr(model.config, "num_experts_per_tok") else model.double()


def slowly(model, data, batch, choose):
    """Prune part after part in place; `choose(weight, inputs)` gives a part's new matrix, `inputs` being
    `[groups, tokens, in]` from one forward pass of the whole model as it then is."""
    chosen = {}
    matrices = prunable_matrices(model)
    for names in parts_of(model):
        seen = entered(model, data, batch)
        for name in names:
            weight = matrices[name].view(matrices[name].weight()).detach()
            chosen[name] = choose(weight, seen[name])
        for name in names:
            matrices[name].assign(matrices[name].weight(), chosen[name])
    return chosen


def by_row(scores, sparsity):
    """Row by row, sort and keep."""
    mask = torch.zeros(scores.shape, dtype=torch.bool)
    for row, kept in zip(scores.tolist(), mask, strict=True):
        order = sorted(range(len(row)), key=lambda j, row=row: (row[j], j))
        kept[order[round(sparsity * len(row)) :]] = True
    return mask


def norms(inputs, rows):
    """The norm of each input, for each row that it meets."""
    lengths = inputs.square().sum(1).sqrt()
    return lengths.repeat_interleave(rows // len(lengths), 0)


def wanda(weight, inputs):
    if not inputs.shape[1]:
        return torch.where(by_row(weight.abs().double(), 0.6), weight, 0)
    return torch.where(by_row(weight.abs().double() * norms(inputs, len(weight)), 0.6), weight, 0)


def ria(weight, inputs):
    absolute = weight.abs().double()
    share = absolute / absolute.sum(1, keepdim=True) + absolute / absolute.sum(0)
    return torch.where(by_row(share * norms(inputs, len(weight)).sqrt(), 0.6), weight, 0)


def agree(model, wanted, tolerance=0.0):
    for name, matrix in prunable_matrices(model).items():
        weight = matrix.view(matrix.weight()).detach()
        assert torch.equal(weight == 0, wanted[name] == 0), name
        torch.testing.assert_close(weight, wanted[name].to(weight.dtype), rtol=tolerance, atol=tolerance)


# --- against slow versions ----------------------------------------------------------------------------


def test_wanda_is_the_slow_wanda_in_every_architecture(any_model, windows):
    model, slow = precise(any_model), copy.deepcopy(any_model)
    prune(model, "wanda", sparsity=0.6, calibration=windows[:5], batch=2, progress=False)
    agree(model, slowly(slow, windows[:5], 2, wanda))


@pytest.mark.parametrize("kind", ["convnext", "sequential"])
def test_wanda_is_the_slow_wanda_in_vision_models(make_vision, images, kind):
    model, slow = (make_vision(kind).double() for _ in range(2))
    data = images[:3, :, ::2, ::2].double()
    prune(model, "wanda", sparsity=0.6, calibration=data, batch=2, progress=False)
    agree(model, slowly(slow, data, 2, wanda))


def test_ria_is_the_slow_ria(make_model, windows):
    model, slow = (make_model("gpt2").double() for _ in range(2))
    prune(model, "ria", sparsity=0.6, calibration=windows[:5], batch=2, progress=False)
    agree(model, slowly(slow, windows[:5], 2, ria))
    other = make_model("gpt2").double()
    masks = prune(other, "ria", sparsity=0.6, power=2.0, calibration=windows[:5], progress=False)
    assert any(not torch.equal(masks[name], model.get_parameter(name) != 0) for name in masks)


def with_gram(function, **options):
    """`choose` for the two criteria that need the Gram matrix, group by group."""

    def choose(weight, inputs):
        found = []
        for part, rows in zip(weight.chunk(len(inputs)), inputs, strict=True):
            made = function(part, (rows.T @ rows).to(weight.dtype), **options)
            found.append(made[0] if isinstance(made, tuple) else torch.where(made, part, 0))
        return torch.cat(found)

    return choose


@pytest.mark.parametrize("architecture", ["gpt2", "gemma3_text"])
def test_sparsegpt_and_sparsefw_get_the_gram_matrix_and_their_parameters(make_model, windows, architecture):
    for criterion, function, options in (
        ("sparsegpt", sparsegpt, {"damping": 0.1, "block": 8}),
        ("sparsefw", sparsefw, {"iterations": 7, "alpha": 0.5, "warm_start": "ria"}),
    ):
        model, slow = (make_model(architecture).double() for _ in range(2))
        prune(model, criterion, sparsity=0.6, calibration=windows[:5], batch=2, progress=False, **options)
        agree(model, slowly(slow, windows[:5], 2, with_gram(function, sparsity=0.6, **options)), 1e-8)


@pytest.mark.parametrize(("criterion", "function"), [("sparsegpt", sparsegpt), ("sparsefw", sparsefw)])
def test_each_group_of_a_convolution_has_a_gram_matrix_of_its_own(make_vision, images, criterion, function):
    model, slow = (make_vision("sequential").double() for _ in range(2))
    data = images[:3, :, ::2, ::2].double()
    prune(model, criterion, sparsity=0.6, group="row", calibration=data, batch=2, progress=False)
    agree(model, slowly(slow, data, 2, with_gram(function, sparsity=0.6, group="row")), 1e-8)


# --- mixtures ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", CALIBRATED)
def test_an_expert_that_saw_no_token_is_pruned_by_magnitude_and_named(make_model, windows, criterion):
    model = make_model("mixtral")
    # All scores are equal, and of equal scores the same two win for every token.
    for block in model.model.layers:
        nn.init.zeros_(block.mlp.gate.weight)
    before = snapshot(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        masks = prune(model, criterion, sparsity=0.5, group="layer", calibration=windows[:3], progress=False)
    named = [str(warning.message) for warning in caught]
    assert len(named) == 8
    for text in named:
        name = text.split("'")[1]
        assert text == f"no calibration data reached {name!r}: it is pruned by magnitude"
        matrix = prunable_matrices(model)[name]
        weight = matrix.view(before[matrix.parameter]).abs()
        mask = matrix.view(masks[matrix.parameter])
        assert weight[~mask].max() <= weight[mask].min()
    assert masks.sparsity() == 0.5


def test_a_layer_that_is_never_called_is_pruned_by_magnitude_and_named(images):
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.used(x)

    with pytest.warns(UserWarning, match=r"no calibration data reached 'idle\.weight'"):
        masks = prune(Idle(), "wanda", sparsity=0.5, calibration=torch.ones(3, 4), progress=False)
    assert masks.sparsity() == 0.5


# --- the data ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", CALIBRATED)
def test_the_size_of_the_batches_does_not_matter(make_model, windows, criterion):
    made = []
    for batch in (1, 5, 100):
        model = make_model("gemma2").double()
        prune(model, criterion, sparsity=0.5, calibration=windows[:7], batch=batch, progress=False)
        made.append(model)
    for one, two, three in zip(*(model.parameters() for model in made), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(one, three, rtol=1e-9, atol=1e-9)


def test_only_the_first_tokens_of_a_window_are_read(make_model, windows):
    found = []
    for data, options in ((windows[:5], {"length": 8}), (windows[:5, :8], {}), (windows[:5], {})):
        masks = prune(make_model("llama"), "wanda", sparsity=0.5, calibration=data, progress=False, **options)
        found.append(torch.cat([mask.flatten() for mask in masks.values()]))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_long_windows_are_cut_to_what_the_model_reads(make_model):
    windows = torch.randint(64, (3, 40), generator=torch.Generator().manual_seed(0))
    masks = prune(make_model("opt"), "wanda", sparsity=0.5, calibration=windows, length=16, progress=False)
    assert masks.sparsity() == 0.5


@pytest.mark.parametrize("criterion", CALIBRATED)
def test_nothing_is_drawn_from_the_global_generators(make_model, windows, criterion, generators_unchanged):
    one, two = (
        prune(make_model("opt"), criterion, sparsity=0.5, seed=seed, calibration=windows[:3], progress=False)
        for seed in (0, 1)
    )
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_masks_stay_where_the_model_lives_when_blocks_are_offloaded(make_model, windows, monkeypatch):
    """A block on another device: its weights get new storage, as a move gives them."""
    model, plain = (make_model("mixtral") for _ in range(2))
    monkeypatch.setattr(calibrating, "_compute_device", lambda model, offload: torch.device("cpu"))
    for block in model.model.layers:

        def moved(device, block=block):
            for parameter in block.parameters():
                parameter.data = parameter.data.clone()
            return block

        block.to = moved
    options = {"sparsity": 0.5, "calibration": windows[:5], "progress": False}
    masks = prune(model, "sparsegpt", offload=True, **options)
    wanted = prune(plain, "sparsegpt", **options)
    assert all(torch.equal(masks[name], wanted[name]) for name in wanted)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))

    # an error after the move is undone all the same
    model, before = make_model("mixtral"), snapshot(make_model("mixtral"))
    for block in model.model.layers:
        block.to = lambda device, block=block: [
            setattr(parameter, "data", parameter.data.clone()) for parameter in block.parameters()
        ]
    nn.init.constant_(model.model.layers[1].post_attention_layernorm.weight, torch.nan)
    before["model.layers.1.post_attention_layernorm.weight"].fill_(torch.nan)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts\.gate_up_proj\[\d\]' is NaN"):
        prune(model, "sparsegpt", offload=True, **options)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)
