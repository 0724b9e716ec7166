"""Experiments and grids: what names a row, what is refused, what is run only once."""

import inspect
import shutil

import numpy as np
import pytest

import perpkit as pk
from perpkit.experiments import grid as gridding
from perpkit.experiments.grid import recommended_lr
from perpkit.sources.embedded import data_folder

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
            ["retrain 'bias'", "did you mean 'biases'?", "none, biases, norms, head, full"],
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
    ],
)
def test_a_bad_value_is_named_with_the_valid_ones(bad, words):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the words are checked below
        pk.Experiment(**bad)
    for word in words:
        assert word in str(error.value)


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
def test_unions_are_allowed_in_any_order(union):
    assert pk.Experiment(retrain=union).retrain == union
    backwards = "+".join(reversed(union.split("+")))
    assert pk.Experiment(retrain=union).lr == pk.Experiment(retrain=backwards).lr


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
        "criterion": "random",
        "sparsity": 0.25,
        "retrain": "biases",
        "steps": 100,
        "lr": 0.01,
        "batch": 8,
        "length": None,
        "seed": 3,
    }


# --- keys -----------------------------------------------------------------------------------------


def test_the_key_is_the_same_for_the_same_inputs():
    assert pk.Experiment(**BASE).key() == pk.Experiment(**BASE).key()


@pytest.mark.parametrize(
    "change",
    [
        {"model": "tiny-opt-outliers"},
        {"text": "wikitext2"},
        {"criterion": "magnitude"},
        {"sparsity": 0.51},
        {"retrain": "norms"},
        {"steps": 99},
        {"lr": 0.011},
        {"batch": 9},
        {"length": 64},
        {"seed": 1},
    ],
    ids=lambda change: next(iter(change)),
)
def test_the_key_changes_with_each_input(change):
    assert pk.Experiment(**{**BASE, **change}).key() != pk.Experiment(**BASE).key()


def test_the_key_changes_with_the_result_format(monkeypatch):
    before = pk.Experiment().key()
    monkeypatch.setattr(gridding, "RESULT_FORMAT", gridding.RESULT_FORMAT + 1)
    assert pk.Experiment().key() != before


def test_the_key_of_the_story_world_changes_with_its_words_and_no_other_key_does(monkeypatch):
    before = [pk.Experiment(text=text).key() for text in ("storyworld", "wikitext2")]
    assert [pk.Experiment(text=text).key() for text in ("storyworld", "wikitext2")] == before
    getsource = inspect.getsource

    def reworded(module):
        return getsource(module).replace("Mia", "Mio")

    monkeypatch.setattr(gridding.inspect, "getsource", reworded)
    gridding._language.cache_clear()
    after = [pk.Experiment(text=text).key() for text in ("storyworld", "wikitext2")]
    gridding._language.cache_clear()
    assert after[0] != before[0]
    assert after[1] == before[1]


@pytest.mark.parametrize("module", ["grammar", "storyworld", "world"])
def test_all_that_tells_the_stories_is_in_their_key(module):
    assert module in [source.__name__.rpartition(".")[2] for source in gridding.LANGUAGE]


def test_numbers_of_other_types_name_the_same_row():
    plain = pk.Experiment(**{**BASE, "lr": 1.0}, sparsity=0.0, steps=10, batch=4, length=32, seed=1)
    other = pk.Experiment(
        **{**BASE, "lr": 1},
        sparsity=0,
        steps=np.int64(10),
        batch=np.int32(4),
        length=np.int64(32),
        seed=np.int64(1),
    )
    assert plain == other
    assert plain.key() == other.key()


@pytest.fixture
def folder(tmp_path):
    """A copy of the embedded model as a local folder."""
    return shutil.copytree(data_folder("models", "tiny-opt"), tmp_path / "model")


def test_a_folder_may_be_given_as_a_path(folder):
    assert pk.Experiment(model=folder).key() == pk.Experiment(model=str(folder)).key()


def test_the_key_changes_with_the_weights_of_a_local_folder(folder):
    before = pk.Experiment(model=str(folder)).key()
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    assert pk.Experiment(model=str(folder)).key() != before


def test_the_key_changes_with_the_configuration_of_a_local_folder(folder):
    before = pk.Experiment(model=str(folder)).key()
    (folder / "config.json").write_text((folder / "config.json").read_text() + "\n")
    assert pk.Experiment(model=str(folder)).key() != before


def test_the_key_ignores_other_files_of_a_local_folder(folder):
    before = pk.Experiment(model=str(folder)).key()
    (folder / "notes.txt").write_text("tried on Monday")
    assert pk.Experiment(model=str(folder)).key() == before


# --- grids ----------------------------------------------------------------------------------------


def test_a_grid_is_the_product_in_the_order_of_its_axes():
    grid = pk.Grid(retrain=["norms", "biases"], sparsity=[0.7, 0.3], seed=range(2))
    found = [(e.retrain, e.sparsity, e.seed) for e in grid]
    assert found == [
        ("norms", 0.7, 0),
        ("norms", 0.7, 1),
        ("norms", 0.3, 0),
        ("norms", 0.3, 1),
        ("biases", 0.7, 0),
        ("biases", 0.7, 1),
        ("biases", 0.3, 0),
        ("biases", 0.3, 1),
    ]
    assert len(grid) == 8
    assert repr(grid) == "Grid(8 experiments)"


def test_equal_experiments_are_kept_once_where_they_first_stood():
    grid = pk.Grid(seed=range(3), retrain=["biases", "none"], sparsity=[0.5, 0.5])
    assert [(e.retrain, e.seed) for e in grid] == [("biases", 0), ("none", 0), ("biases", 1), ("biases", 2)]


def test_a_single_value_needs_no_list():
    assert [e.asdict() for e in pk.Grid(retrain="biases", sparsity=0.7, seed=4)] == [
        pk.Experiment(retrain="biases", sparsity=0.7, seed=4).asdict()
    ]


def test_arrays_are_axes():
    grid = pk.Grid(sparsity=np.linspace(0.1, 0.9, 3), retrain="biases", seed=np.arange(2))
    assert len({e.key() for e in grid}) == len(grid) == 6


def test_an_empty_axis_is_refused():
    with pytest.raises(ValueError, match=r"axis 'sparsity' is empty"):
        pk.Grid(sparsity=[])


def test_an_unknown_axis_is_refused_with_the_nearest_name():
    with pytest.raises(ValueError, match=r"unknown axis 'sparsities'; did you mean 'sparsity'\?.*criterion"):
        pk.Grid(sparsities=[0.5])


def test_a_bad_value_anywhere_in_a_grid_is_refused_before_anything_is_run():
    with pytest.raises(ValueError, match=r"sparsity is 1\.5"):
        pk.Grid(sparsity=[0.5, 1.5])


def test_the_key_changes_with_the_words_of_a_local_text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("one\n")
    before = pk.Experiment(text=str(file)).key()
    file.write_text("two\n")
    assert pk.Experiment(text=str(file)).key() != before


def test_none_stands_alone_in_a_union():
    with pytest.raises(ValueError, match="'none' stands alone"):
        pk.Experiment(retrain="biases+none")


def test_an_experiment_can_be_made_from_its_dictionary():
    for retrain in ("none", "full"):
        experiment = pk.Experiment(retrain=retrain, seed=2)
        assert pk.Experiment(**experiment.asdict()) == experiment
