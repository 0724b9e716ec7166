"""The adapter explorer: what is said of merging is what merging does."""

import re

import pytest
import torch
from explorer_parts import SOON, words

import perpkit as pk
from perpkit.interactive.explorers import adapters as explored
from perpkit.interactive.explorers.adapters import AdapterExplorer

FC1 = "model.decoder.layers.1.fc1.weight"
NUMBER = r"(\d+\.\d\d)"


@pytest.fixture(scope="module")
def explorer():
    explorer = AdapterExplorer(steps=12)
    assert explorer.wait(SOON)
    return explorer


def show(explorer, *chosen, **named) -> str:
    explorer.show(*chosen, **named)
    assert explorer.wait(SOON)
    assert explorer.error is None
    return words(explorer)


@pytest.mark.parametrize("kind", ["lora_prune", "scale_lora", "mask_lora"])
def test_the_numbers_are_those_of_a_cell(explorer, kind):
    said = show(explorer, kind, 2, sparsity=0.6)
    model, tokenizer = pk.load_model("tiny-opt")
    text = pk.load_text("storyworld", tokenizer, windows={"train": 256, "calibration": 1})
    masks = pk.prune(model, "magnitude", sparsity=0.6, progress=False)
    pruned = pk.perplexity(model, text.test)
    pk.attach(model, masks, kind, 2, alpha=4.0)
    pk.retrain(model, text.train, masks=masks, subset="lora", steps=12, lr=0.03, progress=False)
    adapted = pk.perplexity(model, text.test)
    pk.merge(model)
    merged = pk.perplexity(model, text.test)
    found = re.search(f"perplexity {NUMBER} pruned → {NUMBER} with adapters → {NUMBER} merged", said)
    assert found is not None
    assert [float(each) for each in found.groups()] == pytest.approx([pruned, adapted, merged], abs=0.02)
    masks.check(model)
    assert "60 % merged" in said
    assert ("lost in merging" in said) == (kind == "lora_prune")
    assert ("merging changes nothing" in said) == (kind != "lora_prune")


def test_plain_lora_fills_the_zeros(explorer):
    said = show(explorer, "lora", 2, sparsity=0.6)
    assert "plain LoRA makes the model dense" in said
    found = re.search(r"in W \+ σBA only ([\d.]+) % of the weights are zero, not 60 %", said)
    assert found is not None
    assert float(found[1]) < 1
    merged = entries(explorer, "merged: W + σBA")
    assert (merged == 0).double().mean() < 0.1


def entries(explorer, part):
    table = explorer.figure().table
    return torch.tensor(table[table.part == part]["value"].to_numpy())


@pytest.mark.parametrize("kind", ["lora", "lora_prune", "scale_lora", "mask_lora"])
def test_the_pictures_add_up(explorer, kind):
    show(explorer, kind, 2, sparsity=0.6, layer=FC1)
    term, total = explored.SUMS[kind]
    weight, update, masked, merged = (
        entries(explorer, name) for name in ("W, pruned", term, f"M ⊙ {term}", f"merged: {total}")
    )
    mask = weight != 0
    torch.testing.assert_close(masked, torch.where(mask, update, 0.0))
    expected = {
        "lora": weight + update,
        "lora_prune": torch.where(mask, weight + update, 0.0),
        "scale_lora": weight * update,
        "mask_lora": weight + masked,
    }[kind]
    torch.testing.assert_close(merged, expected, atol=1e-6, rtol=1e-5)
    assert update.abs().min() >= 0
    assert (update != 0).double().mean() > 0.9


def test_another_layer_is_shown_without_training_again(explorer, monkeypatch):
    show(explorer, "mask_lora", 2, sparsity=0.6, layer=FC1)
    before = explorer.picture.value
    monkeypatch.setattr(explored, "retrain", None)
    show(explorer, layer="model.decoder.layers.0.fc2.weight")
    assert explorer.picture.value != before
    assert explorer.picture.value == explorer.figure().png()
    show(explorer, layer=FC1)
    assert explorer.picture.value == before


def test_the_curve_and_the_pictures_follow_the_training(monkeypatch):
    monkeypatch.setattr(explored, "SECONDS_BETWEEN_PICTURES", 0)
    monkeypatch.setattr(explored, "TIMES_ITS_DRAWING", 0)
    explorer = AdapterExplorer(steps=4, background=False)
    lengths, told = [], []

    def drawn(_, parts=explored.plot_adapter):
        lengths.append(int((explorer._figure.table["part"] == "loss").sum()))

    explorer.picture.observe(drawn, names="value")
    explorer.message.observe(lambda change: told.append(words(explorer)), names="value")
    explorer.show("lora")
    assert lengths == [1, 2, 3, 4, 4][: len(lengths)]
    assert len(lengths) >= 4
    assert any("training step 3 of 4" in each for each in told)
    figure = explorer.figure()
    assert figure.table[["kind", "rank", "sparsity"]].drop_duplicates().values.tolist() == [["lora", 4, 0.7]]
    assert any(
        "tiny-opt, pruned by magnitude to 70 %; lora of rank 4" in text.get_text() for text in figure.texts
    )


def test_cancel_takes_effect_within_a_training_step():
    explorer = AdapterExplorer(steps=100_000)
    while "training step" not in words(explorer):
        assert not explorer.wait(0.05), words(explorer)
    explorer.cancel.click()
    assert words(explorer).startswith("cancelled")
    assert explorer.wait(5)
    assert words(explorer).startswith("cancelled")
    assert not explorer._trained
    assert explorer.cancel.disabled


def test_the_last_of_many_choices_wins(explorer):
    for rank in (1, 4, 8, 16, 2):
        explorer.rank.value = rank
    said = show(explorer, "scale_lora", 8, sparsity=0.5)
    assert said.startswith("scale_lora, rank 8")
    assert explorer.picture.value == explorer.figure().png()


def test_the_dense_model_is_left_as_it_was(explorer):
    fresh, _ = pk.load_model("tiny-opt")
    for (name, ours), theirs in zip(explorer._dense.named_parameters(), fresh.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_an_error_is_told_and_the_controls_go_on(explorer, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no <luck>")

    monkeypatch.setattr(explored, "retrain", fail)
    explorer.show("lora", 1, sparsity=0.3)
    assert explorer.wait(SOON)
    assert words(explorer) == "RuntimeError: no <luck>"
    assert "&lt;luck&gt;" in explorer.message.value
    monkeypatch.undo()
    explorer.again.click()
    assert explorer.wait(SOON)
    assert words(explorer).startswith("lora, rank 1")


@pytest.mark.parametrize("chosen", [{"kind": "dora"}, {"rank": 3}, {"sparsity": 0.99}, {"layer": "x"}])
def test_what_is_not_offered_is_refused(explorer, chosen):
    [(name, value)] = chosen.items()
    with pytest.raises(ValueError, match=f"{name} is {value!r}; the explorer offers "):
        explorer.show(**chosen)
