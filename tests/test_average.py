"""Averages of models: hand-worked, exact for equal ones, refused for different ones; and the greedy soup."""

import copy
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from perpkit.pruning.masks import Masks
from perpkit.pruning.prune import prune
from perpkit.retraining.adapters.attach import attach
from perpkit.retraining.batchnorm import recalibrate_batchnorm
from perpkit.retraining.soups.average import average, greedy

NUMBERS = st.floats(-1e6, 1e6, width=32)


def linear(values, bias=0.0):
    model = nn.Linear(len(values), 1)
    model.weight.data[:] = torch.tensor(values)
    model.bias.data.fill_(bias)
    return model


def states(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one, other):
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


def perturbed(model, masks, seed, size=0.1):
    """A copy with noise on its kept weights, as if it had been retrained."""
    generator = torch.Generator().manual_seed(seed)
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        parameter.data += size * torch.randn(parameter.shape, generator=generator).to(parameter)
    masks.apply(other)
    return other


def test_by_hand():
    models = [linear([1.0, 0.0, 5.0], 1.0), linear([4.0, 0.0, -1.0], 2.0), linear([4.0, 0.0, 2.0], 6.0)]
    before = [states(model) for model in models]
    mean = average(models)
    assert mean.weight.tolist() == [[3.0, 0.0, 2.0]]
    assert mean.bias.tolist() == [3.0]
    assert average(models, weights=[1, 1, 2]).weight.tolist() == [[3.25, 0.0, 2.0]]
    assert average(models, weights=[0, 0, 0.1]).weight.tolist() == models[2].weight.tolist()
    assert average([dict(state) for state in before])["weight"].tolist() == [[3.0, 0.0, 2.0]]
    assert all(same(states(model), state) for model, state in zip(models, before, strict=True))
    assert all(mean.weight.data_ptr() != model.weight.data_ptr() for model in models)


def test_buffers():
    """Statistics are averaged, counts are those of the first."""
    models = [nn.BatchNorm1d(1), nn.BatchNorm1d(1)]
    for number, model in enumerate(models):
        model.running_mean.fill_(number + 1)
        model.num_batches_tracked.fill_(7 * number + 3)
    mean = average(models)
    assert (mean.running_mean.item(), mean.num_batches_tracked.item()) == (1.5, 3)


def test_sums_are_in_float64_and_the_dtype_comes_back():
    """In bfloat16 256 + 1 is 256, and a running sum of ones would stop there."""
    models = [linear([256.0]).bfloat16()] + [linear([1.0]).bfloat16() for _ in range(255)]
    mean = average(models)
    assert mean.weight.dtype == torch.bfloat16
    assert mean.weight.item() == torch.tensor((256 + 255) / 256).bfloat16().item()


@given(st.lists(NUMBERS, min_size=1, max_size=5), st.integers(1, 6), st.data())
def test_equal_models_are_their_average(values, count, data):
    weights = data.draw(st.lists(st.floats(0.01, 10), min_size=count, max_size=count))
    for dtype in (torch.float32, torch.float64):
        model = linear(values).to(dtype)
        mean = average([copy.deepcopy(model) for _ in range(count)], weights=weights)
        assert same(states(mean), states(model))


@given(st.lists(st.lists(NUMBERS, min_size=3, max_size=3), min_size=2, max_size=4), st.data())
def test_the_order_changes_nothing_but_the_rounding(rows, data):
    weights = data.draw(st.lists(st.floats(0.01, 10), min_size=len(rows), max_size=len(rows)))
    expected = torch.tensor(rows, dtype=torch.float64).T @ torch.tensor(weights, dtype=torch.float64)
    expected /= sum(weights)
    for order in itertools.permutations(range(len(rows))):
        mean = average([linear(rows[i]) for i in order], weights=[weights[i] for i in order])
        assert torch.allclose(mean.weight.double()[0], expected, rtol=2e-7, atol=1e-9)


def test_any_architecture_stays_sparse(any_model):
    """Tied heads stay tied, and fused experts are averaged as everything else."""
    masks = prune(any_model, "magnitude", sparsity=0.6, progress=False)
    models = [perturbed(any_model, masks, seed) for seed in range(3)]
    mean = average(models, masks)
    masks.check(mean)
    for name, value in mean.named_parameters():
        several = torch.stack([dict(model.named_parameters())[name].double() for model in models])
        assert torch.allclose(value.double(), several.mean(0), rtol=1e-6, atol=1e-9), name
    assert [name for name, _ in mean.named_parameters()] == [n for n, _ in any_model.named_parameters()]
    assert sum(int((mean.get_parameter(n) == 0).sum()) for n in masks) == sum(
        int((~mask).sum()) for mask in masks.values()
    )


# --- what is refused ------------------------------------------------------------------------------


def test_another_mask_names_the_layer(make_model):
    model = make_model("opt")
    one, two = copy.deepcopy(model), copy.deepcopy(model)
    masks = prune(one, "magnitude", sparsity=0.5, progress=False)
    others = prune(two, "random", sparsity=0.5, progress=False)
    name = next(iter(masks))
    with pytest.raises(ValueError, match=rf"model 1 has another mask in '{name}'"):
        average([one, two], masks)
    with pytest.raises(ValueError, match=rf"masks 0 and 1 differ in '{name}'"):
        average([one, two], [masks, others])
    with pytest.raises(ValueError, match=r"only one of the masks 0 and 1 has"):
        average([one, two], [masks, Masks({name: masks[name]})])
    with pytest.raises(ValueError, match="1 masks for 2 models"):
        average([one, two], [masks])
    average([one, one], [masks, copy.deepcopy(masks)])


def test_other_shapes_tensors_and_adapters_name_the_layer(make_model):
    with pytest.raises(ValueError, match=r"'weight' is \(1, 2\) in the first model and \(1, 3\) in model 1"):
        average([linear([1.0, 2.0]), linear([1.0, 2.0, 3.0])])
    with pytest.raises(ValueError, match="only one of the first model and model 1 has a 'bias'"):
        average([linear([1.0]), nn.Linear(1, 1, bias=False)])
    with pytest.raises(ValueError, match="there are no models"):
        average([])
    with pytest.raises(ValueError, match="masks belong to other models: they have no 'v'"):
        average([linear([1.0])], Masks({"v": torch.tensor([True])}))
    model = make_model("opt")
    masks = prune(model, "magnitude", sparsity=0.5, progress=False)
    attach(model, masks, "mask_lora", rank=2)
    with pytest.raises(ValueError, match="model 0 has adapters"):
        average([model, model], masks)
    # As PEFT names its own.
    for name in ("layer.lora_A.default.weight", "lora_B.weight"):
        with pytest.raises(ValueError, match="model 1 has adapters"):
            average([{"w": torch.ones(1)}, {name: torch.ones(1)}])
    flora = {"flora_net.weight": torch.ones(1)}
    assert average([flora, flora]) == flora


@pytest.mark.parametrize("weights", [[1.0], [1.0, -1.0], [0.0, 0.0], [1.0, float("nan")]], ids=str)
def test_bad_weights(weights):
    with pytest.raises(ValueError, match="weights are"):
        average([linear([1.0]), linear([2.0])], weights=weights)


# --- greedy ---------------------------------------------------------------------------------------


def test_greedy_by_hand():
    """Target 3: 4 alone scores −1; with 1 the mean 2.5 is better, with 8 it is 4.33 and worse."""
    models, asked = [linear([value]) for value in (8.0, 1.0, 4.0)], []

    def score(model):
        asked.append(model.weight.item())
        return -abs(model.weight.item() - 3)

    soup, chosen, scores = greedy(models, score, Masks({}))
    assert (soup.weight.item(), chosen, scores) == (2.5, [2, 1], [-5.0, -2.0, -1.0])
    assert asked[:4] == [8.0, 1.0, 4.0, 2.5]
    assert [model.weight.item() for model in models] == [8.0, 1.0, 4.0]


def test_greedy_keeps_what_changes_nothing_and_is_never_worse_than_the_best(make_vision, images):
    model = make_vision("sequential")
    masks = prune(model, "magnitude", sparsity=0.5, progress=False)
    models = [perturbed(model, masks, seed, size=0.05) for seed in range(4)]
    target = model(images).detach()

    def score(candidate):
        return -(candidate(images) - target).square().sum().item()

    def prepare(candidate):
        recalibrate_batchnorm(candidate, images)

    soup, chosen, scores = greedy(models, score, masks, prepare)
    masks.check(soup)
    assert score(soup) >= max(scores)
    assert chosen[0] == max(range(4), key=scores.__getitem__)
    assert greedy([models[0]] * 3, score, masks, prepare)[1] == [0, 1, 2]
    # What was scored is the re-estimated average, and so is what comes back.
    again = average([models[i] for i in chosen], masks)
    prepare(again)
    assert same(states(again), states(soup))


def test_greedy_refuses(make_vision):
    model = make_vision("sequential")
    with pytest.raises(ValueError, match="batch normalisations"):
        greedy([model], lambda model: 1.0, Masks({}))
    with pytest.raises(ValueError, match="is NaN"):
        greedy([linear([1.0])], lambda model: float("nan"), Masks({}))
    with pytest.raises(ValueError, match="there are no models"):
        greedy([], lambda model: 1.0, Masks({}))
