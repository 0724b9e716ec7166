"""The chunked loss: the plain formula's value and gradients, whatever the model does with its head."""

import copy

import pytest
import torch
from torch.nn import functional as F

from perpkit.pruning.masks import Masks
from perpkit.retraining.loop.loss import Distillation, chunked_loss, next_token_loss, plain_head, rows_loss
from perpkit.retraining.loop.retrain import retrain

CAPPED = ("gemma2",)


@pytest.fixture
def problem():
    """Hidden states [10, 6], a head [7, 6] with a bias, targets, and a teacher's logits."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    hidden, weight, bias = (draw(*shape).requires_grad_() for shape in ((10, 6), (7, 6), (7,)))
    return hidden, weight, bias, torch.randint(7, (10,), generator=generator), draw(10, 7)


def gradients(loss, *inputs):
    return torch.autograd.grad(loss, inputs, retain_graph=True)


def slow_loss(logits, targets, teacher, weight, temperature):
    """The formula, one row and one class at a time."""
    total = 0.0
    for row, target, other in zip(logits, targets, teacher, strict=True):
        entropy = -(row[target].exp() / row.exp().sum()).log()
        wanted = (other / temperature).exp() / (other / temperature).exp().sum()
        found = (row / temperature).exp() / (row / temperature).exp().sum()
        divergence = sum(p * (p / q).log() for p, q in zip(wanted, found, strict=True))
        total = total + (1 - weight) * entropy + weight * temperature**2 * divergence
    return total


@pytest.mark.parametrize(("weight", "temperature"), [(0.0, 1.0), (0.3, 1.0), (0.7, 2.5), (1.0, 0.5)])
def test_distillation_is_the_formula(problem, weight, temperature):
    hidden, matrix, bias, targets, teacher = problem
    logits = hidden @ matrix.t() + bias
    loss = rows_loss(logits, targets, teacher, Distillation(weight, temperature))
    slow = slow_loss(logits, targets, teacher, weight, temperature)
    assert loss.item() == pytest.approx(slow.item(), rel=1e-12)
    for one, other in zip(gradients(loss, hidden, matrix), gradients(slow, hidden, matrix), strict=True):
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("rows", [1, 3, 10, 64, None])
@pytest.mark.parametrize("frozen", [(), (1,), (1, 2), (0,), (0, 2)])
def test_chunks_change_neither_value_nor_gradients(problem, rows, frozen):
    *inputs, targets, _ = problem
    inputs = [value.detach().requires_grad_(i not in frozen) for i, value in enumerate(inputs)]
    wanted = [value for value in inputs if value.requires_grad]
    plain = F.cross_entropy(inputs[0] @ inputs[1].t() + inputs[2], targets)
    loss = chunked_loss(*inputs, lambda logits, part: rows_loss(logits, targets[part]), rows=rows)
    assert loss.item() == pytest.approx(plain.item(), rel=1e-12)
    # an upstream factor, as accumulation and loss scaling put there
    for one, other in zip(gradients(3 * loss, *wanted), gradients(3 * plain, *wanted), strict=True):
        assert one.dtype == torch.float64
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-14)


def test_finite_differences_agree(problem):
    hidden, weight, bias, targets, _ = problem

    def loss(*inputs):
        return chunked_loss(*inputs, lambda logits, part: rows_loss(logits, targets[part]), rows=4)

    for i, value in enumerate((hidden, weight, bias)):
        inputs = [hidden, weight, bias]
        direction = torch.randn(value.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(i))
        (slope,) = gradients(loss(*inputs), value)
        ends = []
        for sign in (1, -1):
            inputs[i] = (value + sign * 1e-5 * direction).detach()
            ends.append(loss(*inputs).item())
        assert (ends[0] - ends[1]) / 2e-5 == pytest.approx((slope * direction).sum().item(), rel=1e-6)


def test_without_gradients_it_is_the_same_number(problem):
    hidden, weight, bias, targets, _ = problem

    def loss():
        return chunked_loss(hidden, weight, bias, lambda rows, part: rows_loss(rows, targets[part]), rows=3)

    value = loss()
    with torch.no_grad():
        assert loss().item() == value.item()
        assert not loss().requires_grad


def test_a_second_backward_pass_says_so(problem):
    hidden, weight, bias, targets, _ = problem
    loss = chunked_loss(hidden, weight, bias, lambda logits, part: rows_loss(logits, targets[part]))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiated only once"):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_sixteen_bits_are_as_near_as_the_plain_loss(problem, dtype, autocast):
    *inputs, targets, _ = problem
    exact = gradients(F.cross_entropy(inputs[0] @ inputs[1].t() + inputs[2], targets), *inputs)
    narrow = [x.detach().to(torch.float32 if autocast else dtype).requires_grad_() for x in inputs]
    with torch.autocast("cpu", dtype, enabled=autocast):
        loss = chunked_loss(*narrow, lambda logits, part: rows_loss(logits, targets[part]), rows=4)
    assert loss.dtype == torch.float32
    for value, one, other in zip(narrow, gradients(loss, *narrow), exact, strict=True):
        assert one.dtype == value.dtype
        assert (one.double() - other).norm() < 0.02 * other.norm()


# --- models -----------------------------------------------------------------------------------------


def test_a_models_loss_is_the_one_of_its_logits(any_model, windows):
    some = windows[:3]
    logits = any_model(input_ids=some).logits[:, :-1].flatten(0, 1)
    plain = F.cross_entropy(logits.float(), some[:, 1:].flatten())
    loss = next_token_loss(any_model, some)
    assert loss.item() == pytest.approx(plain.item(), rel=1e-6)
    parameters = dict(any_model.named_parameters())
    found = torch.autograd.grad(loss, parameters.values(), allow_unused=True)
    wanted = torch.autograd.grad(plain, parameters.values(), allow_unused=True)
    for name, one, other in zip(parameters, found, wanted, strict=True):
        assert (one is None) == (other is None), name
        if one is not None:
            assert (one - other).abs().max() <= 1e-6 + 1e-4 * other.abs().max(), name


def test_logits_are_never_made_whole_where_the_head_is_plain(any_model, windows):
    plain = plain_head(any_model)
    assert (plain is None) == (any_model.config.model_type in CAPPED)
    made = []
    any_model.get_output_embeddings().register_forward_hook(
        lambda _, args, output: made.append(output.numel())
    )
    next_token_loss(any_model, windows[:2]).backward()
    # the last call is the loss's, after a short one that asks what the head does
    assert made[-1] == (2 * 16 * 64 if plain is None else 1)
    assert "forward" not in vars(any_model.get_output_embeddings())


def test_a_head_with_a_forward_pass_of_its_own_is_not_plain(make_model):
    model = make_model("llama")

    class Twice(torch.nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    assert plain_head(model) is model.lm_head
    model.lm_head.__class__ = Twice
    assert plain_head(model) is None


@pytest.mark.parametrize("architecture", ["opt", "gemma2"])
@pytest.mark.parametrize("weight", [0.5, 1.0])
def test_retraining_can_follow_the_dense_model(make_model, windows, architecture, weight):
    dense = make_model(architecture, dtype=torch.float64)
    model = copy.deepcopy(dense)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(3))
    logits, targets = [m(input_ids=windows).logits[:, :-1] for m in (model, dense)], windows[:, 1:]
    slow = slow_loss(logits[0].flatten(0, 1), targets.flatten(), logits[1].flatten(0, 1), weight, 2.0)
    before = copy.deepcopy(dense.state_dict())
    dense.train()
    options = {"masks": Masks({}), "subset": "norms", "batch": 12, "lr": 1e-2, "progress": False}
    history = retrain(
        model, windows, steps=15, distill=dense, distill_weight=weight, temperature=2.0, **options
    )
    assert history.loss[0] == pytest.approx(slow.item() / targets.numel(), rel=1e-6)
    assert history.loss.iloc[-1] < history.loss[0]
    assert dense.training
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())


def test_distillation_from_something_else_is_refused(make_model, windows):
    model = make_model("opt")
    options = {"masks": Masks({}), "subset": "norms", "lr": 1e-2, "progress": False}
    with pytest.raises(ValueError, match="distill is the model that is retrained"):
        retrain(model, windows, distill=model, **options)
    with pytest.raises(ValueError, match="cannot distil a OPTForCausalLM from a Linear"):
        retrain(model, windows, distill=torch.nn.Linear(2, 2), **options)
    with pytest.raises(ValueError, match=r"distill_weight=1\.5"):
        retrain(model, windows, distill=make_model("opt"), distill_weight=1.5, **options)
    with pytest.raises(ValueError, match=r"temperature=0\.0"):
        retrain(model, windows, distill=make_model("opt"), temperature=0.0, **options)
