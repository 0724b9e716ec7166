"""Soups on executors, killed and resumed, cancelled and interrupted: the same bits, nothing done twice."""

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from soup_parts import cook, same_soup, same_tensors

from perpkit.retraining.soups.work import Work
from perpkit.sources.augment import crop_and_flip

BASELINES = {"baselines": ["imp", "best", "ensemble"], "cycles": 2}


@pytest.fixture
def pictures(images):
    """Images and their classes."""
    return torch.cat([images, -images]), torch.arange(10)


@pytest.fixture
def counted(monkeypatch):
    """The candidates that were retrained in this process."""
    done, retrained = [], Work.retrained

    def count(self, candidate, file, cancelled):
        done.append((file.parent.name, candidate.cycle, candidate.number))
        return retrained(self, candidate, file, cancelled)

    monkeypatch.setattr(Work, "retrained", count)
    return done


@pytest.mark.slow  # two processes import torch
def test_spawned_processes_give_the_same_bits(make_model, windows):
    """Dropout too, which follows the seed."""
    dense = make_model("opt", dropout=0.1)
    score = {"validation": windows, "m": 2, **BASELINES}
    alone = cook(dense, windows, **score)
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as executor:
        together = cook(dense, windows, executor=executor, **score)
    assert same_soup(alone, together)


def test_threads_give_the_same_bits_and_leave_the_callers_model(make_vision, pictures, tmp_path):
    dense = make_vision("cifar")
    alone = cook(dense, pictures)
    with ThreadPoolExecutor(3) as executor:
        together = cook(dense, pictures, executor=executor, folder=tmp_path / "new" / "soup")
    assert same_soup(alone, together)
    names = sorted(file.name for file in (tmp_path / "new" / "soup").rglob("*") if file.is_file())
    assert not [name for name in names if "running" in name or "part" in name]
    assert len([name for name in names if "candidate" in name]) == 6


def test_a_finished_soup_comes_back_as_it_is(make_model, windows, tmp_path, counted):
    dense, rows = make_model("opt"), []
    options = {"folder": tmp_path, "validation": windows, "soup": "greedy", **BASELINES}
    first = cook(dense, windows, **options)
    assert len(counted) == 8
    again = cook(dense, windows, on_candidate=rows.append, **options)
    assert len(counted) == 8
    assert len(rows) == 6
    assert same_soup(first, again)
    assert (first.candidates["seconds"] == again.candidates["seconds"]).all()


@pytest.mark.parametrize("when", [0, 1, 4])
def test_a_failed_run_goes_on_to_the_same_bits(make_vision, pictures, tmp_path, counted, when):
    dense, told = make_vision("sequential"), []

    class Failed(Exception):
        pass

    def fail(row):
        told.append(row)
        if len(told) == when + 1:
            raise Failed

    with pytest.raises(Failed) as error:
        cook(dense, pictures, folder=tmp_path, on_candidate=fail)
    assert len(error.value.soup.candidates) == when + 1
    assert error.value.soup.cycles == when // 3
    error.value.soup.masks.check(error.value.soup.model)
    assert len(counted) == when + 1
    resumed = cook(dense, pictures, folder=tmp_path)
    assert len(counted) == len(set(counted)) == 6
    assert same_soup(resumed, cook(dense, pictures))


@pytest.mark.parametrize("on", ["none", "threads"])
def test_cancelled_it_returns_what_is_finished(make_vision, pictures, tmp_path, on):
    """Within one step: the fourth candidate has begun and is not finished."""
    dense, rows, asked = make_vision("sequential"), [], []

    def cancelled():
        asked.append(len(rows) >= 3)
        return asked[-1]

    options = {"folder": tmp_path, "steps": 3, "m": 3}
    with ThreadPoolExecutor(1) as executor:
        where = {"executor": executor} if on == "threads" else {}
        soup = cook(dense, pictures, cancelled=cancelled, on_candidate=rows.append, **where, **options)
    assert asked.index(True) == len(asked) - 1, "it was asked again after it had said True"
    assert 3 <= len(soup.candidates) <= 4
    assert soup.cycles == 1
    soup.masks.check(soup.model)
    assert soup.masks.sparsity() == pytest.approx(1 - 0.3**0.5, abs=1e-2)
    assert same_soup(cook(dense, pictures, **options), cook(dense, pictures, steps=3, m=3))


def test_cancelled_at_once_is_the_dense_model(make_model, windows):
    dense = make_model("opt")
    soup = cook(dense, windows, cancelled=lambda: True)
    assert same_tensors(soup.model, dense)
    assert (soup.cycles, len(soup.masks), len(soup.candidates), len(soup.history)) == (0, 0, 0, 0)


def test_workers_stop_within_a_step(make_model, windows, tmp_path):
    """A cancelled run comes back long before its candidates would have ended, and so do its workers."""
    dense, started = make_model("opt"), time.monotonic()

    def cancelled():
        # Only once both are at work.
        return (tmp_path / "sms" / "cycle-1-pruned.safetensors").exists() and time.monotonic() > started + 0.5

    with ThreadPoolExecutor(2) as executor:
        options = {"m": 2, "cycles": 1, "steps": 10**6, "executor": executor, "folder": tmp_path}
        soup = cook(dense, windows, schedule="constant", cancelled=cancelled, **options)
        assert len(soup.candidates) == 0
    assert time.monotonic() - started < 20
    assert not list(tmp_path.rglob("running-*"))


def test_an_interrupt_keeps_what_is_finished(make_model, windows, tmp_path, counted):
    dense = make_model("opt")

    def interrupt(cycle):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as stopped:
        cook(dense, windows, folder=tmp_path, on_cycle=interrupt)
    soup = stopped.value.soup
    assert (soup.cycles, len(soup.candidates), len(soup.history)) == (1, 3, 9)
    soup.masks.check(soup.model)


def test_another_augmentation_is_another_run(make_vision, pictures, tmp_path):
    cook(make_vision("sequential"), pictures, m=2, cycles=1, augment=crop_and_flip, folder=tmp_path)
    with pytest.raises(ValueError, match="another augment"):
        cook(make_vision("sequential"), pictures, m=2, cycles=1, folder=tmp_path)


def test_a_candidate_that_fails_says_which(make_vision, pictures, tmp_path):
    dense = make_vision("sequential")
    vary = {"lr": [1e-3, 1e30, 1e-2]}
    with pytest.raises(ValueError, match=r"with lr=1e\+30") as error:
        cook(dense, pictures, vary=vary, folder=tmp_path)
    assert any("candidate 2 of cycle 1" in note for note in error.value.__notes__)
    assert error.value.soup.candidates["candidate"].tolist() == [1]
    with ThreadPoolExecutor(2) as executor, pytest.raises(ValueError, match=r"with lr=1e\+30"):
        cook(dense, pictures, vary=vary, executor=executor)


def test_what_cannot_be_sent_is_said(make_model, windows):
    with ThreadPoolExecutor(1) as executor, pytest.raises(ValueError, match="cannot be sent"):
        cook(make_model("opt"), windows, executor=executor, schedule=lambda step, steps: 1.0)


def test_the_threads_of_the_run(make_vision, pictures, monkeypatch):
    """A worker calculates with the threads of the run, and has its own back afterwards."""
    seen, retrained = [], Work.retrained

    def look(self, *told):
        seen.append(torch.get_num_threads())
        return retrained(self, *told)

    class Elsewhere(ThreadPoolExecutor):
        """Runs what is submitted at once, as a worker that has two threads would."""

        def submit(self, function, *told):
            torch.set_num_threads(2)
            future = Future()
            future.set_result(function(*told))
            seen.append(torch.get_num_threads())
            torch.set_num_threads(1)
            return future

    monkeypatch.setattr(Work, "retrained", look)
    with Elsewhere(1) as executor:
        cook(make_vision("sequential"), pictures, cycles=1, m=2, executor=executor)
    assert seen == [1, 2, 1, 2]


KILLED = """
import os, signal, sys, torch
from concurrent.futures import ProcessPoolExecutor
import multiprocessing
import perpkit as pk
sys.path.insert(0, sys.argv[2])
from soup_parts import cook

if __name__ == "__main__":
    torch.set_num_threads(1)
    model, tokenizer = pk.load_model("tiny-opt", device="cpu")
    text = pk.load_text("storyworld", tokenizer, windows={"train": 8})
    rows = []

    def kill(row):
        rows.append(row)
        if len(rows) == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
        cook(model, text.train, m=2, folder=sys.argv[1], executor=executor, on_candidate=kill)
"""


def test_a_killed_run_goes_on_to_the_same_bits(tiny_opt, tokenizer, tmp_path, counted):
    """SIGKILL in the second cycle, with a worker of another process at work."""
    import perpkit as pk

    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    folder = tmp_path / "soup"
    command = [sys.executable, str(script), str(folder), str(Path(__file__).parent)]
    # Output to nowhere: the orphaned worker would keep a pipe open.
    ended = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=120)
    assert ended.returncode == -signal.SIGKILL
    text = pk.load_text("storyworld", tokenizer, windows={"train": 8})
    resumed = cook(tiny_opt, text.train, m=2, folder=folder)
    assert set(counted) <= {("sms", 2, 2)}
    assert same_soup(resumed, cook(tiny_opt, text.train, m=2))


def test_left_over_signs_are_taken_away(make_model, windows, tmp_path):
    """Workers of a killed run stop when the run is begun anew, rather than compute the same twice."""
    cook(make_model("opt"), windows, folder=tmp_path, cycles=1, m=2)
    sign = tmp_path / "sms" / "running-old"
    sign.touch()
    next((tmp_path / "sms").glob("*candidate-1*")).unlink()
    with ThreadPoolExecutor(1) as executor:
        cook(make_model("opt"), windows, folder=tmp_path, cycles=1, m=2, executor=executor)
    assert not sign.exists()


def test_a_temporary_folder_goes(make_model, windows, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    seen = []
    cook(make_model("opt"), windows, cycles=1, on_candidate=lambda row: seen.append(os.listdir(tmp_path)))
    assert len(seen[0]) == 1
    assert os.listdir(tmp_path) == []
