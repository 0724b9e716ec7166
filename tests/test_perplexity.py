"""Perplexity against a slow loop over single tokens."""

import math

import pytest
import torch

import perpkit as pk
from perpkit.evaluation import perplexity as measuring
from perpkit.evaluation.perplexity import token_accuracy

VOCABULARY, CONTEXT = 64, 16


@torch.no_grad()
def by_the_token(model, windows) -> float:
    """Every token but the first of a window, predicted from those before it, one at a time."""
    nats = []
    for window in windows:
        for position in range(1, len(window)):
            logits = model(input_ids=window[None, :position]).logits[0, -1].double()
            nats.append(-torch.log_softmax(logits, 0)[window[position]].item())
    return math.exp(sum(nats) / len(nats))


@pytest.fixture(params=["opt", "llama"])
def model(request, make_model):
    return make_model(request.param)


@pytest.fixture
def batches_of(monkeypatch):
    """Bound the logits at once so that a batch holds so many windows of 16 tokens."""

    def bound(windows: int) -> None:
        monkeypatch.setattr(measuring, "LOGITS_AT_ONCE", windows * CONTEXT * VOCABULARY)

    return bound


@pytest.fixture
def sizes(model):
    """The sizes of the batches that the model was given."""
    seen = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    yield seen
    hook.remove()


def test_it_is_what_a_loop_over_single_tokens_gives(model, windows, batches_of):
    batches_of(5)
    expected = by_the_token(model.double(), windows)
    assert not 0.8 * VOCABULARY < expected < 1.25 * VOCABULARY  # an unequal distribution, so it can be wrong
    assert pk.perplexity(model.float(), windows) == pytest.approx(expected, rel=1e-5)


def test_one_window_of_two_tokens_is_one_over_the_probability_of_the_second(model, windows):
    window = windows[:1, :2]
    with torch.no_grad():
        probability = model(window).logits[0, 0].softmax(0)[window[0, 1]].item()
    assert pk.perplexity(model, window) == pytest.approx(1 / probability, rel=1e-5)


def test_uniform_logits_give_the_size_of_the_vocabulary(model, windows):
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    assert pk.perplexity(model, windows) == pytest.approx(VOCABULARY, rel=1e-6)


@pytest.mark.parametrize("size", [1, 5, 12, 100])
def test_it_does_not_depend_on_the_batches(model, windows, batches_of, sizes, size):
    whole = pk.perplexity(model, windows)
    sizes.clear()
    batches_of(size)
    assert pk.perplexity(model, windows) == pytest.approx(whole, rel=1e-6)
    assert max(sizes) == min(size, len(windows))
    assert sum(sizes) == len(windows)


@pytest.mark.parametrize("rows", [1, 7, 15])
def test_it_does_not_depend_on_the_blocks_of_the_loss(model, windows, monkeypatch, rows):
    whole = pk.perplexity(model, windows)
    monkeypatch.setattr(measuring, "LOSS_ROWS", rows)
    assert pk.perplexity(model, windows) == pytest.approx(whole, rel=1e-6)


def test_it_does_not_depend_on_the_order_of_the_windows(model, windows):
    assert pk.perplexity(model, windows.flip(0)) == pytest.approx(pk.perplexity(model, windows), rel=1e-6)


@pytest.mark.parametrize("token", [-1, VOCABULARY])
def test_windows_of_another_vocabulary_are_refused(model, windows, token):
    windows[3, 4] = token
    with pytest.raises(ValueError, match=r"vocabulary has 64 tokens.*another model's tokenizer"):
        pk.perplexity(model, windows)


def test_windows_longer_than_the_context_are_refused(model):
    with pytest.raises(ValueError, match="17 tokens exceed the model's context of 16"):
        pk.perplexity(model, torch.zeros(2, CONTEXT + 1, dtype=torch.int64))


@pytest.mark.parametrize("shape", [(16,), (0, 16), (3, 1), (3, 0), (2, 3, 4)])
def test_windows_of_another_shape_are_refused(model, shape):
    with pytest.raises(ValueError, match=r"want \[windows, length >= 2\]"):
        pk.perplexity(model, torch.zeros(shape, dtype=torch.int64))


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_off_while_measuring_and_the_mode_comes_back(make_model, windows, training):
    model = make_model("opt", dropout=0.5)
    expected = pk.perplexity(model.eval(), windows)
    model.train(training)
    assert pk.perplexity(model, windows) == expected
    assert model.training is training


def test_every_module_keeps_its_own_mode(model, windows):
    model.train()
    model.get_decoder().layers[0].eval()
    before = [module.training for module in model.modules()]
    pk.perplexity(model, windows)
    assert [module.training for module in model.modules()] == before


def test_the_mode_comes_back_when_the_model_fails(make_model, windows):
    model = make_model("opt").train()

    def fail(*_):
        raise RuntimeError("out of memory")

    model.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        pk.perplexity(model, windows)
    assert model.training


def test_cancelled_it_is_no_number_and_the_mode_comes_back(model, windows, batches_of, sizes):
    batches_of(4)
    model.train()
    assert math.isnan(pk.perplexity(model, windows, cancelled=lambda: len(sizes) == 2))
    assert sizes == [4, 4]
    assert model.training


def test_a_perplexity_beyond_all_numbers_is_infinite(model, windows):
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1e6)
    assert pk.perplexity(model, windows) == math.inf


def test_nothing_is_left_on_the_model(model, windows, generators_unchanged):
    before = {name: p.clone() for name, p in model.state_dict().items()}
    pk.perplexity(model, windows)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_token_accuracy_counts_the_likeliest_tokens(model, windows, batches_of):
    batches_of(5)
    with torch.no_grad():
        guesses = torch.stack([model(input_ids=window[None]).logits[0, :-1].argmax(-1) for window in windows])
    share = token_accuracy(model, windows)
    assert share == (guesses == windows[:, 1:]).double().mean().item()
    # No later token sees the last one, so replaced by the guess it changes nothing else.
    last = windows.clone()
    last[::2, -1] = guesses[::2, -1]
    expected = (guesses == last[:, 1:]).double().mean().item()
    assert expected > share
    assert token_accuracy(model, last) == pytest.approx(expected)
    assert math.isnan(token_accuracy(model, windows, cancelled=lambda: True))
