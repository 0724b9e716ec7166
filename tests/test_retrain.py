"""Retraining: AdamW on a subset, masks that hold after every step, and nothing else touched."""

import copy

import pandas as pd
import pytest
import torch
from retrain_parts import same, snapshot, train

from perpkit.pruning.masks import Masks
from perpkit.pruning.prune import prune
from perpkit.retraining.loop.loss import next_token_loss
from perpkit.retraining.schedules import llr
from perpkit.retraining.subsets import subset_parameters, untie_head


@pytest.fixture
def pruned(make_model):
    """A small OPT at 60 % sparsity and its masks."""
    model = make_model("opt")
    return model, prune(model, "magnitude", sparsity=0.6)


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

    def note(module, args, kwargs):
        # what is read in evaluation mode is only looked at
        if module.training:
            read.append(kwargs["input_ids"][:, 0].tolist())

    hook = model.register_forward_pre_hook(note, with_kwargs=True)
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


# --- progress -----------------------------------------------------------------------------------------


def test_progress_is_shown_unless_it_is_not_wanted(pruned, windows, capsys):
    model, masks = pruned
    train(model, windows, masks)
    assert capsys.readouterr().err == ""
    train(model, windows, masks, progress=True)
    assert "retrain" in capsys.readouterr().err
