"""What names the row of an experiment: its inputs, and what they are read from."""

import inspect
import shutil

import numpy as np
import pytest

import perpkit as pk
from perpkit.experiments import experiment as experimenting
from perpkit.experiments import files
from perpkit.sources.embedded import data_folder
from perpkit.sources.text import TEXTS

BASE = {"retrain": "biases", "criterion": "random", "lr": 0.01}


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
        {"dtype": "bfloat16"},
        {"pattern": "2:4"},
        {"group": "row"},
        {"allocation": "erk"},
        {"unit": "matrix"},
        {"unit": "block", "unit_steps": 7},
        {"unit": "block", "unit_lr": 0.1},
        {"retrain": "mask_lora"},
        {"retrain": "mask_lora", "rank": 2},
        {"retrain": "mask_lora", "rank": 2, "alpha": 7.0},
        {"retrain": "scale_lora", "start": "symmetry_breaking"},
        {"accumulate": 2},
        {"schedule": "constant"},
        {"weight_decay": 0.1},
        {"tasks": "storyworld"},
    ],
    ids=str,
)
def test_the_key_changes_with_each_input(change):
    assert pk.Experiment(**{**BASE, **change}).key() != pk.Experiment(**BASE).key()


def test_the_key_changes_with_the_result_format(monkeypatch):
    before = pk.Experiment().key()
    monkeypatch.setattr(experimenting, "RESULT_FORMAT", experimenting.RESULT_FORMAT + 1)
    assert pk.Experiment().key() != before


def test_the_key_of_the_story_world_changes_with_its_words_and_no_other_key_does(monkeypatch):
    before = [pk.Experiment(text=text).key() for text in ("storyworld", "wikitext2")]
    assert [pk.Experiment(text=text).key() for text in ("storyworld", "wikitext2")] == before
    getsource = inspect.getsource

    def reworded(module):
        return getsource(module).replace("Mia", "Mio")

    monkeypatch.setattr(files.inspect, "getsource", reworded)
    files.language.cache_clear()
    after = [pk.Experiment(text=text).key() for text in ("storyworld", "wikitext2")]
    files.language.cache_clear()
    assert after[0] != before[0]
    assert after[1] == before[1]


@pytest.mark.parametrize("module", ["grammar", "storyworld", "world"])
def test_all_that_tells_the_stories_is_in_their_key(module):
    assert module in [source.__name__.rpartition(".")[2] for source in files.LANGUAGE]


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


def test_the_key_changes_with_the_settings_of_the_tokenizer(folder):
    """One of them is the context, which is the length of a window unless told."""
    before = pk.Experiment(model=str(folder)).key()
    settings = folder / "tokenizer_config.json"
    settings.write_text(settings.read_text().replace('"model_max_length": 128', '"model_max_length": 64'))
    assert pk.Experiment(model=str(folder)).key() != before


def test_the_key_ignores_other_files_of_a_local_folder(folder):
    before = pk.Experiment(model=str(folder)).key()
    (folder / "notes.txt").write_text("tried on Monday")
    assert pk.Experiment(model=str(folder)).key() == before


def test_the_key_changes_with_the_words_of_a_local_text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("one\n")
    before = pk.Experiment(text=str(file)).key()
    file.write_text("two\n")
    assert pk.Experiment(text=str(file)).key() != before


def test_the_key_changes_with_the_words_of_local_tasks(tmp_path):
    file = tmp_path / "rte.jsonl"
    file.write_text('{"sentence1": "A.", "sentence2": "B.", "label": 0}\n')
    before = pk.Experiment(tasks="rte", tasks_dir=str(tmp_path)).key()
    file.write_text('{"sentence1": "A.", "sentence2": "C.", "label": 0}\n')
    assert pk.Experiment(tasks="rte", tasks_dir=str(tmp_path)).key() != before


def test_files_are_read_once_for_many_rows(folder, monkeypatch):
    read = []
    content = files._content
    monkeypatch.setattr(files, "_content", lambda file: read.append(file) or content(file))
    monkeypatch.setattr(files, "TICK_SECONDS", 0.0)
    files._content_once.cache_clear()
    keys = {pk.Experiment(model=str(folder), sparsity=s / 10).key() for s in range(10)}
    assert len(keys) == 10
    assert len(read) == len(set(read))


def test_the_key_tells_apart_which_task_has_which_questions(tmp_path):
    for name, words in (("openbookqa", "one"), ("rte", "two")):
        (tmp_path / f"{name}.jsonl").write_text(words)
    before = pk.Experiment(tasks="openbookqa", tasks_dir=str(tmp_path)).key()
    (tmp_path / "openbookqa.jsonl").rename(tmp_path / "boolq.jsonl")
    (tmp_path / "rte.jsonl").rename(tmp_path / "openbookqa.jsonl")
    assert pk.Experiment(tasks="openbookqa", tasks_dir=str(tmp_path)).key() != before


def test_a_folder_with_the_name_of_a_text_is_not_that_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = [pk.Experiment(text=name).key() for name in TEXTS]
    for name in TEXTS:
        (tmp_path / name).mkdir()
    assert [pk.Experiment(text=name).key() for name in TEXTS] == before


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"sparsity": 0.0}, {"sparsity": -0.0}),
        ({"sparsity": 0.3}, {"sparsity": 0.1 * 3}),
        ({"pattern": "2:4"}, {"pattern": "02:4"}),
        ({"unit": "block", "unit_steps": 3}, {"unit": "window:1", "unit_steps": 3}),
    ],
)
def test_what_changes_nothing_is_one_experiment(one, other):
    assert pk.Experiment(**one) == pk.Experiment(**other)
    assert pk.Experiment(**one).key() == pk.Experiment(**other).key()
