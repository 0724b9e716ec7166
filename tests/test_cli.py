"""The command line: help, errors in one line, and Ctrl-C."""

import os
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing

import pytest
from typer.testing import CliRunner

import perpkit as pk
from perpkit import cli, demo


def perpkit(*arguments):
    return CliRunner().invoke(cli.main, list(map(str, arguments)))


def test_help_lists_the_commands():
    found = perpkit("--help")
    assert found.exit_code == 0
    assert "demo" in found.output


def test_demo_explains_itself():
    found = perpkit("demo", "--help")
    assert found.exit_code == 0
    assert "--out" in found.output
    assert "Folder for the figures" in found.output


def test_an_unknown_command_is_refused():
    found = perpkit("dmeo")
    assert found.exit_code == 2
    assert "dmeo" in found.stderr


def test_out_is_where_everything_goes(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(demo, "run_demo", lambda out, executor: asked.append(out))
    assert perpkit("demo", "--out", tmp_path / "here").exit_code == 0
    assert asked == [tmp_path / "here"]


@pytest.mark.parametrize(("cores", "workers"), [({0}, None), ({0, 1}, 2), ({0, 1, 2, 3}, 2)])
def test_workers_are_started_where_there_are_cores(monkeypatch, cores, workers):
    monkeypatch.setattr(cli, "_cores", lambda: cores)
    with cli._workers() as executor:
        assert getattr(executor, "_max_workers", None) == workers


def test_a_file_in_the_way_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("in the way")
    found = perpkit("demo", "--out", tmp_path / "file")
    assert found.exit_code == 1
    (line,) = found.stderr.splitlines()
    assert line.startswith("perpkit demo: cannot create the folder of the store")
    assert str(tmp_path / "file") in line
    assert (tmp_path / "file").read_text() == "in the way"


def test_ctrl_c_says_that_the_rows_are_kept(tmp_path, monkeypatch):
    def stopped(out, executor):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run_demo", stopped)
    found = perpkit("demo", "--out", tmp_path)
    assert found.exit_code == 130
    assert "finished rows are kept" in found.output


DRIVER = """
import sys
import perpkit as pk
from perpkit import cli, demo


def grid():
    return pk.Grid(
        sparsity=[0.5, 0.7], retrain=["none", "biases+norms", "full"], steps=int(sys.argv[2]),
        length=16, batch=4, seed=range(2),
    )


if __name__ == "__main__":
    demo.demo_grid = grid
    demo._execute_notebook = lambda out, store: None
    cli.main(["demo", "--out", sys.argv[1]])
"""


def rows_in(file) -> dict[str, str]:
    if not file.is_file():
        return {}
    with closing(sqlite3.connect(file, timeout=30)) as connection:
        return dict(connection.execute("SELECT key, row FROM rows"))


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_a_demonstration_stopped_by_ctrl_c_goes_on_where_it_stopped(tmp_path):
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER)
    out = tmp_path / "out"
    store = pk.Store(out / "results.sqlite")
    command = [sys.executable, str(driver), str(out), "60"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    options = {"env": environment, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    running = subprocess.Popen(command, start_new_session=True, **options)
    deadline = time.monotonic() + 120
    # Two rows without retraining come first and are quick; those of the last ones are not yet there.
    while len(rows_in(store.path)) < 2 and running.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert running.poll() is None
    # As a terminal does: to every process of the group.
    os.killpg(running.pid, signal.SIGINT)
    said, errors = running.communicate(timeout=120)
    assert running.returncode == 130, errors
    assert "Stopped. The finished rows are kept" in said
    kept = rows_in(store.path)
    assert 2 <= len(kept) < 10

    again = subprocess.run(command, timeout=240, check=False, **options)
    assert again.returncode == 0, again.stderr
    assert "At 50 % sparsity" in again.stdout
    assert f"{len(kept)}/10" in again.stderr
    rows = rows_in(store.path)
    assert len(rows) == 10
    # The seconds in a row would differ if it had been computed again.
    assert {key: rows[key] for key in kept} == kept
