"""The papers' own numbers beside an experiment's."""

import math

import pytest

import perpkit as pk
from perpkit.interactive.published import BETTER, PERP, PERP_V1, TALK, published

OPT = {"model": "facebook/opt-2.7b", "text": "wikitext2"}


def curve(table, label, column="perplexity") -> dict:
    rows = table[table["label"] == label].dropna(subset=[column])
    return dict(zip(rows["sparsity"], rows[column], strict=True))


def test_magnitude_pruning_and_its_retrainings_are_those_of_table_5():
    table = published(pk.Experiment(**OPT), ["none", "biases", "biases+norms", "full", "mask_lora"])
    assert curve(table, "none") == {0: 12.47, 0.3: 15.58, 0.4: 30.32, 0.5: 265.19, 0.6: 3604.16, 0.7: 7251.81}
    assert curve(table, "biases")[0.7] == 39.57
    assert curve(table, "biases+norms")[0.7] == 34.39
    assert curve(table, "full")[0.7] == 28.37
    assert curve(table, PERP) == {0.3: 13.42, 0.4: 14.5, 0.5: 16.38, 0.6: 19.2, 0.7: 27.01}
    assert curve(table, "mask_lora") == {}


@pytest.mark.parametrize(("criterion", "value"), [("wanda", 13.98), ("sparsegpt", 13.46)])
def test_other_criteria_are_those_of_table_2(criterion, value):
    table = published(pk.Experiment(**OPT, criterion=criterion), ["none", "biases"])
    # Both were retrained by PERP too, and stand there with the lower perplexity.
    assert curve(table, "none") == {0: 12.47}
    assert curve(table, BETTER) == {0.5: value}
    assert set(table["label"]) == {"none", BETTER}


@pytest.mark.parametrize(
    ("criterion", "pattern", "points"),
    [
        ("magnitude", "2:4", {"none": 1152.92, PERP: 18.23}),
        ("magnitude", "4:8", {"none": 166.92, PERP: 16.73}),
        ("wanda", "2:4", {BETTER: 16.78}),
    ],
)
def test_patterns_are_those_of_table_2(criterion, pattern, points):
    table = published(pk.Experiment(**OPT, criterion=criterion, pattern=pattern))
    there = table[table["sparsity"] == 0.5]
    assert dict(zip(there["label"], there["perplexity"], strict=True)) == points
    assert curve(table, "none")[0] == 12.47


def test_one_retraining_may_be_named_alone():
    assert published(pk.Experiment(**OPT), "biases").equals(published(pk.Experiment(**OPT), ["biases"]))


def test_the_whole_head_is_not_beside_the_papers_adapter_on_it():
    table = published(pk.Experiment(**OPT), ["none", "biases+norms", "biases+norms+head"])
    assert set(table["label"]) == {"none", "biases+norms", PERP}


def test_accuracies_are_those_of_the_talk_and_shares():
    table = published(pk.Experiment(**OPT, tasks="papers"), ["none", "norms", "mask_lora", "full"])
    assert curve(table, "none", "accuracy")[0] == pytest.approx(0.4781)
    assert curve(table, "norms", "accuracy")[0.5] == pytest.approx(0.4472)
    assert curve(table, "mask_lora", "accuracy")[0.7] == pytest.approx(0.4156)
    assert curve(table, "none", "accuracy")[0.5] == pytest.approx(0.4001), "the curve's, not the bar's 40.07"
    # One row a point, with both numbers where both are known.
    assert not table.duplicated(["label", "sparsity"]).any()
    row = table[(table["label"] == "none") & (table["sparsity"] == 0.5)].iloc[0]
    assert (row["perplexity"], row["accuracy"]) == (265.19, pytest.approx(0.4001))
    assert math.isnan(table[table["label"] == "norms"]["perplexity"].iloc[0])


def test_accuracies_of_other_models_and_criteria_are_the_points_of_the_talk():
    table = published(pk.Experiment("facebook/opt-13b", tasks="papers", criterion="wanda"))
    assert curve(table, "none", "accuracy") == {0.5: pytest.approx(0.5034)}


def test_perplexities_need_the_text_and_accuracies_the_tasks():
    assert published(pk.Experiment(**OPT | {"text": "c4"})).empty
    assert published(pk.Experiment(**OPT | {"text": "c4-wikitext2"})).equals(published(pk.Experiment(**OPT)))
    assert published(pk.Experiment(**OPT, tasks="boolq,rte"))["accuracy"].isna().all()
    only = published(pk.Experiment(**OPT | {"text": "c4"}, tasks="papers"))
    assert only["perplexity"].isna().all()
    assert not only.empty


@pytest.mark.parametrize(
    "change",
    [
        {"model": "tiny-opt"},
        {"model": "facebook/opt-125m"},
        {"model": "somebody/opt-2.7b"},
        {"criterion": "random"},
        {"pattern": "1:4"},
        {"unit": "matrix"},
        {"allocation": "owl", "criterion": "wanda"},
        {"group": "row"},
    ],
)
def test_what_no_paper_has_done_is_empty(change):
    table = published(pk.Experiment(**{**OPT, "tasks": "papers", **change}), ["none", "biases"])
    assert table.empty
    assert list(table.columns) == ["sparsity", "perplexity", "accuracy", "label"]


def test_the_group_that_is_the_default_changes_nothing():
    assert len(published(pk.Experiment(**OPT, group="layer"))) == len(published(pk.Experiment(**OPT)))


def test_every_retraining_that_is_named_exists():
    for name in {*PERP_V1, *TALK}:
        assert pk.Experiment(retrain=name, lr=0.1).retrain == name
