"""Retraining: what is refused, and what is left of a model whose run explodes."""

import copy
import math
import re

import pytest
import torch
from retrain_parts import same, snapshot, train

from perpkit.pruning.prune import prune
from perpkit.retraining.loop.retrain import retrain
from perpkit.retraining.subsets import untie_head


@pytest.fixture
def pruned(make_model):
    """A small OPT at 60 % sparsity and its masks."""
    model = make_model("opt")
    return model, prune(model, "magnitude", sparsity=0.6)


@pytest.mark.parametrize("lr", [1e6, 1e37])
@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("subset", ["full", "head", "biases", "norms"])
def test_a_run_that_explodes_restores_the_weights(pruned, windows, subset, steps, lr):
    model, masks = pruned
    before = snapshot(model)
    trouble = r"(loss became (nan|inf|[\d.e+]+ \(an infinite perplexity\)) (at|after) step \d|NaN in step 1)"
    wanted = re.escape(f"with lr={lr:g}; the model is as it was. Try lr={lr / 10:g}")
    with pytest.raises(ValueError, match=f"{trouble} {wanted}"):
        train(model, windows, masks, subset, lr=lr, steps=steps)
    assert same(model, before)


@pytest.mark.parametrize("broken", [1, 3, 5])
def test_the_last_good_weights_come_back(pruned, windows, broken):
    model, masks = pruned
    whole, states = copy.deepcopy(model), [snapshot(model)]
    train(whole, windows, masks, "full", steps=5, on_step=lambda *_: states.append(snapshot(whole)))
    bias = model.model.decoder.layers[0].fc1.bias

    def poison(step, loss):
        if step == broken:
            with torch.no_grad():
                bias[0] = float("nan")

    when = f"at step {broken + 1}" if broken < 5 else "after step 5"
    good = "is as it was" if broken == 1 else f"has the weights of step {broken - 1}"
    with pytest.raises(ValueError, match=f"the loss became nan {when} with lr=0.01; the model {good}. Try"):
        train(model, windows, masks, "full", steps=5, on_step=poison)
    assert same(model, states[broken - 1])


def test_weights_that_no_loss_sees_are_looked_at_too(pruned, windows):
    model, masks = pruned
    # a row of the embedding that no window reads
    windows = windows.clamp_max(62)
    untie_head(model)
    embedding, before = model.get_input_embeddings().weight, snapshot(model)
    hook = embedding.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor(63), torch.inf))
    with pytest.raises(ValueError, match="weights became infinite or NaN in step 1 with lr"):
        train(model, windows, masks, "embeddings")
    hook.remove()
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
        ({"steps": 2.0}, r"steps is 2\.0; it must be a whole number"),
        ({"batch": 1.5}, r"batch is 1\.5; it must be a whole number"),
        ({"accumulate": 2.0}, r"accumulate is 2\.0; it must be a whole number"),
        ({"lr": 0.0}, r"lr=0\.0"),
        ({"lr": -1e-3}, r"lr=-0\.001"),
        ({"lr": math.nan}, "lr=nan"),
        ({"lr": math.inf}, "lr=inf"),
        ({"warmup": 1.5}, r"warmup=1\.5"),
        ({"warmup": -0.1}, r"warmup=-0\.1"),
        ({"accumulate": 0}, "accumulate is 0"),
        ({"optimizer": "adam"}, "unknown optimizer 'adam'; the optimizers are adamw and sgd"),
        ({"momentum": 1.0}, r"momentum=1\.0"),
        ({"weight_decay": -1.0}, r"weight_decay=-1\.0"),
        ({"clip": 0.0}, r"clip is 0\.0"),
        ({"autocast": "fp8"}, "unknown autocast 'fp8'; want bfloat16, float16 or None"),
        ({"schedule": "lr"}, "unknown schedule 'lr'; did you mean"),
        ({"schedule": "allr"}, "the schedule 'allr' needs settings: pass functools.partial"),
        ({"schedule": lambda step, steps: -1.0}, r"factor at step 0 is -1\.0"),
        ({"subset": "lora"}, "no adapters; attach some first"),
        ({"subset": "perp_v1:bn_recalibrate"}, "a OPTForCausalLM has no batch normalisation"),
        ({"distill": torch.nn.Linear(2, 2)}, "cannot distil"),
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


def test_data_of_another_kind_is_refused(pruned, windows):
    refused(
        pruned[0], (windows, windows), pruned[1], r"OPTForCausalLM learns from token windows \[n, length\]"
    )


def test_a_head_that_was_tied_is_tied_again_when_nothing_was_trained(make_model, windows, tmp_path):
    model = make_model("opt")
    masks = prune(model, "magnitude", sparsity=0.6)
    before = snapshot(model)

    def tied():
        return model.get_output_embeddings().weight is model.get_input_embeddings().weight

    with pytest.raises(ValueError, match="Try lr="):
        train(model, windows, masks, subset="head", lr=1e30)
    assert tied()
    train(copy.deepcopy(model), windows, masks, subset="head", checkpoint=tmp_path / "run.pt")
    with pytest.raises(ValueError, match="another"):
        train(model, windows, masks, subset="head", lr=0.5, checkpoint=tmp_path / "run.pt")
    assert tied()
    assert model.config.tie_word_embeddings
    assert same(model, before)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"masks": None}, "masks is a NoneType; give what prune has returned"),
        ({"subset": ["norms", "biases"]}, "write a union with plus signs"),
        ({"lr": "0.1"}, "lr is '0.1'; it must be a number"),
    ],
)
def test_arguments_of_the_wrong_kind_are_errors_in_words(pruned, windows, changes, words):
    model, masks = pruned
    before = snapshot(model)
    given = {"masks": masks, "subset": "biases", "lr": 0.1, "steps": 2, "progress": False, **changes}
    with pytest.raises(ValueError, match=words):
        retrain(model, windows, **given)
    assert same(model, before)


def test_spaces_around_the_plus_do_no_harm(pruned, windows):
    model, masks = pruned
    assert len(train(model, windows, masks, subset="norms + biases")) == 4
