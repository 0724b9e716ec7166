"""What a soup refuses, in words, with the caller's model as it was and the folder free."""

import copy

import pytest
import torch
from case_names import named
from soup_parts import cook, same_tensors

from perpkit.retraining.soups.candidates import variation
from perpkit.retraining.soups.sms import sms

BASE = {"seed": 0, "lr": 0.1, "weight_decay": 0.0, "steps": 10}


@pytest.fixture
def dense(make_model):
    return make_model("opt")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"m": 0}, "m is 0"),
        ({"m": 2.0}, r"m is 2\.0"),
        ({"cycles": 0}, "cycles is 0"),
        ({"sparsity": 1.5}, r"sparsity is 1\.5"),
        ({"seed": 0.5}, r"seed is 0\.5"),
        ({"vary": "momentum"}, "cannot vary 'momentum'; candidates can differ in seed, lr"),
        ({"vary": "learning_rate"}, "cannot vary 'learning_rate'; did you mean 'lr'"),
        ({"vary": {"seeds": [1, 2, 3]}}, "did you mean 'seed'"),
        ({"vary": 3}, "vary is 3"),
        ({"vary": {"batch": [1, 2, 3]}}, "cannot vary 'batch'"),
        ({"vary": {"lr": [1e-3, 1e-2]}}, "vary has 2 values of 'lr' for m=3"),
        ({"vary": {"lr": 1e-3}}, "want a list of m=3 values"),
        ({"vary": {"lr": [1e-3, 1e-2, 1e-3]}}, "equal candidates make no soup"),
        ({"vary": {"lr": [1e-3, 1e-2, -1.0]}}, r"lr=-1\.0"),
        ({"vary": {"steps": [1, 2, 2.5]}}, r"steps is 2\.5"),
        ({"vary": {"seed": [1, 2, "3"]}}, "seed is '3'"),
        ({"vary": {"lr": [1, 2, 3], "seed": [1, 2, 3]}}, "differ in one thing"),
        ({"vary": "weight_decay"}, "values of 'weight_decay' are"),
        ({"vary": "steps", "steps": 0}, "values of 'steps' are"),
        ({"lr": None}, "lr is None"),
        ({"steps": -1}, "steps=-1"),
        ({"soup": "minestrone"}, "unknown soup 'minestrone'; the soups are uniform and greedy"),
        ({"soup": "greedy"}, "needs held-out data"),
        ({"score": lambda model: 0.0, "validation": torch.zeros(2, 3)}, "both given"),
        ({"baselines": ["imp"]}, "how to compare the baselines"),
        (
            {"baselines": ["gmp"], "evaluate": lambda model: 0.0},
            "unknown baseline 'gmp'; the baselines are imp",
        ),
        ({"baselines": "imp", "evaluate": lambda model: 0.0}, "give a list"),
        ({"baselines": ["best"], "evaluate": lambda model: 0.0}, "held-out score"),
        ({"checkpoint": "a.pt"}, "takes no 'checkpoint'"),
        ({"stop": lambda losses: True}, "takes no 'stop'"),
        ({"subset": "lora"}, "say which, adapter='mask_lora'"),
        ({"adapter": "mask_lora"}, "is not trained by subset='full'"),
        ({"adapter": "lora", "subset": "lora"}, "cannot be merged"),
        ({"adapter": "dora", "subset": "lora"}, "unknown kind of adapter 'dora'"),
        ({"adapter": "mask_lora", "subset": "lora", "rank": 99}, "rank is 99"),
        ({"subset": "bias"}, "unknown subset 'bias'"),
        ({"optimizer": "lion"}, "unknown optimizer 'lion'"),
        ({"vary": {"lr": [[1], [2], [3]]}}, r"vary has \[1\] for 'lr'; it must be a number"),
        ({"sparsity": "0.5"}, "sparsity is '0.5'; it is the fraction"),
        ({"pruning": {"sparsity": 0.5}}, "pruning has 'sparsity', which is not set there"),
        ({"pruning": {"masks": None}}, "pruning has 'masks'"),
        ({"pruning": {"calibration": torch.zeros(1, 2)}}, "pruning has 'calibration'"),
        ({"pruning": ["group"]}, r"pruning is \['group'\]; it is a mapping"),
        ({"executor": 2}, "executor is 2; give a concurrent"),
        ({"validation": (torch.zeros(2, 3), torch.zeros(2))}, "validation does not fit: the data is a tuple"),
        ({"validation": torch.full((2, 16), 99)}, "validation does not fit: .*99"),
    ],
    ids=named,
)
def test_refused_before_anything_is_done(dense, windows, tmp_path, changes, words):
    before = copy.deepcopy(dense)
    with pytest.raises(ValueError, match=words):
        cook(dense, windows, folder=tmp_path / "soup", **changes)
    assert same_tensors(dense, before)
    assert not (tmp_path / "soup").exists()


def test_missing_settings_are_refused_as_retrain_does(dense, windows):
    with pytest.raises(TypeError, match="'lr'"):
        sms(dense, "magnitude", windows, sparsity=0.5, m=2, cycles=1, subset="full")
    with pytest.raises(TypeError, match="'lr'"):
        sms(dense, "magnitude", windows, sparsity=0.5, m=2, cycles=1, subset="full", vary={"lr": [1, 2]})
    with pytest.raises(ValueError, match="data"):
        cook(dense, (torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)))


def test_the_spread_of_values():
    assert variation("lr", 3, BASE).values == (0.05, 0.1, 0.2)
    assert variation("steps", 5, BASE).values == (5, 8, 10, 12, 15)
    assert variation("seed", 3, {**BASE, "seed": 6}).values == (6, 7, 8)
    for name in ("seed", "lr", "weight_decay", "steps"):
        assert variation(name, 1, BASE).values == (BASE[name],)


# --- folders --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sparsity": 0.5}, "another sparsity;"),
        ({"m": 2}, "another learning rates and m and vary"),
        ({"vary": "lr"}, "another learning rates and vary"),
        ({"seed": 1}, "another seed"),
        ({"lr": 2e-3}, "another learning rates"),
        ({"weight_decay": 0.1}, "another weight_decay"),
        ({"cycles": 1}, "another cycles"),
        ({"pruning": {"group": "row"}}, "another pruning"),
        ({"calibration": torch.zeros(2, 8, dtype=torch.int64)}, "another calibration"),
        ({"temperature": 2.0}, "another distillation"),
        ({"soup": "greedy", "score": lambda model: 0.0}, "another soup"),
        ({"model": 1}, "another model"),
        ({"data": -1}, "another data"),
    ],
    ids=named,
)
def test_a_folder_of_another_run(make_model, windows, tmp_path, changes, words):
    teacher = make_model("opt", seed=5)
    cook(make_model("opt"), windows, folder=tmp_path, distill=teacher, cancelled=lambda: True)
    model = make_model("opt", seed=changes.pop("model", 0))
    data = windows if changes.pop("data", 0) == 0 else windows[:-1]
    with pytest.raises(ValueError, match=words):
        cook(model, data, folder=tmp_path, distill=teacher, **changes)


def test_other_folders(dense, windows, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="has other files in it"):
        cook(dense, windows, folder=tmp_path)
    with pytest.raises(ValueError, match="cannot use the folder"):
        cook(dense, windows, folder=tmp_path / "notes.txt")
    other = tmp_path / "other"
    other.mkdir()
    (other / "soup.json").write_text("[1]")
    with pytest.raises(ValueError, match="does not describe a soup"):
        cook(dense, windows, folder=other)


def test_a_call_that_came_to_nothing_leaves_the_folder_free(dense, windows, tmp_path):
    with pytest.raises(ValueError, match="magnitud"):
        sms(dense, "magnitud", windows, sparsity=0.5, m=2, cycles=1, subset="full", lr=1e-3, folder=tmp_path)
    assert len(cook(dense, windows, m=2, cycles=1, folder=tmp_path).candidates) == 2


def test_damaged_files(dense, windows, tmp_path):
    cook(dense, windows, folder=tmp_path, m=2, cycles=1)
    file = tmp_path / "sms" / "cycle-1-candidate-2.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match="Delete it"):
        cook(dense, windows, folder=tmp_path, m=2, cycles=1)
    file.unlink()
    assert len(cook(dense, windows, folder=tmp_path, m=2, cycles=1).candidates) == 2
