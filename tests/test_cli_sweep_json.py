"""perpkit sweep: what a script gets when rows fail, and what a dry run tries."""

import json
import signal

import pytest
import torch
from typer.testing import CliRunner

import perpkit as pk
from perpkit import cli
from perpkit.experiments import estimate as estimating
from perpkit.experiments import sweep as sweeping

SHORT = ("--length", "16", "--steps", "2", "--batch", "2")
FOUR = "0.1,0.2,0.3,0.4"


@pytest.fixture
def store(tmp_path):
    return tmp_path / "results.sqlite"


def sweep(store, *arguments):
    given = ["sweep", "--store", store, *SHORT, *arguments]
    return CliRunner().invoke(cli.main, list(map(str, given)))


def test_when_every_row_fails_a_script_still_gets_its_document(tmp_path):
    store = tmp_path / "my rows.sqlite"
    done = sweep(store, "--retrain", "biases", "--lr", "1e9", "--steps", "3", "--length", "16", "--json")
    assert done.exit_code == 1
    found = json.loads(done.stdout)
    assert (found["finished"], found["failed"], found["store"]) == (0, 2, str(store))
    assert [row["steps"] for row in found["rows"]] == [2, 3]
    assert found["rows"][0]["error"] == found["error"]
    assert "Try lr=" in found["error"]
    # The way out names the store that was used.
    assert f"perpkit results --store '{store}' --failed --traceback shows where" in done.stderr


def test_rows_that_could_not_be_loaded_are_not_said_to_be_listed(tmp_path):
    store = tmp_path / "rows.sqlite"
    done = sweep(store, "--model", f"tiny-opt,{tmp_path / 'nowhere'}", "--retrain", "none", "--length", "16")
    assert done.exit_code == 3
    assert "1 of 2 rows failed" in done.stderr
    assert "shows where" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--sparsity", "1.5"], "sparsity is 1.5"),
        (["--text", "nofile.txt"], "unknown text 'nofile.txt'"),
        (["--text", "nofile.txt", "--dry-run"], "unknown text 'nofile.txt'"),
    ],
)
def test_what_is_wrong_is_told_to_scripts_too(store, arguments, words):
    done = sweep(store, *arguments, "--json")
    assert done.exit_code == 1
    said = json.loads(done.stdout)["error"]
    assert said.startswith(words)
    assert f"perpkit sweep: {said}" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--store", "rows.sqlite"], "name a grid file or at least one axis"),
        (["--sparsities", "0.5"], "--sparsities"),
        (["--seed", "1", "--out", "table.xlsx"], "table.xlsx must end in .csv or .parquet"),
    ],
)
def test_a_wrong_command_line_is_told_to_scripts_too(arguments, words):
    done = CliRunner().invoke(cli.main, ["sweep", *arguments, "--json"])
    assert done.exit_code == 2
    assert words in json.loads(done.stdout)["error"]
    assert done.stderr


def test_ctrl_c_is_told_to_scripts_too(store, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(sweeping, "sweep", interrupted)
    done = sweep(store, "--json")
    signal.signal(signal.SIGINT, before)
    assert done.exit_code == 130
    assert "Stopped. The finished rows are kept" in json.loads(done.stdout)["error"]
    assert "Stopped. The finished rows are kept" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "threads"),
    [
        (["--workers", "2", "--sparsity", FOUR], 4),
        (["--workers", "4", "--sparsity", FOUR], 2),
        (["--workers", "9", "--sparsity", "0.1,0.2"], 4),
        (["--workers", "2", "--threads-per-worker", "3", "--sparsity", FOUR], 3),
        (["--workers", "1", "--sparsity", FOUR], 1),  # torch's own number, here that of the tests
    ],
    ids=str,
)
def test_a_dry_run_tries_rows_on_the_threads_of_a_worker(store, monkeypatch, arguments, threads):
    tried = []

    def run(experiment):
        tried.append(torch.get_num_threads())
        return {"seconds": 1.0, "seconds_retrain": 0.0, "seconds_measure": 1.0, "steps": 0}

    monkeypatch.setattr(cli.sweep, "cores", lambda: range(8))
    monkeypatch.setattr(cli.sweep, "cuda_devices", list)
    monkeypatch.setattr(estimating, "run", run)
    done = sweep(store, "--dry-run", *arguments)
    assert done.exit_code == 0, done.output
    assert tried == [threads]
    assert torch.get_num_threads() == 1
    assert "trying one row of each kind" in done.stderr


def test_a_dry_run_of_finished_rows_tries_none(store):
    (experiment,) = pk.Grid(length=16)
    pk.Store(store).put(experiment.key(), {**experiment.asdict(), "error": None})
    done = sweep(store, "--dry-run")
    assert done.stdout.startswith("1 row: 1 finished, 0 left")
    assert "trying" not in done.stderr
