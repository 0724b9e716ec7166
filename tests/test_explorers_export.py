"""What an explorer exports: four files that open, in its folder and nowhere else, and a link to each."""

import base64
import io
import re

import pandas as pd
import pytest
from explorer_parts import Runs, read, shown
from PIL import Image

import perpkit as pk
from perpkit.experiments import run as running


@pytest.fixture
def explorer(tmp_path, monkeypatch):
    monkeypatch.setattr(running, "run", Runs())
    monkeypatch.chdir(tmp_path)
    grid = pk.Grid(sparsity=[0.3, 0.5], retrain=["none", "biases"])
    explorer = pk.SparsityExplorer(grid, store="rows.sqlite", export_folder="deep/exports", background=False)
    shown(explorer, 0.5, "biases")
    return explorer


def linked(explorer) -> tuple[str, str, bytes]:
    """The link's file name, the kind of file, and what is in it."""
    link = re.search(r'<a download="([^"]+)" href="data:([^;]+);base64,([^"]+)">', explorer.exported.value)
    assert link is not None
    return link[1], link[2], base64.b64decode(link[3])


@pytest.mark.parametrize(
    ("ending", "kind", "start"),
    [
        (".pdf", "application/pdf", b"%PDF-"),
        (".svg", "image/svg+xml", b"<?xml"),
        (".png", "image/png", b"\x89PNG"),
        (".csv", "text/csv", b"model,"),
    ],
)
def test_a_click_writes_a_file_and_offers_it(explorer, tmp_path, ending, kind, start):
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    explorer.exports[ending].click()
    written = {path for path in tmp_path.rglob("*") if path.is_file()} - before
    assert written == {tmp_path / "deep" / "exports" / f"sparsity{ending}"}
    content = written.pop().read_bytes()
    assert content.startswith(start)
    assert linked(explorer) == (f"sparsity{ending}", kind, content)
    assert read(explorer.exported) == f"written to deep/exports/sparsity{ending} · download"


def test_the_table_has_the_rows_and_the_picture_is_a_picture(explorer, tmp_path):
    explorer.exports[".csv"].click()
    table = pd.read_csv(io.BytesIO(linked(explorer)[2]))
    assert table["perplexity"].tolist() == explorer.figure().table["perplexity"].tolist()
    explorer.exports[".png"].click()
    with Image.open(io.BytesIO(linked(explorer)[2])) as picture:
        assert picture.size == (1440, 880)


def test_another_picture_takes_the_link_away(explorer):
    explorer.exports[".csv"].click()
    assert explorer.exported.value
    shown(explorer, 0.3)
    assert explorer.exported.value == ""


def test_a_folder_that_cannot_be_written_is_told_in_words(explorer, tmp_path):
    said = read(explorer.message)
    (tmp_path / "deep").write_text("a file where the folder should be")
    explorer.exports[".png"].click()
    assert read(explorer.exported).startswith("ValueError: cannot write the figure 'deep/exports/sparsity'")
    assert isinstance(explorer.error, ValueError)
    # What is said of the picture stays, and there is nothing to be tried again.
    assert read(explorer.message) == said
    assert explorer.again.disabled


def test_before_the_first_picture_there_is_nothing_to_export(tmp_path, monkeypatch):
    runs = Runs()
    runs.fail(ValueError("no luck"))
    monkeypatch.setattr(running, "run", runs)
    grid = pk.Grid(sparsity=[0.5])
    explorer = pk.SparsityExplorer(
        grid, store=tmp_path / "rows.sqlite", export_folder=tmp_path / "exports", background=False
    )
    assert all(button.disabled for button in explorer.exports.values())
    for button in explorer.exports.values():
        button.click()
    assert not (tmp_path / "exports").exists()
