"""The folder of a soup: whose it is, what a kill leaves in it, and workers that do not see it."""

import copy
import os
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest
import torch
from soup_parts import cook, same_soup, same_tensors
from torch import nn

from perpkit.retraining.soups.files import read, write


@pytest.fixture
def dense(make_model):
    return make_model("opt")


@pytest.fixture
def pictures(images):
    """Images and their classes."""
    return torch.cat([images, -images]), torch.arange(10)


def one(model):
    return 1.0


def two(model):
    return 2.0


def test_a_greedy_soup_does_not_go_on_by_another_measure(dense, windows, tmp_path):
    """Its later cycles stand on what the first was chosen by; a uniform soup's do not."""
    options = {"m": 2, "cycles": 1, "steps": 1, "soup": "greedy"}
    cook(dense, windows, folder=tmp_path / "a", validation=windows[:4], **options)
    for other in ({"validation": windows[4:]}, {"score": one}):
        with pytest.raises(ValueError, match="another held-out score;"):
            cook(dense, windows, folder=tmp_path / "a", **options, **other)
    cook(dense, windows, folder=tmp_path / "b", score=one, **options)
    with pytest.raises(ValueError, match="another held-out score;"):
        cook(dense, windows, folder=tmp_path / "b", score=two, **options)
    options["soup"] = "uniform"
    cook(dense, windows, folder=tmp_path / "c", score=one, **options)
    again = cook(dense, windows, folder=tmp_path / "c", score=two, **options)
    assert again.comparison["score"].tolist() == [2.0]


def test_a_teacher_of_other_statistics_is_another(make_vision, pictures, tmp_path):
    teacher = make_vision("sequential", seed=5)
    options = {"m": 2, "cycles": 1, "steps": 1, "folder": tmp_path}
    cook(make_vision("sequential"), pictures, distill=teacher, **options)
    next(m for m in teacher.modules() if isinstance(m, nn.BatchNorm2d)).running_mean += 1
    with pytest.raises(ValueError, match="another distillation;"):
        cook(make_vision("sequential"), pictures, distill=teacher, **options)


# --- what a kill leaves ---------------------------------------------------------------------------


def test_a_kill_while_the_folder_was_claimed(dense, windows, tmp_path):
    (tmp_path / "soup.json.part").write_text('{"format"')
    assert len(cook(dense, windows, m=2, cycles=1, folder=tmp_path).candidates) == 2
    assert not (tmp_path / "soup.json.part").exists()


def test_a_kill_while_a_file_was_written(dense, windows, tmp_path):
    """What is left of it goes when the file is complete."""
    options = {"m": 2, "cycles": 1, "folder": tmp_path}
    first = cook(dense, windows, **options)
    file = tmp_path / "sms" / "cycle-1-candidate-2.safetensors"
    file.rename(file.with_name(f"{file.name}.1.part"))
    assert same_soup(cook(dense, windows, **options), first)
    assert not list(tmp_path.rglob("*.part"))


def test_a_file_that_two_write_at_once(tmp_path, monkeypatch):
    """The other was quicker and has taken away what this one had begun: both have the same to say."""
    file, whole = tmp_path / "a.safetensors", {"w": torch.ones(1)}
    replace = os.replace

    def beaten(partial, path):
        monkeypatch.setattr(os, "replace", replace)
        write(path, whole)
        partial.unlink(missing_ok=True)
        replace(partial, path)

    monkeypatch.setattr(os, "replace", beaten)
    write(file, whole)
    assert read(file)["w"].tolist() == [1.0]
    assert [found.name for found in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_disk_that_is_full(tmp_path, monkeypatch):
    def full(partial, path):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ValueError, match=r"cannot write .*no space left"):
        write(tmp_path / "a.safetensors", {"w": torch.ones(1)})
    assert not list(tmp_path.iterdir())


def test_workers_of_a_killed_run_stop_when_it_goes_on_without_them(dense, windows, tmp_path):
    options = {"m": 2, "cycles": 1, "folder": tmp_path}
    cook(dense, windows, **options)
    sign = tmp_path / "sms" / "running-old"
    sign.touch()
    cook(dense, windows, **options)
    assert not sign.exists()


# --- workers --------------------------------------------------------------------------------------


class Far(ThreadPoolExecutor):
    """Workers on a machine that has another disk."""

    def submit(self, function, packed, candidate, file, running, threads):
        there = [Path("/nowhere") / path.name for path in (file, running)]
        return super().submit(function, packed, candidate, *there, threads)


def test_workers_that_do_not_see_the_folder(dense, windows):
    """They find no sign that they are to work on; that is no soup that somebody has cancelled."""
    with Far(1) as executor, pytest.raises(ValueError, match=r"workers stopped .* must see the folder"):
        cook(dense, windows, m=2, cycles=1, executor=executor)


class Mortal(ThreadPoolExecutor):
    """Workers that die of the second candidate."""

    def submit(self, function, packed, candidate, *told):
        if candidate.number != 2:
            return super().submit(function, packed, candidate, *told)
        future: Future = Future()
        future.set_exception(BrokenProcessPool("a worker has died"))
        return future


def test_a_worker_that_dies(dense, windows, tmp_path):
    before, expected = copy.deepcopy(dense), cook(dense, windows, cycles=1)
    with Mortal(1) as executor, pytest.raises(BrokenProcessPool) as died:
        cook(dense, windows, cycles=1, executor=executor, folder=tmp_path)
    assert died.value.soup.cycles == 0
    assert same_tensors(dense, before)
    assert not list(tmp_path.rglob("running-*"))
    assert same_soup(cook(dense, windows, cycles=1, folder=tmp_path), expected)
