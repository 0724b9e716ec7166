"""perpkit results: what a shell sees."""

import json

import pandas as pd
import pytest
from typer.testing import CliRunner

import perpkit as pk
from perpkit import cli
from perpkit.experiments.experiment import RESULT_FORMAT


def call(*arguments):
    return CliRunner().invoke(cli.main, list(map(str, arguments)))


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """A store of three finished rows, a failed one and one of an older format."""
    store = pk.Store(tmp_path_factory.mktemp("store") / "results.sqlite")
    for experiment in pk.Grid(sparsity=[0.5, 0.7], retrain=["none", "biases"], length=16):
        row = {
            **experiment.asdict(),
            "perplexity": 2.0 + experiment.sparsity,
            "error": None,
            "format": RESULT_FORMAT,
        }
        if experiment.retrain == "biases" and experiment.sparsity == 0.7:
            row = {**row, "error": "RuntimeError: no\nmore", "traceback": "in line 7", "perplexity": None}
        store.put(experiment.key(), row)
    store.put("old", {"sparsity": 0.9, "retrain": "none", "perplexity": 9.0, "format": 2})
    return store


@pytest.fixture
def copied(filled, tmp_path):
    """A copy of it that may be changed."""
    store = pk.Store(tmp_path / "copy.sqlite")
    for row in filled.table(failed=None).astype(object).where(lambda t: t.notna(), None).to_dict("records"):
        key = row.pop("key")
        row.pop("finished")
        store.put(key, row)
    return store


def rows(*arguments) -> list[dict]:
    done = call("results", *arguments, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)["rows"]


@pytest.mark.parametrize(
    ("arguments", "sparsities"),
    [
        ([], [0.5, 0.5, 0.7, 0.9]),
        (["--failed"], [0.7]),
        (["--all"], [0.5, 0.5, 0.7, 0.7, 0.9]),
        (["--outdated"], [0.9]),
        (["--where", "sparsity=0.5"], [0.5, 0.5]),
        (["--where", "sparsity=0.5,.9"], [0.5, 0.5, 0.9]),
        (["--where", "sparsity=0.5", "--where", "retrain=biases"], [0.5]),
        (["--where", "pattern=none", "--where", "sparsity=0.9"], [0.9]),
        (["--where", "retrain=norms"], []),
    ],
    ids=str,
)
def test_rows_are_filtered(filled, arguments, sparsities):
    assert [row["sparsity"] for row in rows("--store", filled.path, *arguments)] == sparsities


def test_rows_are_listed_for_a_terminal(filled):
    done = call("results", "--store", filled.path, "--all")
    assert "RuntimeError: no" in done.stdout
    assert "5 rows in" in done.stdout
    done = call("results", "--store", filled.path, "--columns", "sparsity, perplexity")
    assert done.stdout.splitlines()[0].split() == ["sparsity", "perplexity"]
    done = call("results", "--store", filled.path, "--where", "retrain=norms")
    assert "no such rows" in done.stdout


def test_rows_are_exported_with_all_columns(filled, tmp_path):
    out = tmp_path / "rows.csv"
    assert call("results", "--store", filled.path, "--where", "sparsity=0.5", "--export", out).exit_code == 0
    table = pd.read_csv(out)
    assert len(table) == 2
    assert {"key", "finished", "criterion", "perplexity"} <= set(table)


def test_rows_are_deleted_only_when_told_which_and_asked(copied):
    asked = ["results", "--store", str(copied.path), "--delete"]
    done = call(*asked)
    assert done.exit_code == 1
    assert "say which rows to delete" in done.stderr
    done = CliRunner().invoke(cli.main, [*asked, "--failed"], input="n\n")
    assert "nothing is deleted" in done.stderr
    assert len(copied.table(failed=None)) == 5
    done = CliRunner().invoke(cli.main, [*asked, "--failed"], input="y\n")
    assert "1 rows deleted" in done.stderr
    assert call(*asked, "--outdated", "--yes").exit_code == 0
    assert sorted(copied.table(failed=None).sparsity) == [0.5, 0.5, 0.7]


def test_reading_neither_makes_nor_changes_a_store(tmp_path):
    done = call("results", "--store", tmp_path / "none.sqlite")
    assert done.exit_code == 1
    assert "there is no store" in done.stderr
    done = call("results", "--store", tmp_path / "none.sqlite", "--delete", "--failed", "--yes")
    assert done.exit_code == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--where", "sparsity"], "write axis=value"),
        (["--where", "sparsty=1"], "no column 'sparsty'"),
        (["--columns", "sparsty"], "no column 'sparsty'"),
        (["--where", "sparsty=1"], "did you mean 'sparsity'?"),
        (["--columns", "perplexty,sparsity"], "did you mean 'perplexity'?"),
        (["--failed", "--where", "retrain=none", "--where", "sparsty=1"], "did you mean 'sparsity'?"),
    ],
)
def test_a_bad_request_is_a_sentence(filled, arguments, words):
    done = call("results", "--store", filled.path, *arguments)
    assert done.exit_code == 1
    assert words in done.stderr


# --- values with commas, repeated conditions --------------------------------------------------------


@pytest.fixture
def worded(tmp_path):
    """Rows whose values have commas, or look like numbers and are none."""
    store = pk.Store(tmp_path / "worded.sqlite")
    told = {"a": "boolq,rte", "b": "boolq", "c": "rte", "1e5": None}
    for number, (key, tasks) in enumerate(told.items()):
        store.put(key, {"tasks": tasks, "text": f"{number},{number}.txt", "model": "2024"})
    return store


@pytest.mark.parametrize(
    ("arguments", "keys"),
    [
        (["--where", "tasks=boolq,rte"], ["a"]),
        (["--where", "tasks=boolq, rte"], ["a"]),
        (["--where", "tasks=boolq"], ["b"]),
        (["--where", "tasks=boolq", "--where", "tasks=rte"], ["b", "c"]),
        (["--where", "tasks=none"], ["1e5"]),
        (["--where", 'text="1,1.txt"'], ["b"]),
        (["--where", 'text="1,1.txt", "2,2.txt"'], ["b", "c"]),
        (["--where", "text=1,1.txt"], []),
        (["--where", "key=1e5"], ["1e5"]),
        (["--where", "model=2024", "--where", "key=a,b"], ["a", "b"]),
    ],
    ids=str,
)
def test_values_may_have_commas_and_conditions_on_one_column_are_alternatives(worded, arguments, keys):
    assert [row["key"] for row in rows("--store", worded.path, *arguments)] == keys


# --- outdated rows ----------------------------------------------------------------------------------


@pytest.fixture
def edited(tmp_path):
    """A store of one row that is as it was, one of a text that has changed and one of somebody's own."""
    text = tmp_path / "text.txt"
    text.write_text("one\n")
    store = pk.Store(tmp_path / "edited.sqlite")
    for experiment in pk.Grid(text=["storyworld", str(text)], retrain="biases"):
        store.put(
            experiment.key(),
            {**experiment.asdict(), "perplexity": 2.0, "error": None, "format": RESULT_FORMAT},
        )
    store.put("mine", {"text": "by hand", "perplexity": 3.0})
    text.write_text("another\n")
    return store


def test_outdated_rows_are_marked_and_counted_with_the_way_to_them(edited, filled):
    done = call("results", "--store", edited.path)
    assert "outdated" in done.stdout.splitlines()[0]
    assert [line for line in done.stdout.splitlines() if "other files" in line] != []
    assert "1 of them outdated: no sweep from here would take it (--outdated shows" in done.stdout
    told = [row["outdated"] for row in rows("--store", edited.path)]
    assert told == [None, "other files", None]
    assert rows("--store", filled.path, "--where", "sparsity=0.9")[0]["outdated"] == "older format"
    assert "outdated" not in call("results", "--store", filled.path, "--where", "sparsity=0.5").stdout


def test_failed_and_outdated_rows_are_those_that_are_both(edited):
    outdated = edited.table().query("text.str.endswith('text.txt')").iloc[0]
    inputs = {name: outdated[name] for name in pk.Experiment().asdict()} | {"seed": 1, "steps": 5}
    inputs = {name: None if value != value else value for name, value in inputs.items()}
    edited.put("failed", {**inputs, "error": "RuntimeError: no", "format": RESULT_FORMAT})
    before = set(edited.table(failed=None)["key"])
    done = call("results", "--store", edited.path, "--failed", "--outdated", "--delete", "--yes")
    assert done.exit_code == 0, done.output
    assert before - set(edited.table(failed=None)["key"]) == {"failed"}


def test_all_and_failed_contradict_each_other(copied):
    done = call("results", "--store", copied.path, "--all", "--failed", "--delete", "--yes")
    assert done.exit_code == 1
    assert "--all takes finished and failed rows" in done.stderr
    assert len(copied.table(failed=None)) == 5


def test_a_row_that_is_finished_while_the_question_stands_there_is_left(copied, monkeypatch):
    failed = copied.table(failed=True).iloc[0]

    def confirm(*_, **__):
        copied.put(failed["key"], {"sparsity": 0.7, "retrain": "biases", "perplexity": 2.5, "error": None})
        return True

    monkeypatch.setattr("typer.confirm", confirm)
    done = call("results", "--store", copied.path, "--failed", "--delete")
    assert "0 rows deleted" in done.stderr
    assert "1 left: they have changed since they were listed" in done.stderr
    assert failed["key"] in set(copied.table()["key"])


def test_outdated_rows_are_deleted_and_no_others(edited):
    assert [row["outdated"] for row in rows("--store", edited.path, "--outdated")] == ["other files"]
    assert call("results", "--store", edited.path, "--outdated", "--delete", "--yes").exit_code == 0
    assert edited.table().text.tolist() == ["storyworld", "by hand"]


def test_rows_whose_files_are_not_here_are_never_deleted_as_outdated(tmp_path, monkeypatch):
    """From another folder, or with a disk that is not there, a good row looks like one of changed files."""
    text, store = tmp_path / "mine.txt", tmp_path / "rows.sqlite"
    text.write_text("Ada walks home to the old inn and sleeps there all night long.\n" * 400)
    monkeypatch.chdir(tmp_path)
    pk.sweep(pk.Grid(text="mine.txt", sparsity=[0.5], length=16), store=store, progress=False)
    assert rows("--store", store)[0]["outdated"] is None
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert [row["outdated"] for row in rows("--store", store, "--outdated")] == ["files not here"]
    done = call("results", "--store", store, "--outdated", "--delete", "--yes")
    assert "1 left: their files are not here" in done.stderr
    monkeypatch.chdir(tmp_path)
    assert rows("--store", store)[0]["outdated"] is None


@pytest.mark.parametrize("what", ["the file", "the folder", "one of two files"])
def test_a_row_whose_tasks_are_not_here_is_not_taken_for_one_of_other_inputs(tmp_path, what):
    """An empty folder is what a disk leaves that is not there."""
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    names = ["boolq", "rte"] if "two" in what else ["boolq"]
    for name in names:
        (tasks / f"{name}.jsonl").write_text("{}\n")
    experiment = pk.Experiment(tasks=",".join(names), tasks_dir=str(tasks))
    row = {**experiment.asdict(), "error": None, "format": RESULT_FORMAT}
    pk.Store(tmp_path / "rows.sqlite").put(experiment.key(), row)
    (tasks / "boolq.jsonl").unlink()
    if what == "the folder":
        tasks.rmdir()
    assert rows("--store", tmp_path / "rows.sqlite")[0]["outdated"] == "files not here"


def test_a_row_whose_weights_are_not_here_is_not_taken_for_one_of_other_files(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_text("weights")
    experiment = pk.Experiment(model=str(model))
    row = {**experiment.asdict(), "error": None, "format": RESULT_FORMAT}
    pk.Store(tmp_path / "rows.sqlite").put(experiment.key(), row)
    (model / "model.safetensors").write_text("other weights")
    assert rows("--store", tmp_path / "rows.sqlite")[0]["outdated"] == "other files"
    (model / "model.safetensors").unlink()
    assert rows("--store", tmp_path / "rows.sqlite")[0]["outdated"] == "files not here"


def test_a_value_that_no_row_has_is_answered_with_the_nearest(filled):
    done = call("results", "--store", filled.path, "--where", "retrain=baises,none")
    assert done.exit_code == 0
    assert "no row has retrain=baises; did you mean 'biases'?" in done.stderr
    assert "did you mean" not in call("results", "--store", filled.path, "--where", "retrain=norms").stderr
    assert "did you mean" not in call("results", "--store", filled.path, "--where", "retrain=biases").stderr
