"""perpkit sweep: what a shell sees."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest
from typer.testing import CliRunner

import perpkit as pk
from perpkit import cli
from perpkit.cli import workers as working
from perpkit.cli.axes import MEANINGS

SHORT = ("--length", "16", "--steps", "2", "--batch", "2")


@pytest.fixture
def store(tmp_path):
    return tmp_path / "results.sqlite"


def call(*arguments):
    return CliRunner().invoke(cli.main, list(map(str, arguments)))


def sweep(store, *arguments):
    return call("sweep", "--store", store, *SHORT, *arguments)


# --- sweep ----------------------------------------------------------------------------------------


def test_every_input_of_an_experiment_is_a_flag_with_its_default():
    words = " ".join(call("sweep", "--help").stdout.replace("│", " ").split())
    fields = {field.name: field.default for field in dataclasses.fields(pk.Experiment)}
    assert list(MEANINGS) == list(fields)
    for name, default in fields.items():
        assert f"--{name.replace('_', '-')}" in words
        if default is not None:
            assert f"Default: {default}" in words, name


def test_flags_are_axes_and_the_table_shows_those_that_vary(store):
    done = sweep(store, "--sparsity", "0.5,0.7", "--retrain", "none,biases")
    assert done.exit_code == 0, done.output
    head, *rows = done.stdout.splitlines()
    assert head.split() == "sparsity retrain perplexity trainable_share seconds".split()
    assert "Measured on storyworld" in done.stderr
    assert [row.split()[:2] for row in rows] == [
        ["0.5", "none"],
        ["0.5", "biases"],
        ["0.7", "none"],
        ["0.7", "biases"],
    ]
    assert len(pk.Store(store).table()) == 4
    assert "4/4" in done.stderr


def test_flags_replace_the_axes_of_the_file(tmp_path, store):
    file = tmp_path / "grid.yaml"
    file.write_text("sparsity: [0.1, 0.2]\npattern: [null, 2:4]\nlength: 16")
    done = call("sweep", file, "--store", store, "--sparsity", "0.3", "--json")
    found = json.loads(done.stdout)
    assert [(row["sparsity"], row["pattern"]) for row in found["rows"]] == [(0.3, None), (0.5, "2:4")]
    assert (found["finished"], found["failed"], found["store"]) == (2, 0, str(store))


def test_none_is_no_value_but_for_the_retraining(store):
    done = sweep(store, "--pattern", "none,2:4", "--retrain", "none", "--json")
    assert [row["pattern"] for row in json.loads(done.stdout)["rows"]] == [None, "2:4"]


def test_the_commas_of_tasks_are_theirs(store):
    done = sweep(store, "--tasks", "agreement,recall", "--dry-run", "--json")
    assert json.loads(done.stdout)["rows"] == 1


def test_a_dry_run_counts_and_computes_nothing(store):
    sweep(store, "--sparsity", "0.5")
    done = sweep(store, "--sparsity", "0.5,0.6,0.7", "--dry-run")
    assert done.stdout.startswith("3 rows: 1 finished, 2 left, about ")
    assert len(pk.Store(store).table()) == 1


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_the_table_is_written(tmp_path, store, suffix):
    out = tmp_path / f"table.{suffix}"
    assert sweep(store, "--sparsity", "0.5,0.6", "--out", out).exit_code == 0
    table = pd.read_csv(out) if suffix == "csv" else pd.read_parquet(out)
    assert table.sparsity.tolist() == [0.5, 0.6]


def test_failed_rows_are_told_with_an_exit_code_of_their_own(store):
    arguments = ("--retrain", "none,perp_v1:bn_recalibrate", "--lr", "0.1")
    done = sweep(store, *arguments)
    assert done.exit_code == 3
    assert "1 of 2 rows failed" in done.stderr
    assert "ValueError: a OPTForCausalLM has no batch normalisation" in done.stderr
    assert "Traceback" not in done.output
    again = sweep(store, *arguments, "--json")
    assert again.exit_code == 3
    assert json.loads(again.stdout)["failed"] == 1
    shown = call("results", "--store", store, "--traceback")
    assert "Traceback (most recent call last)" in shown.stdout
    assert "1 row in" in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--sparsity", "1.5"], "sparsity is 1.5"),
        (["--criterion", "magnitud"], "did you mean 'magnitude'?"),
        (["--sparsity", "half"], "sparsity is 'half'; it must be a number"),
        (["--sparsity", "none"], "sparsity is None; leave it out for 0.5"),
        (["--model", "./nowhere"], "there is no folder './nowhere'"),
        (["--text", "storyworld,storyword"], "unknown text 'storyword'; did you mean 'storyworld'?"),
        (["missing.yaml"], "cannot read the grid"),
        (["--pattern", "2:4", "--sparsity", "0.5,0.7"], "no row would have --sparsity 0.7: the pattern 2:4"),
    ],
)
def test_an_error_is_a_sentence_on_stderr(store, arguments, words):
    done = sweep(store, *arguments)
    assert done.exit_code == 1
    assert words in done.stderr
    assert done.stderr.startswith("perpkit sweep: ") or "\nperpkit sweep: " in done.stderr
    assert "--retry-failed" not in done.stderr
    assert "Traceback" not in done.output
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--sparsities", "0.5"], "--sparsity"),
        (["--workers", "0"], "--workers"),
        (["--out", "table.xlsx"], ".csv or .parquet"),
    ],
)
def test_a_wrong_command_line_has_its_own_exit_code(store, arguments, words):
    done = sweep(store, *arguments)
    assert done.exit_code == 2
    assert words in done.stderr


def test_an_unknown_axis_in_a_file_is_named_with_the_nearest(tmp_path, store):
    (tmp_path / "grid.yaml").write_text("sparsitty: 0.5")
    done = call("sweep", tmp_path / "grid.yaml", "--store", store)
    assert done.exit_code == 1
    assert "did you mean 'sparsity'?" in done.stderr


def test_help_is_quick_and_tells_the_exit_codes():
    for command in ("sweep", "results", "doctor"):
        assert "3 some rows failed" in " ".join(call(command, "--help").stdout.split())
    code = "import sys, perpkit.cli; sys.exit('torch' in sys.modules or 'pandas' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.slow
def test_ctrl_c_keeps_the_finished_rows_and_the_same_command_goes_on(tmp_path, store):
    axes = ["--sparsity", "0.3,0.5,0.7", "--retrain", "biases,norms", "--steps", "60", "--length", "64"]
    command = [sys.executable, "-m", "perpkit", "sweep", *axes, "--store", str(store), "--workers", "2"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (store.exists() and len(pk.Store(store).table())):
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "The finished rows are kept" in err
    assert "Traceback" not in err
    assert out == ""
    kept = len(pk.Store(store).table())
    assert 1 <= kept < 6
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"{kept}/6" in done.stderr
    assert len(pk.Store(store).table(failed=None)) == 6


def _seen() -> tuple:
    import torch

    # Long enough for the other worker to take the other call.
    time.sleep(1)
    return os.environ.get("CUDA_VISIBLE_DEVICES"), torch.get_num_threads()


@pytest.mark.slow
def test_the_workers_really_see_them(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with working.worker_processes(2, threads=2, devices=["0", "1"]) as executor:
        assert executor is not None
        calls = [executor.submit(_seen) for _ in range(2)]
        assert sorted(call.result() for call in calls) == [("0", 2), ("1", 2)]
