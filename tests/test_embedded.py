"""The embedded model and data: there, small, good, and as its recipe says."""

import copy
import json
from itertools import islice

import pytest
import torch

from perpkit.evaluation.perplexity import perplexity
from perpkit.pruning.prune import prune
from perpkit.retraining.subsets import SUBSETS
from perpkit.sources import embedded
from perpkit.sources.embedded import EMBEDDED_MODELS, data_folder
from perpkit.sources.models import load_model
from perpkit.sources.storyworld import ABILITIES, SPLITS, stories
from perpkit.sources.text import load_text


@pytest.fixture(scope="module")
def recipe():
    return json.loads(data_folder("models", "tiny-opt", "recipe.json").read_text())


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


# --- the recipe says what is there ------------------------------------------------------------------


def test_the_recipe_has_a_rate_for_every_subset(recipe):
    assert set(recipe["retraining_rates"]) == set(SUBSETS)
    assert all(0 < rate < 1 for rate in recipe["retraining_rates"].values())


def test_the_recipe_holds_what_is_measured_after_pruning(loaded, tokenizer, recipe):
    text = load_text("storyworld", tokenizer, windows={"train": 1, "calibration": 1})
    measured = recipe["measured"]
    assert measured["parameters"] == sum(parameter.numel() for parameter in loaded[0].parameters())
    assert measured["protocol"] == text.protocol
    for sparsity, found in measured["magnitude"].items():
        model = copy.deepcopy(loaded[0])
        prune(model, "magnitude", sparsity=float(sparsity))
        assert found == pytest.approx(perplexity(model, text.test), rel=5e-3), sparsity


def test_weights_are_finite_and_in_half_precision():
    from safetensors.torch import load_file

    for name, weight in load_file(data_folder("models", "tiny-opt", "model.safetensors")).items():
        assert weight.dtype == torch.float16, name
        assert weight.isfinite().all(), name
