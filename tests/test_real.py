"""A real pretrained model on real text. The data is not part of the project."""

import copy
import json
import math

import pytest
import torch

import perpkit as pk

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def dense(real_data):
    """stories260K, a Llama trained on TinyStories, and its tokenizer."""
    return pk.load_model(real_data / "models" / "stories260K", device="cpu")


@pytest.fixture(scope="module")
def stories(real_data, dense):
    file = real_data / "tinystories" / "stories_1000.jsonl"
    return pk.load_text(file, dense[1], length=256, windows={"train": 200, "test": 40})


@pytest.fixture(scope="module")
def pruned(dense):
    model = copy.deepcopy(dense[0])
    return model, pk.prune(model, "magnitude", sparsity=0.5)


def test_the_model_has_its_published_shape(dense):
    model, tokenizer = dense
    assert model.config.model_type == "llama"
    assert sum(parameter.numel() for parameter in model.parameters()) == 260_032
    assert len(tokenizer) == model.config.vocab_size == 512
    assert tokenizer("Once").input_ids[0] == tokenizer.bos_token_id


def test_perplexity_on_the_beginnings_of_stories_is_the_published_one(real_data, dense):
    model, tokenizer = dense
    lines = (real_data / "tinystories" / "stories_1000.jsonl").read_text(encoding="utf-8").splitlines()[:200]
    nats = predicted = 0
    for line in lines:
        ids = tokenizer(json.loads(line)["text"], verbose=False).input_ids[:256]
        nats += (len(ids) - 1) * math.log(pk.perplexity(model, torch.tensor([ids])))
        predicted += len(ids) - 1
    assert math.exp(nats / predicted) == pytest.approx(4.51, abs=0.02)


def test_stories_are_cut_into_windows_of_real_text(real_data, dense, stories):
    assert stories.train.shape == (200, 256)
    assert stories.test.shape == (40, 256)
    lines = (real_data / "tinystories" / "stories_1000.jsonl").read_text(encoding="utf-8").splitlines()
    beginning = dense[1].decode(stories.train[0], skip_special_tokens=True).strip()
    assert beginning.startswith(json.loads(lines[0])["text"][:100])
    assert pk.perplexity(dense[0], stories.test) < 6


def test_wikitext_is_read_from_its_raw_files(real_data, dense):
    model, tokenizer = dense
    folder = real_data / "wikitext2"
    files = {"train": folder / "train_excerpt_1000.txt", "test": folder / "wiki.test.raw"}
    text = pk.load_text(files, tokenizer, length=256, windows={"test": 40})
    assert text.test.shape == (40, 256)
    assert "Robert Boulter" in tokenizer.decode(text.test[0])
    # its own language is stories: 102 on the whole test split
    assert 60 < pk.perplexity(model, text.test) < 170


def test_magnitude_pruning_hurts_and_retraining_heals(dense, stories, pruned):
    before = pk.perplexity(dense[0], stories.test)
    broken = pk.perplexity(pruned[0], stories.test)
    assert broken > 1.3 * before
    for subset, lr in (("norms", 1e-2), ("full", 3e-3)):
        model, masks = copy.deepcopy(pruned[0]), pruned[1]
        pk.retrain(model, stories.train, masks=masks, subset=subset, steps=30, lr=lr, progress=False)
        masks.check(model)
        assert pk.perplexity(model, stories.test) < before + 0.8 * (broken - before), subset


def test_there_are_no_biases_to_retrain(stories, pruned):
    with pytest.raises(ValueError, match="a LlamaForCausalLM has no biases; choose another subset"):
        pk.retrain(pruned[0], stories.train, masks=pruned[1], subset="biases", lr=1e-2)


def test_planted_outliers_keep_the_real_function(dense, stories):
    model = copy.deepcopy(dense[0]).double()
    planted = copy.deepcopy(model)
    pk.plant_outliers(planted)
    with torch.no_grad():
        before, after = (m(stories.test[:2]).logits for m in (model, planted))
    assert (after - before).abs().max() < 1e-9 * before.abs().max()


def test_pruned_and_untied_it_is_the_same_after_saving_and_loading(pruned, dense, stories, tmp_path):
    model, masks = copy.deepcopy(pruned[0]), pruned[1]
    pk.retrain(model, stories.train, masks=masks, subset="head", steps=3, lr=1e-3, progress=False)
    model.save_pretrained(tmp_path)
    dense[1].save_pretrained(tmp_path)
    again, _ = pk.load_model(tmp_path, device="cpu")
    masks.check(again)
    assert pk.perplexity(again, stories.test[:4]) == pk.perplexity(model, stories.test[:4])
    assert torch.equal(again.get_input_embeddings().weight, dense[0].get_input_embeddings().weight)


def test_sparsegpt_beats_magnitude_from_half_on(dense, stories):
    for target in ({"sparsity": 0.5}, {"sparsity": 0.7}, {"pattern": "2:4"}):
        reached = {}
        for criterion in ("magnitude", "sparsegpt"):
            model = copy.deepcopy(dense[0])
            pk.prune(model, criterion, calibration=stories.calibration[:64], progress=False, **target).check(
                model
            )
            reached[criterion] = pk.perplexity(model, stories.test)
        assert reached["sparsegpt"] < 0.6 * reached["magnitude"], target
