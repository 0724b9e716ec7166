"""Retraining and the global generators: untouched without dropout, lent out batch by batch with it."""

import copy
import threading

import pytest
import torch

from perpkit.pruning.prune import prune
from perpkit.retraining.loop.noise import draws_noise
from perpkit.retraining.loop.retrain import retrain


def train(model, windows, masks, **changes):
    options = {"steps": 4, "lr": 1e-2, "batch": 3, "progress": False, **changes}
    return retrain(model, windows, masks=masks, subset="biases", **options)


@pytest.fixture(params=[0.0, 0.2])
def dense(request, make_model):
    return make_model("opt", dropout=request.param)


def test_dropout_is_found_wherever_it_is(make_model):
    assert not draws_noise(make_model("opt"))
    assert draws_noise(make_model("opt", attention_dropout=0.1))
    assert draws_noise(make_model("opt", layerdrop=0.1))
    assert draws_noise(make_model("llama", attention_dropout=0.1))
    assert not draws_noise(make_model("llama"))
    assert draws_noise(make_model("gpt2"))
    assert not draws_noise(make_model("gpt2", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))


@pytest.mark.parametrize("architecture", ["opt", "llama", "gpt_neox", "falcon"])
def test_without_dropout_nobody_looks_at_a_generator(make_model, windows, architecture, monkeypatch):
    # Otherwise another thread's numbers could be put back where they had been used already.
    model = make_model(architecture)
    masks = prune(model, "magnitude", sparsity=0.5)

    def touched(*_):
        raise AssertionError("touched a global generator")

    monkeypatch.setattr(torch, "set_rng_state", touched)
    monkeypatch.setattr(torch.random, "fork_rng", touched)
    before = torch.get_rng_state()
    options = {"steps": 2, "lr": 1e-2, "batch": 3, "progress": False}
    retrain(model, windows, masks=masks, subset="norms", **options)
    assert torch.equal(torch.get_rng_state(), before)


def test_callbacks_have_the_callers_numbers(dense, windows):
    masks = prune(dense, "magnitude", sparsity=0.5)
    drawn = []
    with torch.random.fork_rng():
        torch.manual_seed(7)
        wanted = torch.rand(4).tolist()
        torch.manual_seed(7)
        train(dense, windows, masks, on_step=lambda *_: drawn.append(torch.rand(1).item()))
    assert drawn == wanted


def test_threads_do_not_disturb_each_other(dense, windows):
    masks = prune(dense, "magnitude", sparsity=0.5)
    before = torch.get_rng_state()
    seeds = (0, 1, 2)
    alone = {seed: copy.deepcopy(dense) for seed in seeds}
    together = {seed: copy.deepcopy(dense) for seed in seeds}
    for seed in seeds:
        train(alone[seed], windows, masks, seed=seed, steps=8)
    start = threading.Barrier(len(seeds))

    def work(seed):
        start.wait()
        train(together[seed], windows, masks, seed=seed, steps=8)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in seeds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in seeds:
        for one, other in zip(alone[seed].parameters(), together[seed].parameters(), strict=True):
            assert torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_noise_of_a_router_is_noise(make_model, windows, generators_unchanged):
    model = make_model("mixtral", router_jitter_noise=0.1)
    assert draws_noise(model)
    assert not draws_noise(make_model("mixtral"))
    masks = prune(model, "magnitude", sparsity=0.5)
    twin = copy.deepcopy(model)
    options = {"steps": 2, "lr": 1e-2, "batch": 3, "progress": False}
    losses = []
    for each in (model, twin):
        losses.append(retrain(each, windows, masks=masks, subset="norms", **options).loss.tolist())
    assert losses[0] == losses[1]
