"""MaskLoRA's linear map: its gradients, its mask, what it keeps, and where it has to work."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from perpkit.retraining.adapters.masklora import _forward, mask_lora_linear

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")),
]
SIGMA = 1.5


def case(rows=5, columns=7, rank=2, *, lead=(2, 3), dtype=torch.float64, device="cpu", transposed=False):
    """x, weight, mask, A, B (both at least float32) and bias; transposed as GPT-2 stores its weights."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, dtype=dtype):
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
        return drawn.to(device, dtype).requires_grad_()

    weight, mask = normal(rows, columns), torch.rand(rows, columns, generator=generator).to(device) > 0.5
    if transposed:
        weight = weight.detach().t().contiguous().t().requires_grad_()
        mask = mask.t().contiguous().t()
    factor = torch.promote_types(dtype, torch.float32)
    a, b = normal(rank, columns, dtype=factor), normal(rows, rank, dtype=factor)
    return normal(*lead, columns), weight, mask, a, b, normal(rows)


def formula(x, weight, mask, a, b, bias=None):
    return F.linear(x, weight + mask * (SIGMA * (b @ a)), bias)


def gradients(function, inputs, wanted=(0, 1, 3, 4, 5)):
    """The output and the gradients of the inputs, for a loss that weighs every output differently."""
    y = function(*inputs)
    weights = torch.linspace(-1, 1, y.numel(), device=y.device).view(y.shape)
    for place in wanted:
        inputs[place].grad = None
    (y * weights.to(y.dtype)).sum().backward()
    return [y.detach(), *(inputs[place].grad for place in wanted)]


def doubled(inputs):
    return [t.detach().double().requires_grad_() if t.is_floating_point() else t for t in inputs]


def ours(*inputs, **options):
    return mask_lora_linear(*inputs, scale=SIGMA, **options)


# --- the function and its gradients -----------------------------------------------------------------


def test_by_hand():
    W, M = torch.tensor([[2.0, 5.0], [3.0, 4.0]]), torch.tensor([[True, False], [False, True]])
    x, A, B = torch.tensor([[1.0, 10.0]]), torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0], [3.0]])
    A.requires_grad_(), B.requires_grad_(), x.requires_grad_()
    y = mask_lora_linear(x, W, M, A, B, scale=0.5)
    # The effective weight is [[2 + .5·1·1, 5], [3, 4 + .5·3·2]].
    assert y.tolist() == [[52.5, 73.0]]
    y.backward(torch.tensor([[1.0, 1.0]]))
    # E = (gᵀx) ⊙ M = [[1, 0], [0, 10]].
    assert B.grad.tolist() == [[0.5], [10.0]]
    assert A.grad.tolist() == [[0.5, 15.0]]
    assert x.grad.tolist() == [[5.5, 12.0]]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("block", [1, 3, 512])
@pytest.mark.parametrize("lead", [(), (4,), (2, 3)])
def test_gradcheck(lead, block, transposed):
    x, weight, mask, a, b, bias = case(lead=lead, transposed=transposed)

    def function(x, weight, a, b, bias):
        return ours(x, weight, mask, a, b, bias, block=block)

    assert torch.autograd.gradcheck(function, (x, weight, a, b, bias))


@given(
    sizes=st.tuples(*[st.integers(1, 9)] * 4),
    block=st.integers(1, 10),
    transposed=st.booleans(),
    biased=st.booleans(),
)
def test_equals_plain_autograd(sizes, block, transposed, biased):
    rows, columns, rank, tokens = sizes
    inputs = case(rows, columns, rank, lead=(2, tokens), transposed=transposed)
    inputs, wanted = (inputs, (0, 1, 3, 4, 5)) if biased else (inputs[:5], (0, 1, 3, 4))
    found = gradients(lambda *i: ours(*i, block=block), inputs, wanted)
    for mine, plain in zip(found, gradients(formula, inputs, wanted), strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_as_exact_as_plain_autograd_in_few_bits(dtype, device):
    inputs = case(96, 80, 4, lead=(2, 40), dtype=dtype, device=device)
    exact = gradients(formula, doubled(inputs))
    mine = gradients(lambda *i: ours(*i, block=16), inputs)
    plain = gradients(lambda x, w, m, a, b, c: formula(x, w, m, a.to(w.dtype), b.to(w.dtype), c), inputs)
    for one, other, truth in zip(mine, plain, exact, strict=True):
        assert one.dtype == other.dtype
        error, reference = ((found.double() - truth).norm() / truth.norm() for found in (one, other))
        assert error <= 1.3 * reference + 1e-6


@pytest.mark.parametrize("wanted", [w for n in (1, 2) for w in itertools.combinations((0, 1, 3, 4, 5), n)])
def test_each_gradient_alone(wanted):
    inputs = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(case())]
    for mine, plain in zip(gradients(ours, inputs, wanted), gradients(formula, inputs, wanted), strict=True):
        torch.testing.assert_close(mine, plain)


def test_no_tokens():
    inputs = case(lead=(0,))
    y, dx, dw, da, db, dbias = gradients(ours, inputs)
    assert y.shape == (0, 5)
    assert dx.shape == (0, 7)
    assert not any(gradient.any() for gradient in (dw, da, db, dbias))


def test_expanded_gradient_and_strided_input():
    x, weight, mask, a, b, bias = case(lead=(7, 3))
    strided = x.detach().transpose(0, 1).requires_grad_()
    found = []
    for function in (ours, formula):
        a.grad = None
        function(strided, weight, mask, a, b, bias).sum().backward()
        found.append(a.grad)
    torch.testing.assert_close(*found)


# --- the mask ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_kept_weight_of_zero_trains_and_a_pruned_one_of_any_value_does_not(dtype, transposed):
    x, weight, mask, a, b, _ = case(dtype=dtype, transposed=transposed)
    with torch.no_grad():
        weight.masked_fill_(mask, 0.0)
    identity = torch.eye(7, dtype=dtype)
    update = (ours(identity, weight, mask, a, b).t() - weight).detach()
    assert update[mask].all()
    assert not update[~mask].any()
    inputs, close = (x, weight, mask, a, b), 20 * torch.finfo(dtype).eps
    plain = gradients(lambda x, w, m, a, b: formula(x, w, m, a.to(dtype), b.to(dtype)), inputs, (3, 4))
    for mine, wanted in zip(gradients(ours, inputs, (3, 4)), plain, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=close, atol=close)


@pytest.mark.parametrize("device", DEVICES)
def test_an_infinite_update_does_not_reach_a_pruned_weight(device):
    _, weight, mask, a, b, _ = case(dtype=torch.float32, device=device)
    with torch.no_grad():
        a[:, 2] = torch.inf
    mask[:, 2] = False
    y = ours(torch.ones(1, 7, device=device), weight, mask, a, b)
    assert y.isfinite().all()


@pytest.mark.parametrize("wide", [3, 2**18 + 3])
def test_masks_of_many_entries(wide):
    # Wider or longer than what is masked at once.
    mask = torch.rand(3, wide, generator=torch.Generator().manual_seed(0)) > 0.5
    for kept in (mask, mask.t()):
        rows, columns = kept.shape
        a, b = torch.ones(1, columns), torch.ones(rows, 1)
        y = ours(torch.ones(1, columns), torch.zeros(kept.shape), kept, a, b)
        torch.testing.assert_close(y, SIGMA * kept.sum(1).float()[None])


# --- what it keeps and where it works ---------------------------------------------------------------


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autograd_saves_the_inputs_only(dtype, autocast):
    inputs = case(dtype=dtype)
    saved = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours(*inputs)
    assert {t.data_ptr() for t in saved} == {t.data_ptr() for t in inputs[:5]}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype, device):
    inputs = case(96, 80, 4, lead=(2, 40), dtype=torch.float32, device=device)
    exact = gradients(formula, doubled(inputs))

    def within(function):
        with torch.autocast(device, dtype):
            return function(*inputs)

    mine, plain = (gradients(lambda *_, f=f: within(f), inputs) for f in (ours, formula))
    assert mine[0].dtype == dtype
    for one, other, truth in zip(mine, plain, exact, strict=True):
        assert one.dtype == other.dtype
        error, reference = ((found.double() - truth).norm() / truth.norm() for found in (one, other))
        assert error <= 1.3 * reference


def test_autocast_leaves_float64_alone():
    inputs = case()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours(*inputs), ours(*inputs, block=512))
        assert ours(*inputs).dtype == torch.float64


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_gradient_checkpointing(reentrant, autocast):
    inputs = case(dtype=torch.float32)

    def recomputed(*inputs):
        return checkpoint(ours, *inputs, use_reentrant=reentrant)

    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for mine, plain in zip(gradients(recomputed, inputs), gradients(ours, inputs), strict=True):
            assert torch.equal(mine, plain)


@pytest.mark.parametrize("autocast", [False, True])
def test_compile(autocast):
    inputs = case(dtype=torch.float32)

    def function(x, *others):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return ours(x.sin(), *others).cos()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for mine, plain in zip(gradients(compiled, inputs), gradients(function, inputs), strict=True):
        torch.testing.assert_close(mine, plain)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_well_behaved_operator(dtype):
    torch.library.opcheck(_forward, (*case(dtype=dtype), SIGMA, 2, dtype))


def test_gradients_of_gradients_are_refused():
    inputs = case()
    (da,) = torch.autograd.grad(ours(*inputs).sum(), inputs[3], create_graph=True)
    with pytest.raises(RuntimeError, match="mask_lora_linear_backward"):
        da.sum().backward()


# --- mistakes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "wrong", "message"),
    [
        (0, torch.ones(2, 6).double(), r"x is \[2, 6\]; with a weight \[5, 7\] it must be \[2, 7\]"),
        (0, torch.ones(2, 7), "x is torch.float32 and the weight torch.float64"),
        (1, torch.ones(5, 7, 1).double(), "mask is"),
        (2, torch.ones(7, 5) > 0, r"mask is \[7, 5\]"),
        (2, torch.ones(5, 7), "masks are boolean"),
        (3, torch.ones(2, 5).double(), r"lora_A is \[2, 5\]"),
        (4, torch.ones(5, 3).double(), r"lora_B is \[5, 3\]"),
        (5, torch.ones(7).double(), r"bias is \[7\]"),
    ],
)
def test_what_does_not_fit_is_refused(place, wrong, message):
    inputs = list(case())
    inputs[place] = wrong
    with pytest.raises(ValueError, match=message):
        ours(*inputs)


def test_no_block_is_refused():
    with pytest.raises(ValueError, match="block is 0; it must be at least 1"):
        ours(*case(), block=0)
