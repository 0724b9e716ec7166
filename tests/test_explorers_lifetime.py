"""How explorers begin and end: bad arguments, closing, a cell that is run again, and errors in between."""

import gc
import subprocess
import sys
import threading
import time
import weakref

import pytest
import torch
from explorer_parts import SOON, read, words
from torch import nn

import perpkit as pk
from perpkit.interactive.explorers import lifetime
from perpkit.interactive.explorers.gallery import Gallery
from perpkit.interactive.explorers.generation import GenerationExplorer
from perpkit.interactive.explorers.outliers import OutlierExplorer
from perpkit.interactive.explorers.soups import SoupExplorer

ENDLESS = pk.Grid(sparsity=[0.5], retrain=["none", "biases"], steps=1_000_000)


@pytest.fixture
def store(tmp_path) -> pk.Store:
    return pk.Store(tmp_path / "results.sqlite")


@pytest.fixture
def cell(monkeypatch):
    """The notebook cell that is being run, and which run of it that is."""
    running = ["cell", "1"]
    monkeypatch.setattr(lifetime, "_running_cell", lambda: tuple(running))
    return running


def retraining(store, **more) -> pk.SparsityExplorer:
    """An explorer in the middle of a retraining that takes for ever."""
    explorer = pk.SparsityExplorer(ENDLESS, store=store, **more)
    explorer.show(0.5, "biases")
    while "step" not in words(explorer):
        assert not explorer.wait(0.05), words(explorer)
    return explorer


# --- the end --------------------------------------------------------------------------------------


def test_a_closed_explorer_works_no_more_and_is_forgotten(store):
    explorer = retraining(store)
    parts = [explorer, explorer.message, explorer.filling.button, explorer.sparsity]
    explorer.close()
    assert explorer.wait(SOON)
    assert all(part.comm is None for part in parts)
    forgotten = weakref.ref(explorer)
    del explorer, parts
    # Its thread may be about to end.
    started = time.monotonic()
    while forgotten() is not None and time.monotonic() - started < SOON:
        gc.collect()
        time.sleep(0.05)
    assert forgotten() is None


def test_a_cell_that_is_run_again_closes_what_it_has_made(store, cell):
    first = retraining(store)
    beside = pk.MaskExplorer(nn.Linear(4, 4), background=False)
    assert first.comm is not None
    cell[1] = "2"
    second = retraining(store)
    assert first.wait(SOON)
    assert first.comm is None
    assert beside.comm is None
    cell[0] = "another cell"
    other = pk.MaskExplorer(nn.Linear(4, 4), background=False)
    assert second.comm is not None
    cell[:] = ["cell", "3"]
    pk.MaskExplorer(nn.Linear(4, 4), background=False)
    assert second.comm is None
    assert other.comm is not None


def test_what_is_run_again_outside_of_a_notebook_stays():
    made = [pk.MaskExplorer(nn.Linear(4, 4), background=False) for _ in range(2)]
    assert all(explorer.comm is not None for explorer in made)


def test_a_closed_gallery_closes_its_explorers(store, cell):
    gallery = Gallery(store=store)
    first = gallery.explorer("Sparsity")
    cell[1] = "2"
    Gallery(store=store)
    assert gallery.comm is None
    assert first.comm is None


def test_a_program_may_end_while_an_explorer_works():
    program = "import perpkit as pk; pk.SoupExplorer(steps=100_000)"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=SOON)
    assert (ended.returncode, ended.stderr) == (0, "")


# --- errors in between ----------------------------------------------------------------------------


def test_an_export_that_fails_leaves_what_runs_and_its_cancel(store, tmp_path):
    explorer = retraining(store, export_folder=tmp_path / "file" / "folder")
    (tmp_path / "file").write_text("")
    explorer.exports[".png"].click()
    assert read(explorer.exported).startswith("ValueError: cannot write the figure")
    assert not explorer.cancel.disabled
    assert "step" in words(explorer)
    explorer.cancel.click()
    assert explorer.wait(SOON)
    assert words(explorer) == "cancelled; finished rows are kept"
    assert read(explorer.exported).startswith("ValueError: cannot write the figure")


def test_a_gallery_without_its_first_explorer_can_be_shown(tmp_path):
    (tmp_path / "file").write_text("no store")
    gallery = Gallery(store=tmp_path / "file")
    bundle = gallery._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert "image/png" not in bundle
    assert (
        "no store" in gallery.children[0].children[1].value
        or "store" in gallery.children[0].children[1].value
    )


def test_texts_that_are_not_whole_are_not_exported():
    explorer = GenerationExplorer(steps=2)
    assert explorer.wait(SOON)
    assert not explorer.exports[".csv"].disabled
    explorer.show("On the floor lie", tokens=100)
    assert all(button.disabled for button in explorer.exports.values())
    explorer.cancel.click()
    assert explorer.wait(SOON)
    with pytest.raises(ValueError, match="what was asked for last was stopped"):
        explorer.figure()


def test_an_observer_may_ask_for_more(store):
    explorer = pk.SparsityExplorer(pk.Grid(sparsity=[0.3, 0.5]), store=store, background=False)

    def ask(_):
        if explorer.sparsity.value != 0.7:
            explorer.show(0.7, "none")

    explorer.table.observe(ask, names="value")
    worker = threading.Thread(target=explorer.compute_all, daemon=True)
    worker.start()
    worker.join(SOON)
    assert not worker.is_alive()
    assert explorer.sparsity.value == 0.7


def test_soups_are_kept_as_far_as_there_is_room(monkeypatch):
    explorer = SoupExplorer(steps=1, background=False)
    explorer.show(sparsity=0.5)
    assert len(explorer._made) == 2
    monkeypatch.setattr("perpkit.interactive.explorers.versions.BYTES_KEPT", 1)
    explorer.show(sparsity=0.9)
    assert [sparsity for _, sparsity in explorer._made] == [0.9]


# --- bad arguments --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "given", "said"),
    [
        (pk.SparsityExplorer, {"grid": []}, "the grid is empty"),
        (pk.SparsityExplorer, {"grid": None}, "want a Grid or a list of experiments, got None"),
        (pk.SparsityExplorer, {"grid": [3]}, "among the experiments is 3"),
        (pk.SparsityExplorer, {"grid": pk.Experiment()}, "got one experiment; put it in a list"),
        (pk.SparsityExplorer, {"grid": pk.Grid(), "export_folder": 5}, "the export folder 5 is no folder"),
        (pk.SparsityExplorer, {"grid": pk.Grid(), "export_folder": __file__}, "is no folder"),
        (OutlierExplorer, {"strengths": []}, r"strengths is \[\]; want a list of one or more"),
        (OutlierExplorer, {"seeds": []}, r"seeds is \[\]; want a list of one or more"),
        (OutlierExplorer, {"strengths": 2}, "strengths is 2; want a list of one or more"),
        (OutlierExplorer, {"seeds": 0}, "seeds is 0; want a list of one or more"),
        (OutlierExplorer, {"strengths": [1000]}, "a strength is 1000; it must be a number from 0 to 20"),
        (OutlierExplorer, {"strengths": ["a"]}, "a strength is 'a'"),
        (OutlierExplorer, {"strengths": [True]}, "a strength is True"),
        (OutlierExplorer, {"strengths": [-1]}, "a strength is -1"),
        (OutlierExplorer, {"seeds": ["a"]}, "seed 0 is 'a'; it must be a whole number"),
        (SoupExplorer, {"steps": 0}, "steps is 0; it must be at least 1"),
        (pk.AdapterExplorer, {"steps": -1}, "steps is -1; it must be at least 1"),
        (pk.AdapterExplorer, {"steps": "x"}, "steps is 'x'; it must be a whole number"),
        (pk.DistortionExplorer, {"steps": 1.5}, r"steps is 1\.5; it must be a whole number"),
        (GenerationExplorer, {"steps": 0}, "steps is 0; it must be at least 1"),
        (pk.MaskExplorer, {"model": 5}, "the model is a int; want a name or a torch module"),
        (pk.MaskExplorer, {"model": nn.Linear(2, 2), "calibration": [1]}, "the calibration is a list"),
        (pk.MaskExplorer, {"model": nn.Linear(2, 2), "seed": "a"}, "seed is 'a'; it must be a whole number"),
    ],
)
def test_bad_arguments_are_told_at_once(tmp_path, monkeypatch, make, given, said):
    monkeypatch.setenv("PERPKIT_STORE", str(tmp_path / "results.sqlite"))
    with pytest.raises(ValueError, match=said):
        make(**given, background=False)


def test_calibration_of_another_width_is_told_in_words():
    explorer = pk.MaskExplorer(nn.Linear(4, 4), calibration=torch.ones(2, 5), background=False)
    explorer.show(criterion="wanda")
    assert isinstance(explorer.error, RuntimeError)
    assert words(explorer).startswith("RuntimeError")
    explorer.show(criterion="magnitude")
    assert "weights pruned" in words(explorer)
