"""The generation explorer without a browser: three texts from one prompt."""

import copy
import html
import itertools
import re
import time

import pandas as pd
import pytest
from explorer_parts import SOON, words

import perpkit as pk
from perpkit.evaluation.generation import generate
from perpkit.interactive.explorers import explorer as base
from perpkit.interactive.explorers import versions as made
from perpkit.interactive.explorers.generation import GenerationExplorer


@pytest.fixture(scope="module")
def telling():
    """An explorer that has shown its first texts; every retraining takes two steps."""
    return GenerationExplorer(steps=2, background=False)


def texts(explorer) -> list[tuple[str, ...]]:
    """Name, perplexity and text of each version, as they are read."""
    cells = re.findall(r"<td[^>]*>(.*?)</td>", explorer.texts.value, re.DOTALL)
    parts = [
        re.fullmatch(r"<b>(.*?)</b><br><span[^>]*>(.*?)</span><div[^>]*>(.*)</div>", c, re.DOTALL)
        for c in cells
    ]
    return [tuple(html.unescape(re.sub("<[^>]*>", "", part)) for part in found.groups()) for found in parts]


# --- what is shown --------------------------------------------------------------------------------


@pytest.mark.parametrize(("temperature", "seed"), [(0, 0), (0.9, 5)])
def test_the_texts_are_those_of_a_cell(telling, temperature, seed):
    prompt = "On the floor lie"
    telling.show(prompt, sparsity=0.6, retrain="norms", tokens=12, temperature=temperature, seed=seed)
    assert telling.error is None
    dense, tokenizer = pk.load_model("tiny-opt", device="cpu")
    text = pk.load_text("storyworld", tokenizer, windows={"train": 256, "calibration": 1})
    pruned = copy.deepcopy(dense)
    masks = pk.prune(pruned, "magnitude", sparsity=0.6, progress=False)
    retrained = copy.deepcopy(pruned)
    pk.retrain(retrained, text.train, masks=masks, subset="norms", steps=2, lr=0.03, progress=False)
    models = {"dense": dense, "pruned 60 %": pruned, "retrained norms": retrained}
    settings = {"tokens": 12, "temperature": temperature, "seed": seed}
    wanted = [
        (
            name,
            f"perplexity {pk.perplexity(model, text.test):.2f}",
            prompt + generate(model, tokenizer, prompt, **settings),
        )
        for name, model in models.items()
    ]
    assert texts(telling) == wanted
    how = "greedy" if temperature == 0 else "temperature 0.9, seed 5"
    said = f"60 % pruned by magnitude, norms retrained for 2 steps; {how}; perplexities on 160 test windows"
    assert words(telling) == said
    table = telling.figure().table
    assert [prompt + text for text in table["text"]] == [text for *_, text in wanted]
    assert [f"perplexity {value:.2f}" for value in table["perplexity"]] == [said for _, said, _ in wanted]


def test_greedy_words_have_no_temperature(telling):
    telling.show(temperature=0)
    assert telling.temperature.disabled
    assert telling.seed.disabled
    telling.show(temperature=1.5)
    assert not telling.temperature.disabled
    assert "temperature 1.5" in words(telling)


def test_what_was_retrained_is_kept(telling, monkeypatch):
    telling.show(sparsity=0.5, retrain="biases")
    telling.show(sparsity=0.4)
    monkeypatch.setattr(made, "retrain", None)
    telling.show("Anna", sparsity=0.5)
    assert telling.error is None
    assert words(telling).startswith("50 % pruned")


def test_the_figure_can_be_exported_and_is_not_shown_twice(telling, tmp_path):
    explorer = telling
    explorer._folder = tmp_path
    explorer.show("It is a", tokens=5, temperature=0)
    explorer.exports[".csv"].click()
    table = pd.read_csv(tmp_path / "generation.csv")
    assert table.columns[:3].tolist() == ["version", "text", "perplexity"]
    # What they are of.
    facts = ["model", "prompt", "tokens", "temperature"]
    assert table[facts].drop_duplicates().values.tolist() == [["tiny-opt", "It is a", 5, 0.0]]
    assert table["steps"].tolist() == [0, 0, 2]
    assert table["sparsity"].iloc[0] == 0 < table["sparsity"].iloc[1]
    assert explorer.picture not in explorer.children
    assert explorer.texts in explorer.children


def test_texts_grow_as_they_are_made(monkeypatch):
    monkeypatch.setattr(base, "SECONDS_BETWEEN_NEWS", 0)
    told, grown = [], []
    explorer = GenerationExplorer(steps=2)
    assert explorer.wait(SOON)
    explorer.message.observe(lambda _: told.append(words(explorer)), names="value")
    explorer.texts.observe(lambda _: grown.append(texts(explorer)), names="value")
    explorer.show("It is a", sparsity=0.8, tokens=6)
    assert explorer.wait(SOON)
    assert "dense: token 3 of 6" in " ".join(told)
    assert "retraining biases+norms, step 1 of 2" in " ".join(told)
    dense = [shown[0][2] for shown in grown]
    assert len(set(dense)) > 3
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(dense))
    assert len(grown[-1]) == 3


def test_cancel_and_the_next_prompt():
    explorer = GenerationExplorer(steps=100_000)
    while "step" not in words(explorer):
        assert not explorer.wait(0.05), words(explorer)
    assert len(texts(explorer)) == 2
    started = time.perf_counter()
    explorer.cancel.click()
    assert words(explorer).startswith("cancelled")
    assert explorer.wait(SOON)
    assert time.perf_counter() - started < 10
    explorer.prompt.value = "Anna"
    while "step" not in words(explorer):
        assert not explorer.wait(0.05), words(explorer)
    assert texts(explorer)[0][2].startswith("Anna")
    explorer.cancel.click()
    assert explorer.wait(SOON)


def test_twenty_quick_moves_leave_the_last(telling):
    explorer = GenerationExplorer(steps=2)
    for move in range(20):
        explorer.tokens.value = 10 + move
    explorer.tokens.value = 7
    assert explorer.wait(SOON)
    telling.show("It is a", sparsity=0.7, retrain="biases+norms", tokens=7, temperature=0)
    assert texts(explorer) == texts(telling)


# --- bad input ------------------------------------------------------------------------------------


def test_a_prompt_is_escaped(telling):
    prompt = "<script>alert(1)</script> & <b>$x_1$</b>"
    telling.show(prompt, tokens=3)
    assert "<script" not in telling.texts.value
    assert [text.startswith(prompt) for *_, text in texts(telling)] == [True] * 3
    assert html.escape(prompt) in telling.texts.value


def test_what_a_model_says_is_escaped(telling, monkeypatch):
    from perpkit.interactive.explorers import generation

    monkeypatch.setattr(generation, "generate", lambda *_, **__: "<img src=x onerror=alert(1)>")
    telling.show("Anna is", tokens=4)
    assert "<img" not in telling.texts.value
    assert telling.texts.value.count("&lt;img src=x onerror=alert(1)&gt;") == 3


def test_characters_outside_the_vocabulary_are_named(telling):
    telling.show("It is a ☃", tokens=3)
    assert words(telling).endswith(
        "characters outside the vocabulary: ☃ (U+2603); the model reads their bytes as mere noise"
    )


def test_a_text_that_fills_the_context_is_said(telling):
    telling.show("It is a " * 40, tokens=100)
    assert words(telling).endswith("the model's context has room for 7 tokens after this prompt")
    telling.show("It is a")
    assert "room" not in words(telling)


@pytest.mark.parametrize(
    ("prompt", "said"), [(" ", "the prompt is empty"), ("It is a " * 60, "leaves no room for 1 more")]
)
def test_a_bad_prompt_is_told_and_the_controls_go_on(telling, prompt, said):
    telling.show("It is a", tokens=3)
    with pytest.raises(ValueError, match=said):
        telling.show(prompt)
    assert telling.prompt.value == "It is a"
    # By hand.
    telling.prompt.value = prompt
    assert words(telling).startswith("ValueError: ")
    assert said in words(telling)
    with pytest.raises(ValueError, match=f"this has failed: ValueError: .*{said}"):
        telling.figure()
    telling.show("It is a")
    assert telling.figure().table["text"].iloc[0]
    assert "pruned by magnitude" in words(telling)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"sparsity": 0.55}, "sparsity is 0.55; the explorer offers 0.3"),
        ({"retrain": "nothing"}, "retrain is 'nothing'; the explorer offers biases"),
        ({"tokens": 0}, "tokens is 0; the explorer offers 1 to 100"),
        ({"temperature": 5}, "temperature is 5; want 0, which is greedy, or 0.1 to 2"),
        ({"temperature": False}, "temperature is False; want a number"),
        ({"prompt": 3}, "prompt is 3; want a text"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_what_is_not_offered_is_refused(telling, asked, said):
    with pytest.raises(ValueError, match=said):
        telling.show(**asked)


def test_an_unknown_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="there is no folder"):
        GenerationExplorer(str(tmp_path / "gone"))
