"""The embedded model and data: there, small, good, and as its recipe says."""

import copy
import json
from itertools import islice

import pytest
import torch

from perpkit.evaluation.perplexity import perplexity
from perpkit.pruning.prune import prune
from perpkit.retraining.retrain import retrain
from perpkit.retraining.subsets import SUBSETS
from perpkit.sources import embedded
from perpkit.sources.embedded import EMBEDDED_MODELS, data_folder
from perpkit.sources.models import load_model
from perpkit.sources.storyworld import ABILITIES, SPLITS, stories
from perpkit.sources.text import load_text


@pytest.fixture(scope="module")
def recipe():
    return json.loads(data_folder("models", "tiny-opt", "recipe.json").read_text())


@pytest.fixture(scope="module")
def whole_text(tokenizer):
    """The story world with the test windows that everything is measured on."""
    return load_text("storyworld", tokenizer, windows={"train": 400, "calibration": 1})


def test_data_beside_the_package_or_inside_it(tmp_path, monkeypatch):
    package = tmp_path / "perpkit"
    monkeypatch.setattr(embedded, "__file__", str(package / "sources" / "embedded.py"))
    with pytest.raises(ValueError, match=r"the embedded data paper/table\.csv is missing; reinstall"):
        data_folder("paper", "table.csv")
    for folder in (tmp_path / "data", package / "data"):
        (folder / "paper").mkdir(parents=True)
        (folder / "paper" / "table.csv").touch()
        assert data_folder("paper", "table.csv") == folder / "paper" / "table.csv"


@pytest.mark.parametrize("name", EMBEDDED_MODELS)
def test_embedded_models_load(name):
    model, tokenizer = load_model(name, device="cpu")
    assert len(tokenizer) == model.config.vocab_size == 1024
    assert tokenizer.model_max_length == model.config.max_position_embeddings == 128


def test_the_model_is_small_enough_to_embed():
    assert sum(file.stat().st_size for file in data_folder("models", "tiny-opt").iterdir()) < 2**21


@pytest.mark.parametrize("split", SPLITS)
def test_stories_survive_the_tokenizer(tokenizer, split):
    for story in islice(stories(split, 9), 20):
        assert tokenizer.decode(tokenizer(story.text).input_ids) == story.text


def test_the_tokenizer_spells_what_it_does_not_know(tokenizer):
    for text in ("Zürich, 3½ Ψ", "a\tb\n c", "\U0001f600"):
        ids = tokenizer(text).input_ids
        assert tokenizer.decode(ids) == text
        assert max(ids) < 1024


@pytest.mark.parametrize("ability", ABILITIES)
def test_questions_fit_into_the_context(tokenizer, asked, ability):
    for question in asked[ability]:
        for choice in question["choices"]:
            # the harness predicts the last token from the others
            assert len(tokenizer(question["context"] + choice).input_ids) <= tokenizer.model_max_length + 1


def test_the_dense_model_is_near_the_floor(loaded, whole_text):
    assert whole_text.floor < perplexity(loaded[0], whole_text.test) < 1.3 * whole_text.floor


def test_magnitude_explodes_and_retraining_brings_it_back(loaded, whole_text, recipe):
    dense = perplexity(loaded[0], whole_text.test)
    pruned = copy.deepcopy(loaded[0])
    masks = prune(pruned, "magnitude", sparsity=0.7)
    broken = perplexity(pruned, whole_text.test)
    assert broken > 3 * dense
    reached = {}
    for subset in SUBSETS:
        model = copy.deepcopy(pruned)
        rate = recipe["retraining_rates"][subset]
        retrain(model, whole_text.train, masks=masks, subset=subset, steps=50, lr=rate, progress=False)
        reached[subset] = perplexity(model, whole_text.test)
        assert dense < reached[subset] < 0.8 * broken, subset
    assert reached["full"] == min(reached.values())


def test_magnitude_suffers_more_from_outliers(loaded, whole_text):
    planted, _ = load_model("tiny-opt-outliers", device="cpu")
    plain = copy.deepcopy(loaded[0])
    for model in (plain, planted):
        prune(model, "magnitude", sparsity=0.5)
    assert perplexity(planted, whole_text.test) > perplexity(plain, whole_text.test)


# --- the recipe says what is there ------------------------------------------------------------------


def test_the_recipe_has_a_rate_for_every_subset(recipe):
    assert set(recipe["retraining_rates"]) == set(SUBSETS)
    assert all(0 < rate < 1 for rate in recipe["retraining_rates"].values())


def test_the_recipe_holds_what_is_measured(loaded, whole_text, recipe):
    measured = recipe["measured"]
    assert measured["parameters"] == sum(parameter.numel() for parameter in loaded[0].parameters())
    assert measured["protocol"] == whole_text.protocol
    assert measured["floor"] == pytest.approx(whole_text.floor, abs=1e-4)
    assert measured["perplexity"] == pytest.approx(perplexity(loaded[0], whole_text.test), rel=1e-3)
    assert set(measured["accuracy"]) == set(ABILITIES)
    for sparsity, found in measured["magnitude"].items():
        model = copy.deepcopy(loaded[0])
        prune(model, "magnitude", sparsity=float(sparsity))
        assert found == pytest.approx(perplexity(model, whole_text.test), rel=5e-3), sparsity


@pytest.mark.slow
def test_the_recipe_accuracies_are_those_of_the_questions(loaded, recipe):
    from perpkit.evaluation.zero_shot import zero_shot

    reached = zero_shot(*loaded).set_index("task").accuracy
    assert reached.round(3).to_dict() == pytest.approx(recipe["measured"]["accuracy"], abs=0.006)


def test_weights_are_finite_and_in_half_precision():
    from safetensors.torch import load_file

    for name, weight in load_file(data_folder("models", "tiny-opt", "model.safetensors")).items():
        assert weight.dtype == torch.float16, name
        assert weight.isfinite().all(), name
