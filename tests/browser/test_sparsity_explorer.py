"""The sparsity explorer in JupyterLab: moved by mouse and keyboard, cancelled, broken and mended."""

import hashlib
import re

import pytest
from playwright.sync_api import expect

import perpkit as pk

from .lab import Explorer, opened

pytestmark = [pytest.mark.browser, pytest.mark.slow]

SOURCES = [
    """import hashlib
import perpkit as pk

axes = dict(retrain=["none", "biases"], seed=0)
grid = pk.Grid(sparsity=[0.3, 0.5, 0.7], steps=5, **axes)
pk.sweep(pk.Grid(sparsity=[0.3, 0.5, 0.7]), store="stores/rows.sqlite", progress=False)
endless = pk.Grid(sparsity=0.5, steps=1_000_000, **axes)""",
    "explorer = pk.SparsityExplorer(grid, store='stores/rows.sqlite')\nexplorer",
    "pk.SparsityExplorer(endless, store='stores/rows.sqlite')",
    "pk.SparsityExplorer(grid, store='breaks/rows.sqlite')",
    "print(hashlib.sha256(explorer.figure().png()).hexdigest())",
]
FIRST, ENDLESS, BREAKS, DIGEST = 1, 2, 3, 4


@pytest.fixture(scope="module")
def notebook(browser, lab):
    with opened(browser, lab, "explorer.ipynb", SOURCES) as notebook:
        yield notebook


@pytest.fixture
def explorer(notebook) -> Explorer:
    return Explorer(notebook.cell(FIRST))


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """What a sweep in this process says about a point, in its own store."""
    store = tmp_path_factory.mktemp("expected") / "rows.sqlite"

    def said(sparsity: float, retrain: str = "none", steps: int = 5) -> str | re.Pattern:
        grid = pk.Grid(sparsity=sparsity, retrain=list({"none": 0, retrain: 0}), steps=steps)
        pruned, *retrained = pk.sweep(grid, store=store, progress=False).itertuples()
        words = (
            f"{100 * sparsity:g} %: perplexity {pruned.dense_perplexity:.2f} dense → "
            f"{pruned.perplexity:.2f} pruned"
        )
        for row in retrained:
            share = f"{100 * row.trainable_share:.3g} % of the parameters"
            words += f" → {row.perplexity:.2f} after retraining {retrain} ({share}, "
        # The time it took is not known beforehand.
        return re.compile(f"^{re.escape(words)}" + (r"\d+\.\d s\)$" if retrained else "$"))

    return said


def test_the_first_point_is_shown(notebook, explorer, result):
    explorer.expect(result(0.5))
    expect(explorer.picture).to_be_visible()
    assert explorer.picture.evaluate("image => [image.naturalWidth, image.width]") == [1152, 720]
    notebook.screenshot("1_opened", FIRST)


def test_the_keyboard_moves_the_slider(explorer, result):
    explorer.press("ArrowRight", 2)
    explorer.expect(result(0.6))
    explorer.press("ArrowLeft")
    explorer.expect(result(0.55))


def test_the_mouse_drags_the_slider(notebook, explorer, result):
    explorer.drag(14 / 18)
    explorer.expect(result(0.7))
    explorer.drag(1)
    explorer.expect(result(0.9))
    explorer.drag(0)
    explorer.expect(result(0.0))
    notebook.screenshot("2_dragged", FIRST)


def test_a_retraining_is_chosen(notebook, explorer, result):
    explorer.drag(0.5)
    explorer.expect(result(0.45))
    explorer.retrain.select_option("biases")
    explorer.expect(result(0.45, "biases"))
    notebook.screenshot("3_retrained", FIRST)
    explorer.retrain.select_option("none")
    explorer.expect(result(0.45))


def test_twenty_quick_moves_leave_the_picture_of_the_last(notebook, explorer, result):
    explorer.drag(0)
    for _ in range(4):
        explorer.press("ArrowRight", 4)
        explorer.press("ArrowLeft")
    explorer.expect(result(0.6))
    shown = explorer.picture_bytes()
    assert hashlib.sha256(shown).hexdigest() == notebook.run_cell(DIGEST).strip()


def test_cancel_stops_a_long_retraining(notebook, result):
    explorer = Explorer(notebook.cell(ENDLESS))
    explorer.expect(result(0.5))
    explorer.retrain.select_option("biases")
    step = re.compile(r"pruned → retraining biases, step [\d,]+ of 1000000")
    expect(explorer.message).to_have_text(step)
    notebook.screenshot("4_retraining", ENDLESS)
    explorer.cancel.click()
    explorer.expect("cancelled; finished rows are kept")
    notebook.screenshot("5_cancelled", ENDLESS)
    explorer.again.click()
    expect(explorer.message).to_have_text(step)
    explorer.retrain.select_option("none")
    explorer.expect(result(0.5))


def test_an_error_is_told_and_the_controls_go_on(notebook, lab, result):
    explorer = Explorer(notebook.cell(BREAKS))
    explorer.expect(result(0.5))
    _, root = lab
    store, kept = root / "breaks", root / "kept"
    store.rename(kept)
    store.write_text("a file where the store's folder was")
    explorer.press("ArrowRight")
    explorer.expect(
        re.compile("^ValueError: cannot create the folder of the store .*: .*; name another file")
    )
    notebook.screenshot("6_error", BREAKS)
    store.unlink()
    kept.rename(store)
    explorer.again.click()
    explorer.expect(result(0.55))
    expect(explorer.again).to_be_disabled()
    assert re.fullmatch(r"[0-9a-f]{64}", notebook.run_cell(DIGEST).strip()), "the kernel is dead"


def test_it_can_be_read_in_the_dark_theme(notebook, explorer, result):
    explorer.retrain.select_option("biases")
    explorer.expect(result(0.6, "biases"))
    notebook.menu("Settings", "Theme", "JupyterLab Dark")
    expect(notebook.page.locator("body")).to_have_attribute("data-jp-theme-light", "false")
    notebook.screenshot("7_dark", FIRST)
    corner = """image => {
        const canvas = document.createElement('canvas');
        [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
        const context = canvas.getContext('2d');
        context.drawImage(image, 0, 0);
        return Array.from(context.getImageData(2, 2, 1, 1).data);
    }"""
    assert explorer.picture.evaluate(corner) == [255, 255, 255, 255]
