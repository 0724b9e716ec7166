"""The documentation's examples run, with stand-ins for what is not a dependency."""

import re
import sys
import types
from importlib.machinery import ModuleSpec
from pathlib import Path

import pandas as pd
import pytest

import perpkit as pk

SCALING = (Path(__file__).parent.parent / "docs" / "scaling.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", SCALING, re.DOTALL)


def block(word: str) -> str:
    """The one example with this word."""
    (found,) = [each for each in BLOCKS if word in each]
    return found


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Names that the examples use, on a grid of two rows, one of which fails; in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    grid = pk.Grid(retrain=["none", "perp_v1:bn_recalibrate"], lr=0.1, steps=2, length=16)
    return {"pk": pk, "grid": grid}


class Recorder:
    """Stands in for a tracker: notes what it is told."""

    def __init__(self):
        self.told = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def __getattr__(self, name):
        return lambda *arguments: self.told.append((name, arguments))


def test_weights_and_biases(small, monkeypatch):
    recorder, begun = Recorder(), []

    def init(**settings):
        begun.append(settings)
        return recorder

    # Others ask every module for its origin.
    module = types.SimpleNamespace(init=init, __spec__=ModuleSpec("wandb", None))
    monkeypatch.setitem(sys.modules, "wandb", module)
    with pytest.warns(UserWarning, match="1 of 2 rows failed"):
        exec(block("wandb"), small)
    assert [settings["config"]["retrain"] for settings in begun] == ["none", "perp_v1:bn_recalibrate"]
    assert [name for name, _ in recorder.told] == ["log", "alert"]
    assert recorder.told[0][1][0]["perplexity"] > 1


def test_tensorboard(small, monkeypatch):
    recorder = Recorder()
    spec = ModuleSpec("torch.utils.tensorboard", None)
    module = types.SimpleNamespace(SummaryWriter=lambda folder: recorder, __spec__=spec)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    with pytest.warns(UserWarning, match="1 of 2 rows failed"):
        exec(block("SummaryWriter"), small)
    ((name, (inputs, results)),) = recorder.told
    assert name == "add_hparams"
    assert inputs["criterion"] == "magnitude"
    assert results["perplexity"] > 1


def test_the_grid_of_the_first_example_is_that_of_its_file(tmp_path):
    """Its count is the one that the page states."""
    file = tmp_path / "grid.yaml"
    file.write_text(re.search(r"```yaml\n(.*?)```", SCALING, re.DOTALL)[1])
    made = {"pk": pk}
    exec(re.search(r"grid = pk\.Grid\(.*?\n\)", block("grid.estimate"), re.DOTALL)[0], made)
    assert list(pk.Grid.from_file(file)) == list(made["grid"])
    assert f"# {len(made['grid'])} rows" in SCALING


def test_stores_of_several_jobs_are_read_together(small):
    for seed in range(3):
        grid = pk.Grid(criterion="random", seed=seed, length=16)
        pk.sweep(grid, store=f"seed{seed}.sqlite", progress=False)
        pk.sweep(pk.Grid(length=16, seed=seed), store=f"seed{seed}.sqlite", progress=False)
    names = small | {"pd": pd}
    exec(block("readonly"), names)
    results = names["results"]
    assert results[results.criterion == "random"].seed.tolist() == [0, 1, 2]
    # What no seed changes is in all stores, and once in the table.
    assert results.criterion.tolist().count("magnitude") == 1
