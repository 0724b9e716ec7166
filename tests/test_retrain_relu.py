"""ReLU with a byte mask: the same function and gradients, only where the activation is not needed."""

import copy

import pytest
import torch
from torch import nn

from perpkit.pruning.prune import prune
from perpkit.retraining.loop.relu import ByteMaskReLU, byte_mask_relus
from perpkit.retraining.loop.retrain import retrain
from perpkit.retraining.subsets import subset_parameters, untie_head


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_values_and_gradients_are_those_of_relu(dtype, inplace):
    values = torch.tensor([[-2.0, -0.0, 0.0, 1e-6], [3.0, -torch.inf, torch.inf, 0.5]], dtype=dtype)
    upstream = torch.tensor([[1.0, 2.0, 3.0, 4.0], [-5.0, 6.0, 7.0, 8.0]], dtype=dtype)
    found = []
    for relu in (nn.ReLU(inplace), ByteMaskReLU(inplace)):
        x = values.clone().requires_grad_()
        y = x * 1
        out = relu(y)
        assert (out.data_ptr() == y.data_ptr()) == inplace
        found.append((out.detach().clone(), *torch.autograd.grad(out, x, upstream)))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_finite_differences_agree():
    x = torch.tensor([[-1.0, 2.0], [0.5, -0.3]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ByteMaskReLU(), x)


def test_one_byte_a_value_is_kept():
    x = torch.randn(8, 16, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ByteMaskReLU()(x)
    assert [t.untyped_storage().nbytes() for t in kept] == [8 * 16]


def changed(model, subset):
    with byte_mask_relus(model, subset_parameters(model, subset)):
        return [name for name, module in model.named_modules() if isinstance(module, ByteMaskReLU)]


def test_it_is_put_where_no_matrix_of_the_block_is_trained(make_model):
    model = make_model("opt")
    untie_head(model)
    activations = ["model.decoder.layers.0.activation_fn", "model.decoder.layers.1.activation_fn"]
    for subset in ("biases", "norms", "biases+norms", "head", "embeddings"):
        assert changed(model, subset) == activations, subset
    assert changed(model, "full") == []
    with byte_mask_relus(model, {"model.decoder.layers.0.fc2.weight"}):
        assert isinstance(model.get_submodule(activations[1]), ByteMaskReLU)
        assert type(model.get_submodule(activations[0])) is nn.ReLU
    assert changed(make_model("opt", activation_function="gelu"), "biases") == []


def test_subclasses_with_a_mind_of_their_own_are_left():
    class Other(nn.ReLU):
        def forward(self, input):
            return 2 * super().forward(input)

    model = nn.Sequential(nn.Linear(2, 2), Other(), nn.Linear(2, 2))
    assert changed(model, "biases") == []


@pytest.mark.parametrize("end", ["done", "error"])
def test_classes_come_back(make_model, windows, end):
    model = make_model("opt")
    masks = prune(model, "magnitude", sparsity=0.5)
    inside = []

    def look(step, loss):
        inside.append(type(model.model.decoder.layers[0].activation_fn))
        if end == "error":
            raise RuntimeError("the caller's own")

    options = {"steps": 1, "lr": 1e-2, "batch": 3, "progress": False, "on_step": look}
    try:
        retrain(model, windows, masks=masks, subset="biases", **options)
    except RuntimeError:
        assert end == "error"
    assert inside == [ByteMaskReLU]
    assert type(model.model.decoder.layers[0].activation_fn) is nn.ReLU


def test_retraining_with_it_gives_the_same_bits(make_model, windows, monkeypatch):
    model = make_model("opt")
    masks = prune(model, "magnitude", sparsity=0.5)
    plain = copy.deepcopy(model)
    options = {
        "masks": masks,
        "subset": "biases+norms",
        "steps": 5,
        "lr": 1e-2,
        "batch": 3,
        "progress": False,
    }
    retrain(model, windows, **options)
    monkeypatch.setattr(ByteMaskReLU, "forward", nn.ReLU.forward)
    retrain(plain, windows, **options)
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other)
