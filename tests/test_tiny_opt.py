"""The shipped model is what its recipe says, and what the lessons need."""

import json
import math

import pytest
import torch

import perpkit as pk
from perpkit.sources.embedded import data_folder

FOLDER = data_folder("models", "tiny-opt")
RECIPE = json.loads((FOLDER / "recipe.json").read_text())


def test_it_takes_less_than_a_megabyte():
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 1_000_000


def test_it_has_the_perplexity_that_its_recipe_says_near_the_floor():
    model, tokenizer = pk.load_model("tiny-opt", device="cpu")
    text = pk.load_text("storyworld", tokenizer)
    assert pk.perplexity(model, text.test) == pytest.approx(RECIPE["measured"]["perplexity"], abs=2e-3)
    assert text.floor == pytest.approx(RECIPE["measured"]["floor"], abs=1e-4)
    assert text.floor < RECIPE["measured"]["perplexity"] < 1.15 * text.floor


@pytest.mark.slow
def test_it_answers_at_least_nine_of_ten_questions_of_every_set():
    model, tokenizer = pk.load_model("tiny-opt", device="cpu")
    accuracy = pk.zero_shot(model, tokenizer).set_index("task")["accuracy"]
    assert accuracy.min() >= 0.9
    assert accuracy.round(3).to_dict() == pytest.approx(RECIPE["measured"]["accuracy"], abs=0.011)


@pytest.mark.slow
def test_few_parameters_close_most_of_the_gap_that_pruning_opens():
    dense, tokenizer = pk.load_model("tiny-opt", device="cpu")
    text = pk.load_text("storyworld", tokenizer)
    start = pk.perplexity(dense, text.test)

    def reached(sparsity, subset):
        model, _ = pk.load_model("tiny-opt", device="cpu")
        masks = pk.prune(model, "magnitude", sparsity=sparsity)
        if subset:
            lr = pk.Experiment(retrain=subset).lr
            pk.retrain(model, text.train, masks=masks, subset=subset, lr=lr, progress=False)
        return pk.perplexity(model, text.test)

    pruned = reached(0.5, None)
    assert math.log(pruned / reached(0.5, "biases+norms")) >= 0.70 * math.log(pruned / start)
    assert math.log(pruned / reached(0.5, "full")) >= 0.85 * math.log(pruned / start)
    assert reached(0.7, None) >= 5 * start


def test_the_variant_with_outliers_is_the_same_function_that_magnitude_ruins_sooner():
    tiny, tokenizer = pk.load_model("tiny-opt", device="cpu")
    planted, _ = pk.load_model("tiny-opt-outliers", device="cpu")
    windows = pk.load_text("storyworld", tokenizer, windows={"train": 1, "calibration": 1}).test
    with torch.no_grad():
        torch.testing.assert_close(
            planted(windows[:4]).logits, tiny(windows[:4]).logits, rtol=1e-4, atol=1e-3
        )
    for model in (tiny, planted):
        pk.prune(model, "magnitude", sparsity=0.5)
    assert pk.perplexity(planted, windows) > 2 * pk.perplexity(tiny, windows)
