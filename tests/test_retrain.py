"""Retraining: AdamW on a subset, masks that hold after every step, and nothing else touched."""

import copy
import math

import pandas as pd
import pytest
import torch

from perpkit.pruning.masks import Masks
from perpkit.pruning.prune import prune
from perpkit.retraining.retrain import next_token_loss, retrain
from perpkit.retraining.schedules import llr
from perpkit.retraining.subsets import subset_parameters, untie_head


@pytest.fixture
def pruned(make_model):
    """A small OPT at 60 % sparsity and its masks."""
    model = make_model("opt")
    return model, prune(model, "magnitude", sparsity=0.6)


def train(model, windows, masks, subset="biases", **changes):
    options = {"steps": 4, "lr": 1e-2, "batch": 3, "progress": False, **changes}
    return retrain(model, windows, masks=masks, subset=subset, **options)


def snapshot(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(model, before):
    now = model.state_dict()
    return list(now) == list(before) and all(torch.equal(now[name], before[name]) for name in now)


# --- the mathematics --------------------------------------------------------------------------------


def slow_loss(model, windows):
    """Mean of minus the log-probability of every token but the first of each window."""
    nats = []
    for window in windows:
        probabilities = model(input_ids=window[None]).logits[0].softmax(-1)
        nats += [-probabilities[i - 1, window[i]].log() for i in range(1, len(window))]
    return torch.stack(nats).mean()


def slow_retrain(model, windows, masks, subset, steps, lr, warmup):
    """AdamW without weight decay, one formula a line, every window in every batch."""
    trainable = subset_parameters(model, subset)
    first = {name: torch.zeros_like(p) for name, p in trainable.items()}
    second = {name: torch.zeros_like(p) for name, p in trainable.items()}
    losses = []
    for step in range(1, steps + 1):
        loss = slow_loss(model, windows)
        gradients = torch.autograd.grad(loss, list(trainable.values()))
        losses.append(loss.item())
        rising = round(warmup * steps)
        factor = step / rising if step <= rising else (steps - step + 1) / (steps - rising)
        for (name, parameter), gradient in zip(trainable.items(), gradients, strict=True):
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = 0.999 * second[name] + 0.001 * gradient**2
            mean = first[name] / (1 - 0.9**step)
            square = second[name] / (1 - 0.999**step)
            with torch.no_grad():
                parameter -= lr * factor * mean / (square.sqrt() + 1e-8)
                if name in masks:
                    parameter *= masks[name]
    return losses


@pytest.mark.parametrize("subset", ["biases", "norms", "biases+norms", "full"])
@pytest.mark.parametrize("architecture", ["opt", "gpt_neox"])
def test_it_follows_a_slow_transcription(make_model, windows, architecture, subset):
    model = make_model(architecture, dtype=torch.float64)
    masks = prune(model, "magnitude", sparsity=0.5)
    slow = copy.deepcopy(model)
    few = windows[:4]
    history = train(model, few, masks, subset, steps=5, lr=3e-3, batch=4, warmup=0.4)
    losses = slow_retrain(slow, few, masks, subset, steps=5, lr=3e-3, warmup=0.4)
    assert history.loss.tolist() == pytest.approx(losses, rel=1e-6)
    for (name, fast), wanted in zip(model.named_parameters(), slow.parameters(), strict=True):
        # a step is about lr long; the loss, and so its gradient, is computed in float32
        assert (fast - wanted).abs().max() < 1e-6, name


def test_next_token_loss_is_the_mean_over_predicted_tokens(make_model, windows):
    model = make_model("llama", dtype=torch.float64)
    assert next_token_loss(model, windows).item() == pytest.approx(slow_loss(model, windows).item(), rel=1e-6)


def test_the_history_holds_every_step_its_loss_and_its_rate(pruned, windows):
    model, masks = pruned
    seen = []
    history = train(
        model, windows, masks, steps=7, lr=0.02, warmup=0.3, on_step=lambda *step: seen.append(step)
    )
    assert isinstance(history, pd.DataFrame)
    assert list(history.columns) == ["step", "loss", "lr"]
    assert history.step.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert history.lr.tolist() == pytest.approx([0.02 * llr(step, 7, 0.3) for step in range(7)])
    assert list(zip(history.step, history.loss, strict=True)) == seen


def test_the_loss_falls(pruned, windows):
    model, masks = pruned
    history = train(model, windows, masks, "full", steps=30, lr=1e-2, batch=12)
    assert history.loss.iloc[-1] < 0.7 * history.loss.iloc[0]


# --- masks and subsets ------------------------------------------------------------------------------


@pytest.mark.parametrize("subset", ["full", "full+head"])
def test_pruned_weights_are_zero_after_every_step(pruned, windows, subset):
    model, masks = pruned
    checked = []

    def check(step, loss):
        for name, mask in masks.items():
            weight = model.get_parameter(name)
            assert torch.count_nonzero(weight[~mask]) == 0
            assert torch.count_nonzero(weight[mask]) > 0
        checked.append(step)

    train(model, windows, masks, subset, steps=5, on_step=check)
    assert checked == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("subset", ["biases", "norms", "head", "biases+norms", "norms+head"])
@pytest.mark.parametrize("architecture", ["opt", "gpt2", "bloom"])
def test_only_the_subset_changes(make_model, windows, architecture, subset):
    model = make_model(architecture)
    masks = prune(model, "magnitude", sparsity=0.5)
    if "head" in subset:
        untie_head(model)
    before = snapshot(model)
    train(model, windows, masks, subset)
    chosen = subset_parameters(model, subset)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == (name not in chosen), name


def test_full_changes_every_parameter(pruned, windows):
    model, masks = pruned
    before = snapshot(model)
    train(model, windows, masks, "full")
    for name, parameter in model.named_parameters():
        assert not torch.equal(parameter, before[name]), name


def test_a_tied_head_is_untied_and_the_embedding_stays(pruned, windows):
    model, masks = pruned
    embedding = model.get_input_embeddings().weight
    before = embedding.detach().clone()
    train(model, windows, masks, "head")
    assert model.get_input_embeddings().weight is embedding
    assert torch.equal(embedding, before)
    assert not torch.equal(model.get_output_embeddings().weight, before)


def test_no_masks_no_zeros(make_model, windows):
    model = make_model("opt")
    train(model, windows, Masks({}), "full")
    assert all(torch.count_nonzero(p) == p.numel() for p in model.model.decoder.layers.parameters())


# --- seeds ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_same_seed_gives_the_same_bits(make_model, windows, dropout, generators_unchanged):
    dense = make_model("opt", dropout=dropout)
    masks = prune(dense, "magnitude", sparsity=0.5)
    models = [copy.deepcopy(dense) for _ in range(3)]
    for model, seed in zip(models, (3, 3, 4), strict=True):
        train(model, windows, masks, "full", seed=seed)
    assert same(models[1], snapshot(models[0]))
    assert not same(models[2], snapshot(models[0]))


def test_dropout_follows_the_seed_even_where_the_order_does_not_matter(make_model, windows):
    dense = make_model("opt", dropout=0.1)
    masks = prune(dense, "magnitude", sparsity=0.5)
    losses = [train(copy.deepcopy(dense), windows, masks, batch=12, seed=seed).loss[0] for seed in (0, 0, 1)]
    assert losses[0] == losses[1]
    assert abs(losses[2] - losses[0]) > 1e-3


def test_the_global_generators_do_not_matter(make_model, windows):
    dense = make_model("opt", dropout=0.1)
    masks = prune(dense, "magnitude", sparsity=0.5)
    models = [copy.deepcopy(dense), copy.deepcopy(dense)]
    with torch.random.fork_rng():
        for state, model in enumerate(models):
            torch.manual_seed(state)
            train(model, windows, masks)
    assert same(models[1], snapshot(models[0]))


def test_no_other_device_is_reseeded(pruned, windows, monkeypatch):
    # fork_rng brings back the generators of the CPU and of the model's device, no others
    reseeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", reseeded.append)
    train(pruned[0], windows, pruned[1])
    assert reseeded == []


@pytest.mark.parametrize("batch", [3, 5, 12, 30])
def test_every_window_is_read_once_before_any_comes_again(pruned, batch):
    model, masks = pruned
    windows = torch.arange(7)[:, None].repeat(1, 4)
    read = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["input_ids"][:, 0].tolist()), with_kwargs=True
    )
    train(model, windows, masks, steps=14, batch=batch, lr=1e-4)
    hook.remove()
    assert {len(tokens) for tokens in read} == {batch}
    order = [token for tokens in read for token in tokens]
    rounds = [order[i : i + 7] for i in range(0, len(order) - 6, 7)]
    assert all(sorted(turn) == list(range(7)) for turn in rounds)
    assert len({tuple(turn) for turn in rounds}) > 1, "never shuffled again"


def test_windows_are_left_as_they_are(pruned, windows):
    before = windows.clone()
    train(pruned[0], windows, pruned[1])
    assert torch.equal(windows, before)


# --- the model is given back as it came ---------------------------------------------------------------


def unusual(model):
    """Flags and modes that nobody would restore by chance."""
    model.train()
    model.model.decoder.layers[0].eval()
    model.model.decoder.embed_positions.weight.requires_grad_(False)
    model.model.decoder.layers[1].fc1.bias.requires_grad_(False)


def flags(model):
    modes = {name: module.training for name, module in model.named_modules()}
    return modes, {name: p.requires_grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("end", ["done", "cancelled", "error", "loss not finite"])
def test_flags_and_modes_come_back(pruned, windows, end):
    model, masks = pruned
    unusual(model)
    before = flags(model)

    def fail(step, loss):
        raise RuntimeError("the caller's own error")

    if end == "done":
        train(model, windows, masks)
    elif end == "cancelled":
        train(model, windows, masks, cancelled=lambda: True)
    elif end == "error":
        with pytest.raises(RuntimeError, match="the caller's own error"):
            train(model, windows, masks, on_step=fail)
    else:
        with pytest.raises(ValueError, match="the loss became"):
            train(model, windows, masks, lr=1e30)
    assert flags(model) == before
    assert all(parameter.grad is None for parameter in model.parameters())


def test_it_trains_in_training_mode(pruned, windows):
    model, masks = pruned
    modes = []
    hook = model.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    train(model, windows, masks, steps=2)
    hook.remove()
    assert modes == [True, True]
    assert not model.training


@pytest.mark.parametrize("stop", [0, 1, 3])
def test_cancelling_keeps_the_finished_steps(pruned, windows, stop):
    model, masks = pruned
    whole, states = copy.deepcopy(model), [snapshot(model)]
    train(whole, windows, masks, "full", steps=5, on_step=lambda *_: states.append(snapshot(whole)))
    asked = []

    def cancelled():
        asked.append(None)
        return len(asked) > stop

    history = train(model, windows, masks, "full", steps=5, cancelled=cancelled)
    assert len(history) == stop
    assert len(asked) == stop + 1
    assert same(model, states[stop])


def test_no_steps_change_nothing(pruned, windows):
    model, masks = pruned
    before = snapshot(model)
    history = train(model, windows, masks, "full", steps=0)
    assert len(history) == 0
    assert list(history.columns) == ["step", "loss", "lr"]
    assert same(model, before)


# --- errors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("subset", ["full", "head", "biases"])
def test_a_loss_that_is_not_finite_restores_the_weights(pruned, windows, subset):
    model, masks = pruned
    before = snapshot(model)
    with pytest.raises(
        ValueError, match=r"loss became (nan|inf) at step \d with lr=1e\+37; .* Try lr=1e\+36"
    ):
        train(model, windows, masks, subset, lr=1e37)
    assert same(model, before)


def refused(model, windows, masks, words, **changes):
    """The call raises and leaves the model alone, its tie included."""
    before, tied = (
        snapshot(model),
        model.get_output_embeddings().weight is model.get_input_embeddings().weight,
    )
    with pytest.raises(ValueError, match=words):
        train(model, windows, masks, **changes)
    assert same(model, before)
    assert tied == (model.get_output_embeddings().weight is model.get_input_embeddings().weight)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batch": 0}, "batch is 0"),
        ({"steps": -1}, "steps=-1"),
        ({"lr": 0.0}, r"lr=0\.0"),
        ({"lr": -1e-3}, r"lr=-0\.001"),
        ({"lr": math.nan}, "lr=nan"),
        ({"lr": math.inf}, "lr=inf"),
        ({"warmup": 1.5}, r"warmup=1\.5"),
        ({"warmup": -0.1}, r"warmup=-0\.1"),
        ({"subset": "bias"}, "unknown subset 'bias'; did you mean 'biases'"),
        ({"subset": "head+bias"}, "unknown subset 'bias'"),
    ],
)
def test_bad_settings_are_refused(pruned, windows, changes, words):
    refused(pruned[0], windows, pruned[1], words, **changes)


def test_an_empty_subset_is_refused_before_the_head_is_untied(make_model, windows):
    model = make_model("gemma")
    masks = prune(model, "magnitude", sparsity=0.5)
    refused(model, windows, masks, "a GemmaForCausalLM has no biases", subset="biases")
    refused(model, windows, masks, "a GemmaForCausalLM has no biases", subset="head+biases")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("subset", ["biases", "head", "full"])
def test_sixteen_bits_are_refused_with_the_way_out(make_model, windows, dtype, subset):
    model = make_model("opt", dtype=dtype)
    masks = prune(model, "magnitude", sparsity=0.5)
    refused(model, windows, masks, rf"is {dtype}: load the model with dtype='float32'", subset=subset)


def test_masks_of_another_model_are_refused(make_model, windows):
    masks = prune(make_model("llama"), "magnitude", sparsity=0.5)
    refused(make_model("opt"), windows, masks, "the masks belong to another model")


def test_a_model_that_is_not_pruned_is_refused(make_model, pruned, windows):
    refused(make_model("opt"), windows, pruned[1], "is no longer sparse")


@pytest.mark.parametrize("shape", [(4,), (0, 8), (4, 1)])
def test_windows_of_another_shape_are_refused(pruned, shape):
    refused(pruned[0], torch.zeros(shape, dtype=torch.int64), pruned[1], "windows have shape")


def test_windows_of_another_vocabulary_are_refused(pruned):
    refused(pruned[0], torch.full((4, 8), 64), pruned[1], "cut with another model's tokenizer")


def test_windows_beyond_the_context_are_refused(pruned):
    refused(pruned[0], torch.ones(4, 17, dtype=torch.int64), pruned[1], "exceed the model's context")


# --- progress -----------------------------------------------------------------------------------------


def test_progress_is_shown_unless_it_is_not_wanted(pruned, windows, capsys):
    model, masks = pruned
    train(model, windows, masks)
    assert capsys.readouterr().err == ""
    train(model, windows, masks, progress=True)
    assert "retrain" in capsys.readouterr().err
