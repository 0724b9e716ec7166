"""The command line: help, and errors in one line."""

import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import pytest
from typer.testing import CliRunner

from perpkit import cli, demo
from perpkit.cli import workers as working

posix = pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")


@pytest.fixture(autouse=True)
def ctrl_c_as_before():
    """Having stopped, the command listens to Ctrl-C no more."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def one_core(monkeypatch):
    """No worker processes for a demonstration that does nothing."""
    monkeypatch.setattr(cli.demo, "cores", lambda: {0})


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


@pytest.mark.parametrize(("cores", "workers"), [({0}, []), ({0, 1}, [2]), ({0, 1, 2, 3}, [2])])
def test_workers_are_started_where_there_are_cores(monkeypatch, tmp_path, cores, workers):
    started, told = [], []

    class Pool(ThreadPoolExecutor):
        def __init__(self, count, **options):
            super().__init__(count)
            started.append(count)

    monkeypatch.setattr(cli.demo, "cores", lambda: cores)
    monkeypatch.setattr(working, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(demo, "run_demo", lambda out, executor: told.append(executor is None))
    assert perpkit("demo", "--out", tmp_path).exit_code == 0
    assert started == workers
    assert told == [workers == []]


@posix
def test_workers_are_born_deaf_to_ctrl_c():
    asked = "import signal; print(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []))"
    command = [sys.executable, "-c", asked]
    with working._born_deaf_to_ctrl_c():
        assert subprocess.check_output(command, text=True).strip() == "True"
    assert subprocess.check_output(command, text=True).strip() == "False"


def test_a_worker_that_dies_is_one_clear_line(tmp_path, monkeypatch):
    def short_of_memory(out, executor):
        raise BrokenProcessPool

    monkeypatch.setattr(demo, "run_demo", short_of_memory)
    found = perpkit("demo", "--out", tmp_path)
    assert found.exit_code == 1
    (line,) = found.stderr.splitlines()
    assert "a worker process died" in line
    assert "finished rows are kept" in line


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


def test_only_the_executors_stumble_over_cancelled_rows_is_not_reported(capsys):
    from concurrent.futures import InvalidStateError

    for error in (InvalidStateError("CANCELLED"), RuntimeError("a real one")):
        working._unless_already_cancelled(threading.ExceptHookArgs((type(error), error, None, None)))
    said = capsys.readouterr().err
    assert "a real one" in said
    assert "CANCELLED" not in said
