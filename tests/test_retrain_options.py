"""Retraining: optimisers, accumulation, clipping, precision, gradient checkpointing, early stops."""

import copy

import pytest
import torch

from perpkit.pruning.masks import Masks
from perpkit.pruning.prune import prune
from perpkit.retraining.loop.loss import next_token_loss
from perpkit.retraining.loop.retrain import retrain
from perpkit.retraining.schedules import plateau
from perpkit.retraining.subsets import subset_parameters


def train(model, windows, masks, subset="biases", **changes):
    options = {"steps": 4, "lr": 1e-2, "batch": 3, "progress": False, **changes}
    return retrain(model, windows, masks=masks, subset=subset, **options)


@pytest.fixture
def pruned(make_model):
    """A small OPT in float64 at 60 % sparsity and its masks."""
    model = make_model("opt", dtype=torch.float64)
    return model, prune(model, "magnitude", sparsity=0.6)


def apart(model, other):
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    return max((one.double() - two.double()).abs().max().item() for one, two in pairs)


# --- the step -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("momentum", "decay", "clip"), [(0.9, 0.1, None), (0.0, 0.0, 0.05), (0.5, 0.01, 0.3)]
)
@pytest.mark.parametrize("subset", ["norms", "full"])
def test_sgd_follows_a_slow_transcription(pruned, windows, subset, momentum, decay, clip):
    model, masks = pruned
    slow, rates = copy.deepcopy(model), [0.1, 0.05, 0.02]
    options = {"momentum": momentum, "weight_decay": decay, "clip": clip, "batch": 12, "steps": 3, "lr": 1.0}
    history = train(
        model, windows, masks, subset, optimizer="sgd", schedule=lambda step, steps: rates[step], **options
    )
    assert history.lr.tolist() == rates
    velocity = None
    for rate in rates:
        trained = subset_parameters(slow, subset)
        gradients = torch.autograd.grad(next_token_loss(slow, windows), list(trained.values()))
        gradients = [
            g * masks[name] if name in masks else g for name, g in zip(trained, gradients, strict=True)
        ]
        norm = torch.cat([g.flatten() for g in gradients]).norm().item()
        scale = 1.0 if clip is None else min(1.0, clip / norm)
        assert clip is None or scale < 1
        moved = [scale * g + decay * p.detach() for g, p in zip(gradients, trained.values(), strict=True)]
        velocity = (
            moved if velocity is None else [momentum * v + m for v, m in zip(velocity, moved, strict=True)]
        )
        with torch.no_grad():
            for (name, p), v in zip(trained.items(), velocity, strict=True):
                p -= rate * v
                if name in masks:
                    p *= masks[name]
    assert apart(model, slow) < 1e-6  # clipping divides by the norm plus 1e-6


def test_weight_decay_of_adamw_shrinks_what_gets_no_gradient(pruned, windows):
    model, masks = pruned
    few = windows.clamp_max(62)
    row = model.get_input_embeddings().weight[63].detach().clone()
    options = {"schedule": "constant", "lr": 0.1, "weight_decay": 0.5, "steps": 3}
    train(model, few, masks, "embeddings", **options)
    assert torch.allclose(model.get_input_embeddings().weight[63], row * 0.95**3, rtol=1e-12)


@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulated_batches_are_one_large_one(pruned, windows, accumulate):
    model, masks = pruned
    other = copy.deepcopy(model)
    one = train(model, windows, masks, "full", batch=12, steps=5)
    two = train(other, windows, masks, "full", batch=12 // accumulate, accumulate=accumulate, steps=5)
    assert one.loss.tolist() == pytest.approx(two.loss.tolist(), rel=1e-9)
    assert apart(model, other) < 1e-8


# --- precision and memory ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("subset", ["biases+norms", "full"])
def test_autocast_is_near_and_leaves_float32(make_model, windows, dtype, subset):
    model = make_model("opt")
    masks = prune(model, "magnitude", sparsity=0.6)
    wide = copy.deepcopy(model)
    wanted = train(wide, windows, masks, subset, steps=20, batch=12)
    history = train(model, windows, masks, subset, steps=20, batch=12, autocast=dtype)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert history.loss.tolist() == pytest.approx(wanted.loss.tolist(), rel=0.03)
    assert history.loss.iloc[0] != wanted.loss.iloc[0]
    masks.check(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("subset", ["biases", "head", "full"])
def test_a_model_in_sixteen_bits_keeps_its_dtype_and_learns_small_steps(make_model, windows, dtype, subset):
    model = make_model("opt", dtype=dtype)
    masks = prune(model, "magnitude", sparsity=0.6)
    # far below the spacing of 16-bit numbers: without float32 masters nothing would move
    rate = 1e-5 if dtype == torch.float16 else 1e-4
    wide = copy.deepcopy(model).float()
    options = {"steps": 40, "batch": 12, "accumulate": 2, "lr": rate, "schedule": "constant"}
    train(wide, windows, masks, subset, **options)
    before = copy.deepcopy(model.state_dict())
    train(model, windows, masks, subset, **options)
    assert {p.dtype for p in model.parameters()} == {dtype}
    masks.check(model)
    for name, p in subset_parameters(wide, subset).items():
        start = before[name].float()
        moved, wanted = (q.detach().float() - start for q in (model.get_parameter(name), p))
        large = wanted.abs() > 2 * torch.finfo(dtype).eps * start.abs()
        if large.sum() > 10:
            agree = (moved.sign() == wanted.sign())[large].float().mean()
            assert agree > 0.9, name


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("architecture", ["opt", "gpt2"])
def test_gradient_checkpointing_changes_nothing_and_is_taken_off(make_model, windows, architecture, dropout):
    changes = {"dropout": dropout} if architecture == "opt" else {"resid_pdrop": dropout}
    model = make_model(architecture, **changes)
    masks = prune(model, "magnitude", sparsity=0.6)
    other = copy.deepcopy(model)
    block = other.get_submodule("model.decoder.layers.0" if architecture == "opt" else "transformer.h.0")
    calls = []
    forward = type(block).forward
    attributes = dict(vars(block))

    train(model, windows, masks, "biases")
    hook = block.register_forward_hook(lambda *_: calls.append(block.gradient_checkpointing))
    train(other, windows, masks, "biases", checkpointing=True)
    hook.remove()
    assert True in calls
    assert type(block).forward is forward
    assert {key: vars(block).get(key) for key in attributes} == attributes
    assert not any(getattr(module, "gradient_checkpointing", False) for module in other.modules())
    assert apart(model, other) == 0


def test_checkpointing_saves_less(make_model, windows):
    model = make_model("llama")
    masks = prune(model, "magnitude", sparsity=0.6)
    saved = []
    for checkpointing in (False, True):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, s=sizes: s.append(t.numel()) or t, lambda t: t
        ):
            train(copy.deepcopy(model), windows, masks, "norms", steps=1, checkpointing=checkpointing)
        saved.append(sum(sizes))
    assert saved[1] < saved[0]


def test_checkpointing_of_a_model_without_it_is_refused():
    model = torch.nn.Sequential(torch.nn.Linear(4, 3))
    data = torch.zeros(6, 4), torch.arange(6) % 3
    with pytest.raises(ValueError, match="a Sequential has no gradient checkpointing"):
        train(model, data, Masks({}), "full", checkpointing=True)


# --- early stops ------------------------------------------------------------------------------------


def test_a_stop_sees_the_losses_and_ends_the_run(pruned, windows):
    model, masks = pruned
    seen = []

    def stop(losses):
        seen.append(list(losses))
        return len(losses) == 3

    history = train(model, windows, masks, steps=9, stop=stop)
    assert len(history) == 3
    assert seen == [history.loss.tolist()[:n] for n in (1, 2, 3)]


def test_a_plateau_ends_the_run(pruned, windows):
    model, masks = pruned
    history = train(model, windows, masks, batch=12, lr=1e-12, steps=50, stop=plateau(4, improvement=1e-6))
    assert len(history) == 8
    model, masks = copy.deepcopy(model), masks
    assert len(train(model, windows, masks, batch=12, lr=1e-2, steps=12, stop=plateau(4))) == 12
