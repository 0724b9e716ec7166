"""Experiments: what is refused, and what is the same run."""

import dataclasses

import pytest

import perpkit as pk
from perpkit.experiments.experiment import recommended_lr

BASE = {"retrain": "biases", "criterion": "random", "lr": 0.01}


# --- one experiment -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (
            {"criterion": "magnitud"},
            ["criterion 'magnitud'", "did you mean 'magnitude'?", "magnitude, random"],
        ),
        (
            {"retrain": "bias"},
            ["retrain 'bias'", "did you mean 'biases'?", "none, biases, norms, head, full", "mask_lora"],
        ),
        ({"retrain": "biases+nroms"}, ["retrain 'nroms'", "did you mean 'norms'?"]),
        ({"retrain": "biases+"}, ["retrain ''"]),
        ({"sparsity": 1.01}, ["sparsity is 1.01", "between 0 and 1"]),
        ({"sparsity": -0.1}, ["sparsity is -0.1"]),
        ({"sparsity": float("nan")}, ["sparsity is nan"]),
        ({"sparsity": 50}, ["sparsity is 50"]),
        ({"retrain": "biases", "steps": 0}, ["steps is 0", "at least 1"]),
        ({"retrain": "biases", "batch": 0}, ["batch is 0", "at least 1"]),
        ({"retrain": "biases", "lr": 0.0}, ["lr is 0.0", "positive"]),
        ({"retrain": "biases", "lr": -1.0}, ["lr is -1.0", "positive"]),
        ({"retrain": "biases", "lr": float("inf")}, ["lr is inf", "positive"]),
        ({"retrain": "biases", "accumulate": 0}, ["accumulate is 0", "at least 1"]),
        ({"retrain": "biases", "weight_decay": -1}, ["weight_decay is -1.0", "negative"]),
        ({"retrain": "biases", "schedule": "llrr"}, ["schedule 'llrr'", "did you mean 'llr'?"]),
        ({"retrain": "embeddings"}, ["no recommended rate", "'embeddings'", "lr="]),
        ({"retrain": "mask_lora+lora"}, ["'mask_lora+lora'", "one kind of adapter"]),
        ({"retrain": "mask_lora", "rank": 0}, ["rank is 0", "positive"]),
        ({"retrain": "mask_lora", "alpha": -2}, ["alpha is -2.0", "positive"]),
        ({"retrain": "scale_lora", "start": "publishd"}, ["start 'publishd'", "'published'"]),
        ({"dtype": "float23"}, ["dtype 'float23'", "did you mean 'float32'?", "bfloat16"]),
        ({"length": 1}, ["length is 1", "at least 2"]),
        ({"pattern": "2-4"}, ["2-4"]),
        ({"pattern": "4:2"}, ["4:2"]),
        ({"pattern": "2:4", "allocation": "erk"}, ["pattern", "'erk'"]),
        ({"group": "rows"}, ["group 'rows'", "did you mean 'row'?", "layer, global"]),
        ({"group": "global", "criterion": "sparsegpt"}, ["sparsegpt compares"]),
        ({"allocation": "earl"}, ["allocation 'earl'", "erk"]),
        ({"unit": "blok"}, ["blok", "block"]),
        ({"unit": "block", "unit_steps": 0}, ["unit_steps is 0"]),
        ({"unit": "block", "unit_lr": 0}, ["unit_lr is 0.0"]),
        ({"steps": 1.5}, ["steps is 1.5", "whole number"]),
        ({"steps": True}, ["steps is True", "whole number"]),
        ({"model": 3}, ["model is 3", "must be text: tiny-opt", "local folder"]),
        ({"model": ""}, ["model is ''", "must not be empty: tiny-opt"]),
        ({"text": [1, 2]}, ["text is [1, 2]", "must be text: storyworld, wikitext2, c4"]),
        ({"text": " "}, ["text is ' '", "must not be empty"]),
        ({"tasks_dir": 3, "tasks": "agreement"}, ["tasks_dir is 3; it must be text"]),
        ({"sparsity": "half"}, ["sparsity is 'half'", "a number"]),
        ({"tasks": "agreemnt"}, ["agreemnt", "agreement"]),
        ({"steps": float("nan")}, ["steps is nan", "whole number"]),
        ({"seed": 2**63}, ["seed is 9223372036854775808", "64 bits"]),
    ],
)
def test_a_bad_value_is_named_with_the_valid_ones(bad, words):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the words are checked below
        pk.Experiment(**bad)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    "name", [field.name for field in dataclasses.fields(pk.Experiment) if field.default is not None]
)
def test_an_input_that_is_always_needed_cannot_be_none(name):
    with pytest.raises(ValueError, match=f"^{name} is None; leave it out for .* or give it a value$"):
        pk.Experiment(**{"retrain": "biases", "unit": "block", name: None})


def test_a_name_like_no_other_gets_no_suggestion_but_the_valid_names():
    names = "magnitude, random, wanda, ria, sparsegpt, sparsefw"
    with pytest.raises(ValueError, match=rf"^unknown criterion 'xyz'\. Valid are {names}$"):
        pk.Experiment(criterion="xyz")


@pytest.mark.parametrize("sparsity", [0, 1])
def test_the_ends_of_the_sparsity_axis_are_allowed(sparsity):
    assert pk.Experiment(sparsity=sparsity).sparsity == sparsity


def test_without_retraining_its_settings_and_the_seed_change_nothing():
    plain = pk.Experiment(retrain="none")
    other = pk.Experiment(retrain="none", steps=7, lr=0.5, batch=3, seed=9)
    assert plain == other
    assert plain.key() == other.key()
    assert (plain.steps, plain.batch, plain.lr, plain.seed) == (0, 0, 0.0, 0)


def test_random_pruning_keeps_its_seed_without_retraining():
    one, two = (pk.Experiment(criterion="random", retrain="none", seed=seed, steps=5) for seed in (1, 2))
    assert (one.seed, two.seed) == (1, 2)
    assert one.key() != two.key()
    assert one.steps == 0


def test_with_retraining_everything_is_kept():
    experiment = pk.Experiment(retrain="biases", steps=7, lr=0.5, batch=3, seed=9)
    assert (experiment.steps, experiment.lr, experiment.batch, experiment.seed) == (7, 0.5, 3, 9)


@pytest.mark.parametrize("union", ["biases+norms", "norms+biases", "head+norms+biases", "full+biases"])
def test_a_union_is_one_experiment_in_any_order(union):
    one = pk.Experiment(retrain=union)
    backwards = pk.Experiment(retrain="+".join(reversed(union.split("+"))))
    assert one == backwards
    assert one.key() == backwards.key()
    assert {*one.retrain.split("+")} == {*union.split("+")}


def test_a_union_takes_the_rate_of_its_most_delicate_part():
    rates = {part: recommended_lr("tiny-opt", part) for part in ("biases", "norms", "head", "full")}
    assert len(set(rates.values())) > 1
    assert recommended_lr("tiny-opt", "biases+norms") == min(rates["biases"], rates["norms"])
    assert recommended_lr("tiny-opt", "full+head+biases") == min(
        rates["biases"], rates["head"], rates["full"]
    )


def test_a_larger_model_takes_smaller_rates():
    assert recommended_lr("facebook/opt-125m", "biases") < recommended_lr("tiny-opt", "biases") / 10
    assert pk.Experiment(model="facebook/opt-125m", retrain="biases").lr == recommended_lr(
        "facebook/opt-125m", "biases"
    )


def test_the_inputs_are_a_plain_dictionary():
    assert pk.Experiment(**BASE, sparsity=0.25, seed=3).asdict() == {
        "model": "tiny-opt",
        "text": "storyworld",
        "dtype": "float32",
        "length": None,
        "criterion": "random",
        "sparsity": 0.25,
        "pattern": None,
        "group": None,
        "allocation": None,
        "unit": None,
        "unit_steps": 0,
        "unit_lr": 0.0,
        "retrain": "biases",
        "rank": None,
        "alpha": None,
        "start": None,
        "steps": 100,
        "lr": 0.01,
        "batch": 8,
        "accumulate": 1,
        "schedule": "llr",
        "weight_decay": 0.0,
        "tasks": None,
        "tasks_dir": None,
        "seed": 3,
    }


def test_none_stands_alone_in_a_union():
    with pytest.raises(ValueError, match="'none' stands alone"):
        pk.Experiment(retrain="biases+none")


def test_an_experiment_can_be_made_from_its_dictionary():
    for retrain in ("none", "full"):
        experiment = pk.Experiment(retrain=retrain, seed=2)
        assert pk.Experiment(**experiment.asdict()) == experiment


# --- conditional inputs -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "without",
    [
        {"retrain": "biases", "rank": 4, "alpha": 3.0, "start": "published"},
        {"retrain": "biases", "unit_steps": 5, "unit_lr": 0.3},
        {"retrain": "biases", "tasks_dir": "/somewhere"},
    ],
    ids=["rank without an adapter", "settings without a unit", "a folder without tasks"],
)
def test_what_means_nothing_changes_nothing(without):
    assert pk.Experiment(**without) == pk.Experiment(retrain="biases")


def test_an_exact_reconstruction_has_no_rate_and_no_seed():
    exact = pk.Experiment(unit="matrix", unit_steps=9, unit_lr=0.5, seed=4)
    assert exact == pk.Experiment(unit="matrix")
    assert exact != pk.Experiment()
    by_gradients = pk.Experiment(unit="block", seed=4)
    assert (by_gradients.seed, by_gradients.unit_steps) == (4, 200)


def test_a_pattern_says_the_sparsity():
    assert pk.Experiment(pattern="1:4", sparsity=0.3).sparsity == 0.75
    grid = pk.Grid(pattern=[None, "2:4"], sparsity=[0.4, 0.6])
    assert [(e.pattern, e.sparsity) for e in grid] == [(None, 0.4), (None, 0.6), ("2:4", 0.5)]


def test_adapters_have_the_published_rank_and_scale_unless_told():
    assert (pk.Experiment(retrain="mask_lora").rank, pk.Experiment(retrain="mask_lora").alpha) == (16, 32)
    assert pk.Experiment(retrain="biases+norms+mask_lora", rank=4).alpha == 8
    assert pk.Experiment(retrain="biases+mask_lora").adapter == "mask_lora"
    assert pk.Experiment(retrain="biases").adapter is None
    assert pk.Experiment(retrain="scale_lora").start == "published"


def test_equal_experiments_are_made_again_from_each_dictionary():
    for inputs in ({"retrain": "scale_lora"}, {"unit": "block"}, {"pattern": "2:4"}, {"tasks": "agreement"}):
        experiment = pk.Experiment(**inputs)
        assert pk.Experiment(**experiment.asdict()) == experiment


def test_spaces_and_repetitions_among_tasks_change_nothing():
    assert pk.Experiment(tasks=" recall, agreement,recall ") == pk.Experiment(tasks="recall,agreement")


def test_experiments_cannot_be_changed_and_are_told_apart_as_keys():
    experiment = pk.Experiment()
    with pytest.raises(AttributeError):
        experiment.sparsity = 0.1
    assert len({experiment, pk.Experiment(), pk.Experiment(sparsity=0.1)}) == 2
