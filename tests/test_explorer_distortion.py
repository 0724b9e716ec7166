"""The distortion explorer without a browser: pictures, prompts, and what is not offered."""

import copy
import html
import time

import pandas as pd
import pytest
import torch
from explorer_parts import SOON, words

import perpkit as pk
from perpkit.evaluation.distortion import block_distortion, feature_maps, relative_error
from perpkit.evaluation.generation import next_tokens
from perpkit.interactive.explorers import explorer as base
from perpkit.interactive.explorers import versions as made
from perpkit.interactive.explorers.distortion import DistortionExplorer


@pytest.fixture(scope="module")
def seeing():
    """An explorer of pictures that has shown its first point; every retraining takes two steps."""
    return DistortionExplorer(steps=2, background=False)


@pytest.fixture(scope="module")
def reading():
    """An explorer of a language model."""
    return DistortionExplorer("tiny-opt", steps=2, background=False)


@pytest.fixture
def retrainings(monkeypatch) -> list:
    """How often and at what rate something is retrained."""
    done, retrain = [], made.retrain

    def counted(*arguments, **settings):
        done.append(settings["lr"])
        return retrain(*arguments, **settings)

    monkeypatch.setattr(made, "retrain", counted)
    return done


def read(explorer) -> str:
    """The predictions as they are read."""
    return words(type("", (), {"message": explorer.predictions}))


# --- pictures -------------------------------------------------------------------------------------


def test_the_numbers_are_those_of_a_cell(seeing):
    seeing.show(
        "shapes-resnet", sparsity=0.6, retrain="norms", picture="ring", layer="layer2.0.bn1", filter=7
    )
    assert seeing.error is None
    dense = pk.load_classifier("shapes-resnet", device="cpu")
    images = pk.load_images("shapes", counts={"train": 2048}, progress=False)
    picture = images.test[0][images.test[1] == images.classes.index("ring")][:1]
    pruned = copy.deepcopy(dense)
    masks = pk.prune(pruned, "magnitude", sparsity=0.6, allocation="uniform", progress=False)
    retrained = copy.deepcopy(pruned)
    settings = {"subset": "norms", "steps": 2, "lr": 0.05, "batch": 64, "optimizer": "sgd"}
    pk.retrain(retrained, images.train, masks=masks, progress=False, **settings)
    wanted, *others = (
        feature_maps(model, picture, "layer2.0.bn1")[0, 7] for model in (dense, pruned, retrained)
    )
    before, after = (relative_error(wanted, other) for other in others)
    assert words(seeing) == (
        f"filter 7 of layer2.0.bn1: relative error {before:.3f} pruned → {after:.3f} after retraining norms"
    )
    assert read(seeing).startswith("the picture is taken fordensering")
    table = seeing.figure().table
    drawn = table[table["title"] == "dense"].pivot(index="row", columns="column", values="value")
    torch.testing.assert_close(torch.tensor(drawn.to_numpy()).float(), wanted)
    assert table["title"].unique().tolist() == [
        *("picture", "dense", f"pruned, error {before:.2f}", f"retrained, error {after:.2f}")
    ]


def test_the_figure_is_the_picture(seeing):
    seeing.show(picture="star", layer="bn1", filter=0)
    shown, drawn = bytes(seeing.picture.value), seeing.figure()
    assert shown.startswith(b"\x89PNG")
    seeing.show(filter=1)
    assert bytes(seeing.picture.value) != shown
    assert seeing.figure() is not drawn
    assert not seeing.exports[".csv"].disabled


def test_a_filter_is_one_of_the_layer(seeing):
    seeing.show(layer="layer3.0.bn1", filter=63)
    seeing.layer.value = "conv1"
    assert (seeing.filter.max, seeing.filter.value) == (15, 15)
    assert words(seeing).startswith("filter 15 of conv1: ")
    seeing.layer.value = "layer2.0.bn1"
    assert (seeing.filter.max, seeing.filter.value) == (31, 15)


def test_what_was_retrained_is_kept(seeing, retrainings):
    seeing.show(sparsity=0.9, retrain="biases")
    said = words(seeing)
    seeing.show(sparsity=0.8, retrain="full")
    for picture in ("heart", "cross"):
        seeing.show(picture=picture)
    seeing.show(sparsity=0.9, retrain="biases", picture=seeing.subject.options[3])
    seeing.show(sparsity=0.8, retrain="full")
    assert retrainings == [0.05, 0.03]
    assert said.endswith("after retraining biases")


def test_few_models_are_kept_when_they_are_large(monkeypatch, retrainings):
    monkeypatch.setattr(made, "BYTES_KEPT", 0)
    versions = made.picture_versions("shapes-resnet", steps=1)
    for sparsity in (0.5, 0.6, 0.6, 0.5):
        versions.retrained(sparsity, "norms", lambda: False)
    assert len(retrainings) == 3
    assert versions.has(0.5, "norms")
    assert not versions.has(0.6, "norms")


def test_the_pruned_model_is_shown_before_the_retraining_ends(monkeypatch):
    monkeypatch.setattr(base, "SECONDS_BETWEEN_NEWS", 0)
    told = []
    explorer = DistortionExplorer(steps=2)
    explorer.message.observe(lambda _: told.append(words(explorer)), names="value")
    explorer.show(sparsity=0.5)
    assert explorer.wait(SOON)
    steps = [line for line in told if "step" in line]
    assert "pruned → retraining biases+norms, step 1 of 2" in steps[0]
    assert told[-1].endswith("after retraining biases+norms")


def test_twenty_quick_moves_leave_the_last(seeing):
    explorer = DistortionExplorer(steps=2)
    for move in range(20):
        explorer.filter.value = (5 * move + 1) % 16
    explorer.filter.value = 3
    assert explorer.wait(SOON)
    seeing.show("shapes-resnet", sparsity=0.8, retrain="biases+norms", picture="star", layer="bn1", filter=3)
    assert words(explorer) == words(seeing)
    assert bytes(explorer.picture.value) == bytes(seeing.picture.value)
    assert explorer.figure().table.equals(seeing.figure().table)


def test_cancel_and_try_again():
    explorer = DistortionExplorer(steps=100_000)
    while "step" not in words(explorer):
        assert not explorer.wait(0.05), words(explorer)
    picture = bytes(explorer.picture.value)
    assert picture.startswith(b"\x89PNG")
    started = time.perf_counter()
    explorer.cancel.click()
    assert words(explorer).startswith("cancelled")
    assert explorer.wait(SOON)
    assert time.perf_counter() - started < 10
    assert bytes(explorer.picture.value) == picture
    explorer.again.click()
    while "step" not in words(explorer):
        assert not explorer.wait(0.05), words(explorer)
    explorer.cancel.click()
    assert explorer.wait(SOON)


# --- language -------------------------------------------------------------------------------------


def test_blocks_and_next_tokens_are_those_of_a_cell(reading):
    reading.show("tiny-opt", sparsity=0.5, retrain="biases", prompt="On the floor lie")
    dense, tokenizer = pk.load_model("tiny-opt", device="cpu")
    text = pk.load_text("storyworld", tokenizer, windows={"train": 256, "calibration": 1, "test": 16})
    pruned = copy.deepcopy(dense)
    masks = pk.prune(pruned, "magnitude", sparsity=0.5, progress=False)
    retrained = copy.deepcopy(pruned)
    pk.retrain(retrained, text.train, masks=masks, subset="biases", steps=2, lr=0.1, progress=False)
    wanted = [block_distortion(dense, other, text.test) for other in (pruned, retrained)]
    shown = reading.figure().table
    for version, table in zip(("pruned", "retrained"), wanted, strict=True):
        rows = shown[shown["version"] == version]
        assert rows["relative error"].tolist() == pytest.approx(table["error"].tolist())
        assert rows["linear CKA"].tolist() == pytest.approx(table["cka"].tolist())
    before, after = (table["error"].iloc[-1] for table in wanted)
    assert words(reading) == (
        f"hidden state after the last block, on 16 test windows: relative error {before:.3f} pruned → "
        f"{after:.3f} after retraining biases"
    )
    said = read(reading)
    for model in (dense, pruned, retrained):
        for row in next_tokens(model, tokenizer, "On the floor lie").itertuples():
            assert f"{row.token!r}{100 * row.probability:.1f} %" in said


def test_a_prompt_is_escaped(reading):
    reading.show("tiny-opt", prompt="<script>alert(1)</script>")
    assert words(reading).startswith("hidden state")
    assert "<script" not in reading.predictions.value
    assert html.escape("<script>alert(1)</script>") in reading.predictions.value


def test_characters_outside_the_vocabulary_are_named(reading):
    reading.show("tiny-opt", prompt="It is a ☃ in Zürich, ☃")
    assert "characters outside the vocabulary: ☃ (U+2603), ü (U+00FC); the model" in words(reading)
    reading.show(prompt="".join(map(chr, range(0x4E00, 0x4E14))))
    assert "万 (U+4E07) and 12 more" in words(reading)
    reading.show(prompt="It is a")
    assert "vocabulary" not in words(reading)


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("", "the prompt is empty"),
        ("It is a " * 60, "the model's context is 128"),
        ("  ", "the prompt is empty"),
    ],
)
def test_a_bad_prompt_is_told_and_the_controls_go_on(reading, prompt, said):
    reading.show("tiny-opt", prompt="It is a")
    with pytest.raises(ValueError, match=said):
        reading.show(prompt=prompt)
    assert reading.prompt.value == "It is a"
    # By hand.
    reading.prompt.value = prompt
    assert words(reading).startswith("ValueError: ")
    assert said in words(reading)
    # Not the picture of the prompt before.
    with pytest.raises(ValueError, match=f"this has failed: ValueError: .*{said}"):
        reading.figure()
    reading.show(prompt="It is a")
    assert len(reading.figure().table)
    assert words(reading).startswith("hidden state")


def hidden(explorer) -> set[str]:
    return {name for name, control in explorer._controls.items() if control.layout.display == "none"}


def test_another_model_is_chosen(seeing):
    seeing.show("tiny-opt")
    assert words(seeing).startswith("hidden state after the last block")
    assert hidden(seeing) == {"subject", "layer", "filter", "upload", "limits"}
    assert pd.Index(["block", "linear CKA"]).isin(seeing.figure().table.columns).all()
    seeing.show("shapes-resnet")
    assert words(seeing).startswith("filter ")
    assert hidden(seeing) == {"prompt"}


# --- what is not offered --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"model": "gpt"}, "model is 'gpt'; the explorer offers shapes-resnet, tiny-opt"),
        ({"sparsity": 0.55}, "sparsity is 0.55"),
        ({"retrain": "nothing"}, "retrain is 'nothing'"),
        ({"picture": "dog"}, "picture is 'dog'; the explorer offers circle"),
        ({"layer": "linear"}, "layer is 'linear'"),
        ({"layer": "conv1", "filter": 16}, "filter is 16; the explorer offers 0 to 15"),
        ({"filter": True}, "filter is True; want a number"),
        ({"filter": -1}, "filter is -1"),
        ({"filter": 1.5}, "filter is 1.5; it must be a whole number"),
        ({"prompt": "It is"}, "shapes-resnet has no prompt; give another model with it"),
        ({"model": "tiny-opt", "picture": "star"}, "tiny-opt has no picture; give another model"),
        ({"model": "tiny-opt", "layer": "conv1", "filter": 1}, "tiny-opt has no layer and no filter"),
    ],
)
def test_what_is_not_offered_is_refused(seeing, asked, said):
    def stand() -> list:
        return [control.value for name, control in seeing._controls.items() if name != "upload"]

    before, stood = words(seeing), stand()
    with pytest.raises(ValueError, match=said):
        seeing.show(**asked)
    assert words(seeing) == before
    assert stand() == stood


def test_an_unknown_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="there is no folder"):
        DistortionExplorer(str(tmp_path / "gone"))
