"""MaskLoRA's kernels for a GPU, run on one or else by Triton's interpreter: they are the formula."""

import os

import pytest
import torch

from perpkit.retraining.adapters import masklora
from perpkit.retraining.adapters.masklora import mask_lora_linear

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    # Before Triton is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton", reason="Triton is not installed; it comes with torch for GPUs")

from perpkit.retraining.adapters import fused  # noqa: E402

BOUNDS = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
# The interpreter gets sums of bfloat16 wrong.
TYPES = [*BOUNDS] if DEVICE == "cuda" else [torch.float32, torch.float16]


def close(found: torch.Tensor, wanted: torch.Tensor, bound: float) -> bool:
    return bool((found.double() - wanted).norm() <= bound * wanted.norm())


def layer(rows: int, columns: int, rank: int, transposed: bool = False) -> list[torch.Tensor]:
    """A pruned weight, its mask and factors."""
    draw = torch.Generator().manual_seed(rows + columns + rank)
    weight, a, b = (
        torch.randn(shape, generator=draw) for shape in ((rows, columns), (rank, columns), (rows, rank))
    )
    mask = torch.rand(rows, columns, generator=draw) > 0.5
    weight = weight * mask
    # A zero that is kept, which the mask alone knows.
    weight[mask.nonzero()[0].unbind()] = 0
    if transposed:
        weight, mask = (each.t().contiguous().t() for each in (weight, mask))
    return [each.to(DEVICE) for each in (weight, mask, a, b)]


@pytest.fixture
def few_parts(monkeypatch):
    """The interpreter takes its time for each of them."""
    if DEVICE == "cpu":
        monkeypatch.setattr(fused, "PARTS", 3)


SHAPES = [(64, 128, 16), (37, 150, 4), (130, 70, 33), (1, 1, 1)]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("transposed", [False, True])
def test_the_effective_weight_is_that_of_the_formula(dtype, shape, transposed):
    weight, mask, a, b = layer(*shape, transposed)
    weight = weight.to(dtype)
    out = torch.full_like(weight, torch.nan)
    fused.effective(weight, mask, a, b, 0.7, out)
    assert close(out, weight.double() + mask * 0.7 * (b.double() @ a.double()), BOUNDS[dtype])


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("transposed", [False, True])
def test_the_gradients_of_the_factors_are_those_of_the_formula(dtype, shape, transposed, few_parts):
    weight, mask, a, b = layer(*shape, transposed)
    outer = torch.empty_like(weight, dtype=dtype).copy_(torch.randn(weight.shape))
    of_a, of_b = fused.factor_gradients(outer, mask, a, b, 0.7)
    pruned = outer.double() * mask
    assert of_a.dtype == of_b.dtype == torch.float32
    assert close(of_a, 0.7 * b.double().T @ pruned, BOUNDS[dtype])
    assert close(of_b, 0.7 * pruned @ a.double().T, BOUNDS[dtype])


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("transposed", [False, True])
def test_sums_go_on_over_all_tiles_of_a_part(dtype, transposed, monkeypatch):
    # Two tiles in each direction, and three of float32.
    monkeypatch.setattr(fused, "PARTS", 1)
    weight, mask, a, b = layer(130, 170, 4, transposed)
    outer = torch.empty_like(weight, dtype=dtype).copy_(torch.randn(weight.shape))
    of_a, of_b = fused.factor_gradients(outer, mask, a, b, 0.7)
    pruned = outer.double() * mask
    assert close(of_a, 0.7 * b.double().T @ pruned, BOUNDS[dtype])
    assert close(of_b, 0.7 * pruned @ a.double().T, BOUNDS[dtype])


def test_what_is_pruned_may_be_infinite_in_the_gradient(few_parts):
    weight, mask, a, b = layer(8, 16, 2)
    outer = torch.where(mask, weight, torch.inf)
    for found in fused.factor_gradients(outer, mask, a, b, 1.0):
        assert found.isfinite().all()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("frozen", [(), ("x",), ("a",), ("b",), ("a", "b"), ("x", "a", "b")])
@pytest.mark.parametrize("train_weight", [False, True])
def test_the_linear_map_has_the_gradients_of_plain_autograd(
    transposed, frozen, train_weight, few_parts, monkeypatch
):
    monkeypatch.setattr(masklora, "kernels", lambda *tensors: fused)
    weight, mask, a, b = layer(20, 24, 3, transposed)
    named = {
        "x": torch.randn(2, 5, 24, device=DEVICE),
        "weight": weight,
        "a": a,
        "b": b,
        "bias": torch.randn(20, device=DEVICE),
    }
    wanted = {name for name in named if name not in frozen and (name != "weight" or train_weight)}
    results = []
    for dtype in (torch.float32, torch.float64):
        given = {name: each.detach().to(dtype).requires_grad_(name in wanted) for name, each in named.items()}
        if dtype == torch.float32:
            y = mask_lora_linear(
                given["x"], given["weight"], mask, given["a"], given["b"], given["bias"], scale=0.7
            )
        else:
            effective = given["weight"] + mask * 0.7 * (given["b"] @ given["a"])
            y = given["x"] @ effective.T + given["bias"]
        slope = torch.linspace(-1, 1, y.numel(), device=DEVICE, dtype=dtype).view(y.shape)
        found = torch.autograd.grad(y, [given[name] for name in sorted(wanted)], slope)
        results.append((y, *found))
    for mine, other in zip(*results, strict=True):
        assert close(mine.detach(), other.detach(), 1e-5)


def test_the_operator_that_compilers_see_gives_the_same(few_parts, monkeypatch):
    monkeypatch.setattr(masklora, "kernels", lambda *tensors: fused)
    weight, mask, a, b = layer(20, 24, 3)
    x = torch.randn(2, 5, 24, device=DEVICE).requires_grad_()
    a.requires_grad_(), b.requires_grad_()
    ours = mask_lora_linear(x, weight, mask, a, b, scale=0.7)
    seen = masklora._forward(x, weight, mask, a, b, None, 0.7, masklora.BLOCK, x.dtype)
    assert torch.equal(ours, seen)
    slope = torch.randn_like(ours)
    for one, other in zip(*(torch.autograd.grad(y, (x, a, b), slope) for y in (ours, seen)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("needed", [(True, False, True, True), (True, True, True, True)])
def test_compilers_are_told_the_shapes_and_types_of_the_operators_gradients(
    transposed, needed, few_parts, monkeypatch
):
    monkeypatch.setattr(masklora, "kernels", lambda *tensors: fused)
    weight, mask, a, b = layer(20, 24, 3, transposed)
    x, grad = torch.randn(10, 24, device=DEVICE), torch.randn(10, 20, device=DEVICE)
    inputs = (grad, x, weight, mask, a, b, 0.7, masklora.BLOCK, *needed)
    torch.library.opcheck(masklora._backward, inputs, test_utils=("test_schema", "test_faketensor"))


def test_a_backward_pass_under_autocast_is_as_exact_as_without(few_parts, monkeypatch):
    monkeypatch.setattr(masklora, "kernels", lambda *tensors: fused)
    weight, mask, a, b = layer(20, 24, 3)
    x = torch.randn(10, 24, device=DEVICE).requires_grad_()
    found = []
    for inside in (False, True):
        y = mask_lora_linear(x, weight, mask, a.requires_grad_(), b.requires_grad_(), scale=0.7)
        with torch.autocast(DEVICE, torch.float16, enabled=inside):
            found.append(torch.autograd.grad(y, (x, a, b), torch.ones_like(y)))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_gradients_of_factors_alone_do_not_change_what_they_read(few_parts):
    _, mask, a, b = layer(20, 24, 3)
    outer = torch.randn(20, 24, device=DEVICE)
    before = outer.clone()
    one, other = (fused.factor_gradients(outer, mask, a, b, 0.7) for _ in range(2))
    assert torch.equal(outer, before)
    # In the same order every time, to the last bit.
    assert torch.equal(one[0], other[0])
    assert torch.equal(one[1], other[1])
