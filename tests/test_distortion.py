"""Feature distortion against slow float64 references."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

import perpkit as pk
from perpkit.evaluation.distortion import (
    block_distortion,
    class_probabilities,
    feature_maps,
    linear_cka,
    map_layers,
    relative_error,
)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slow_cka(x: torch.Tensor, y: torch.Tensor) -> float:
    """By the Gram matrices over the inputs: HSIC(K, L) / √(HSIC(K, K) HSIC(L, L))."""
    n = len(x)
    centre = torch.eye(n, dtype=torch.float64) - torch.ones(n, n, dtype=torch.float64) / n

    def hsic(a, b):
        return torch.trace(a @ a.T @ centre @ b @ b.T @ centre)

    x, y = x.double(), y.double()
    return float(hsic(x, y) / (hsic(x, x) * hsic(y, y)).sqrt())


def noisy(model, scale: float = 0.1):
    """A copy whose weights differ a little."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(3)
    for parameter in other.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data += scale * parameter.data.abs().mean() * noise.to(parameter)
    return other


# --- errors and similarities ----------------------------------------------------------------------


def test_relative_error_is_that_of_all_values_together():
    x, y = random(2, 3, 4), random(2, 3, 4, seed=1)
    slow = sum((a - b) ** 2 for a, b in zip(x.flatten().tolist(), y.flatten().tolist(), strict=True)) ** 0.5
    slow /= sum(a**2 for a in x.flatten().tolist()) ** 0.5
    assert relative_error(x, y) == pytest.approx(slow, rel=1e-12)
    assert relative_error(x.bfloat16(), x.bfloat16()) == 0.0


def test_an_error_against_zeros():
    zeros = torch.zeros(2, 2)
    assert relative_error(zeros, zeros) == 0.0
    assert relative_error(zeros, torch.ones(2, 2)) == math.inf
    assert math.isnan(relative_error(zeros, torch.full((2, 2), math.nan)))


def test_an_error_needs_one_shape():
    with pytest.raises(ValueError, match=r"\[2, 3\] and \[3, 2\]"):
        relative_error(torch.zeros(2, 3), torch.zeros(3, 2))


@given(st.integers(2, 12), st.integers(1, 6), st.integers(1, 6), st.integers(0, 5))
def test_cka_is_that_of_the_gram_matrices(n, d, e, seed):
    x, y = random(n, d, seed=seed), random(n, e, seed=seed + 100)
    assert linear_cka(x, y) == pytest.approx(slow_cka(x, y), abs=1e-9)


def test_cka_does_not_see_rotations_scales_and_shifts():
    x, y = random(20, 5), random(20, 5, seed=1)
    rotation, _ = torch.linalg.qr(random(5, 5, seed=2))
    assert linear_cka(x, -3 * x @ rotation + 7) == pytest.approx(1, abs=1e-12)
    assert linear_cka(x @ rotation, y) == pytest.approx(linear_cka(x, y), abs=1e-12)


def test_cka_of_what_is_not_correlated_is_zero():
    x = torch.tensor([[1.0], [1.0], [-1.0], [-1.0]])
    y = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]])
    assert linear_cka(x, y) == 0.0


def test_cka_keeps_its_digits_beside_a_large_mean():
    x, y = random(30, 4), random(30, 4, seed=1)
    assert linear_cka(x + 1e6, y - 1e6) == pytest.approx(slow_cka(x, y), abs=1e-6)


@pytest.mark.parametrize("constant", [0.0, 0.1, 1e6])
def test_cka_with_what_never_changes_is_not_a_number(constant):
    assert math.isnan(linear_cka(torch.full((7, 3), constant), random(7, 3)))


@pytest.mark.parametrize("shape", [(3, 2, 1), (4, 2), (3,)])
def test_cka_needs_two_representations_of_the_same_inputs(shape):
    with pytest.raises(ValueError, match="of the same n inputs"):
        linear_cka(torch.zeros(3, 2), torch.zeros(shape))


def test_cka_needs_two_inputs():
    with pytest.raises(ValueError, match="at least two"):
        linear_cka(torch.zeros(1, 2), torch.zeros(1, 2))


# --- blocks ---------------------------------------------------------------------------------------


def test_every_architecture_against_its_own_hidden_states(any_model, windows):
    other = noisy(any_model)
    table = block_distortion(any_model, other, windows, batch=5)
    with torch.no_grad():
        x, y = (
            m(windows, output_hidden_states=True, use_cache=False).hidden_states for m in (any_model, other)
        )
    # The last of them has passed the final normalisation.
    assert len(table) == len(x) - 1 == 2
    assert table["error"][0] == pytest.approx(
        float((x[1] - y[1]).double().norm() / x[1].double().norm()), rel=1e-4
    )
    assert table["cka"][0] == pytest.approx(slow_cka(x[1].flatten(0, 1), y[1].flatten(0, 1)), abs=1e-4)
    assert 0 < table["error"][0] < 1
    assert 0 < table["cka"][1] < 1


def test_the_last_block_is_seen_before_the_final_normalisation(make_model, windows):
    model = make_model("llama")
    other, seen = noisy(model), []
    for each in (model, other):
        hook = each.model.norm.register_forward_pre_hook(
            lambda _, arguments: seen.append(arguments[0].detach())
        )
        each(windows)
        hook.remove()
    table = block_distortion(model, other, windows, batch=12)
    assert table["error"].iloc[-1] == pytest.approx(relative_error(*seen), rel=1e-6)
    assert table["layer"].tolist() == ["model.layers.0", "model.layers.1"]
    assert table["block"].tolist() == [0, 1]


@pytest.mark.parametrize("batch", [1, 5, 12, 99])
def test_the_batch_does_not_matter(make_model, windows, batch):
    model = make_model("opt")
    other = noisy(model)
    whole = block_distortion(model, other, windows, batch=12)
    table = block_distortion(model, other, windows, batch=batch)
    assert table["error"].tolist() == pytest.approx(whole["error"].tolist(), rel=1e-6)
    assert table["cka"].tolist() == pytest.approx(whole["cka"].tolist(), abs=1e-6)


def test_a_model_is_like_itself(make_model, windows):
    model = make_model("gpt2")
    table = block_distortion(model, model, windows)
    assert table["error"].tolist() == [0.0, 0.0]
    assert table["cka"].tolist() == pytest.approx([1.0, 1.0], abs=1e-12)


def test_16_bits(make_model, windows):
    model = make_model("llama")
    table = block_distortion(model, copy.deepcopy(model).bfloat16(), windows)
    assert table["error"].between(1e-5, 0.1).all()


def test_the_models_are_left_as_they_are(make_model, windows, generators_unchanged):
    dense, other = make_model("opt", dropout=0.5), make_model("opt", dropout=0.5, seed=1)
    dense.train()
    before = copy.deepcopy(dense.state_dict())
    first = block_distortion(dense, other, windows)
    assert block_distortion(dense, other, windows).equals(first)
    assert dense.training
    assert not other.training
    assert all(torch.equal(before[name], value) for name, value in dense.state_dict().items())
    assert not any(m._forward_hooks for each in (dense, other) for m in each.modules())


def test_cancelled_it_has_no_numbers_and_no_hooks(make_model, windows):
    model, asked = make_model("opt"), []
    table = block_distortion(
        model, noisy(model), windows, batch=4, cancelled=lambda: bool(asked) or asked.append(1)
    )
    assert table[["error", "cka"]].isna().all(axis=None)
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_hidden_layers": 3}, "2 blocks and the other 3"),
        ({"hidden_size": 16}, "hidden states have the shapes"),
    ],
)
def test_models_of_other_shapes_are_refused(make_model, windows, changes, said):
    model, other = make_model("llama"), make_model("llama", **changes)
    with pytest.raises(ValueError, match=said):
        block_distortion(model, other, windows)
    assert not any(m._forward_hooks for m in model.modules())


def test_bad_arguments(make_model, make_vision, windows):
    model = make_model("llama")
    with pytest.raises(ValueError, match="reads no tokens"):
        block_distortion(model, make_vision("cifar"), windows)
    with pytest.raises(ValueError, match="vocabulary"):
        block_distortion(model, model, windows + 64)
    with pytest.raises(ValueError, match="batch is 0"):
        block_distortion(model, model, windows, batch=0)


# --- feature maps ---------------------------------------------------------------------------------


def test_maps_of_a_convolution_and_the_normalisation_after_it(make_vision, images):
    model = make_vision("cifar").double()
    conv = F.conv2d(images.double(), model.conv1.weight, padding=1)
    norm = model.bn1
    centred = (conv - norm.running_mean[:, None, None]) / (norm.running_var[:, None, None] + norm.eps).sqrt()
    scaled = norm.weight[:, None, None] * centred + norm.bias[:, None, None]
    torch.testing.assert_close(feature_maps(model, images, "conv1"), conv, rtol=0, atol=1e-12)
    torch.testing.assert_close(feature_maps(model, images, "bn1"), scaled, rtol=0, atol=1e-12)


def test_an_activation_in_place_does_not_reach_the_maps(make_vision, images):
    model = make_vision("sequential")
    assert model[2].inplace
    wanted = model[1](model[0](images)).detach().clone()
    assert wanted.min() < 0
    torch.testing.assert_close(feature_maps(model, images, "1"), wanted)


def test_every_layer_of_every_network(any_vision, images):
    layers = map_layers(any_vision)
    for layer, filters in layers.items():
        maps = feature_maps(any_vision, images, layer)
        assert maps.shape[:2] == (5, filters)
        alone = feature_maps(any_vision, images[3:4], layer)
        torch.testing.assert_close(maps[3:4], alone, rtol=1e-4, atol=1e-4)
    assert len(layers) > 2


def test_the_network_is_left_as_it_is(make_vision, images, generators_unchanged):
    model = make_vision("cifar").train()
    before = copy.deepcopy(model.state_dict())
    maps = feature_maps(model, images, "bn1")
    class_probabilities(model, images)
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())
    assert not maps.requires_grad


def test_16_bits_take_pictures_of_32(make_vision, images):
    model = make_vision("cifar").bfloat16()
    assert feature_maps(model, images, "conv1").dtype == torch.bfloat16
    assert class_probabilities(model, images).dtype == torch.float32


@pytest.mark.parametrize("kind", ["cifar", "resnet"])
def test_class_probabilities(make_vision, images, kind):
    model = make_vision(kind)
    with torch.no_grad():
        output = model(images)
    logits = (output if kind == "cifar" else output.logits).double()
    wanted = logits.exp() / logits.exp().sum(1, keepdim=True)
    torch.testing.assert_close(class_probabilities(model, images).double(), wanted, rtol=1e-5, atol=1e-6)


def test_bad_layers_and_pictures(make_vision, images):
    model = make_vision("cifar")
    with pytest.raises(
        ValueError, match="no layer 'linear' makes feature maps; those that do are conv1, bn1"
    ):
        feature_maps(model, images, "linear")
    with pytest.raises(ValueError, match=r"pictures are \[3, 32, 32\]"):
        feature_maps(model, images[0], "conv1")
    model.spare = torch.nn.Conv2d(3, 3, 1)
    with pytest.raises(ValueError, match="do not pass the layer 'spare'"):
        feature_maps(model, images, "spare")


def test_pruning_more_distorts_more(make_vision, images):
    dense = make_vision("cifar")
    errors = []
    for sparsity in (0.3, 0.6, 0.9):
        pruned = copy.deepcopy(dense)
        pk.prune(pruned, "magnitude", sparsity=sparsity, progress=False)
        maps = [feature_maps(model, images, "layer2.0.bn1") for model in (dense, pruned)]
        errors.append(relative_error(*maps))
    assert errors == sorted(errors)
    assert errors[0] > 0
