"""The sparsity explorer in JupyterLab: a grid filled in the background, its rows, and exported files."""

import re

import pandas as pd
import pytest
from PIL import Image
from playwright.sync_api import expect

from .lab import Explorer, opened

pytestmark = [pytest.mark.browser, pytest.mark.slow]

SOURCES = [
    """import perpkit as pk

axes = dict(criterion=["magnitude", "wanda"], sparsity=[0.3, 0.5], steps=3)
grid = pk.Grid(retrain=["none", "biases"], **axes) + pk.Grid(retrain="biases", pattern="2:4", **axes)
endless = pk.Grid(sparsity=[0.3, 0.5], retrain=["none", "biases"], steps=1_000_000)""",
    "pk.SparsityExplorer(grid, store='stores/grid.sqlite', export_folder='exported')",
    "pk.SparsityExplorer(endless, store='stores/grid.sqlite')",
]
FILLED, ENDLESS = 1, 2


@pytest.fixture(scope="module")
def notebook(browser, lab):
    with opened(browser, lab, "grid.ipynb", SOURCES) as notebook:
        yield notebook


@pytest.fixture
def explorer(notebook) -> Explorer:
    return Explorer(notebook.cell(FILLED))


def test_the_grid_is_filled_while_the_controls_are_free(notebook, explorer):
    explorer.expect(re.compile("^magnitude, 50 %: perplexity"))
    expect(explorer.filling).to_have_text("1 of 10 rows of the grid finished")
    before = explorer.picture_bytes()
    explorer.fill.click()
    expect(explorer.filling).to_have_text(re.compile(r"rows of the grid finished · \d left · magnitude"))
    expect(explorer.fill).to_be_disabled()
    explorer.criterion.select_option("wanda")
    expect(explorer.message).to_have_text(re.compile("^wanda, 50 %: perplexity .* pruned$"))
    notebook.screenshot("grid_1_filling", FILLED)
    expect(explorer.filling).to_have_text("all 10 rows of the grid finished")
    expect(explorer.cancel).to_be_disabled()
    expect(explorer.message).to_have_text(re.compile("^wanda, 50 %: perplexity .* pruned$"))
    assert explorer.picture_bytes() != before
    notebook.screenshot("grid_2_filled", FILLED)


def test_a_pattern_takes_the_place_of_the_sparsity(notebook, explorer):
    explorer.retrain.select_option("biases")
    explorer.expect(re.compile("^wanda, 50 %: .* after retraining biases"))
    explorer.pattern.select_option("2:4")
    explorer.expect(re.compile("^wanda, 2:4: .* after retraining biases"))
    expect(explorer.sparsity.locator("[disabled]").first).to_be_attached()
    notebook.screenshot("grid_3_pattern", FILLED)
    explorer.pattern.select_option("unstructured")
    explorer.expect(re.compile("^wanda, 50 %: "))


def test_the_rows_are_folded_and_open(notebook, explorer):
    expect(explorer.rows.locator("table")).to_be_hidden()
    explorer.rows.locator(".jupyter-widget-Collapse-header").click()
    expect(explorer.rows.locator("table")).to_be_visible()
    rows = explorer.rows.locator("tbody tr")
    before = rows.count()
    assert before >= 4
    explorer.retrain.select_option("none")
    explorer.press("ArrowRight")
    explorer.expect(re.compile("^wanda, 55 %: "))
    expect(rows).to_have_count(before + 1)
    # It is still open, and marks what is new.
    expect(rows.filter(has_text="●")).to_have_text(re.compile("55 %none"))
    notebook.screenshot("grid_4_rows", FILLED)
    explorer.rows.locator(".jupyter-widget-Collapse-header").click()


def test_exports_open_and_stay_in_their_folder(browser, notebook, explorer, lab):
    _, root = lab
    before = {path for path in root.rglob("*") if path.is_file() and ".ipynb" not in str(path)}
    files = {ending: explorer.export(ending) for ending in ("pdf", "svg", "png", "csv")}
    notebook.screenshot("grid_5_exported", FILLED)
    written = {path for path in root.rglob("*") if path.is_file() and ".ipynb" not in str(path)} - before
    assert written == {root / "exported" / f"sparsity.{ending}" for ending in files}
    for ending, saved in files.items():
        assert saved.read_bytes() == (root / "exported" / f"sparsity.{ending}").read_bytes()
    with Image.open(files["png"]) as picture:
        assert picture.size == (1440, 880)
    table = pd.read_csv(files["csv"])
    assert set(table["criterion"]) == {"wanda"}
    assert 0.55 in set(table["sparsity"])
    page = browser.new_page()
    page.goto((root / "exported" / "sparsity.svg").as_uri())
    assert page.locator("svg").first.bounding_box()["width"] > 100
    page.close()
    assert files["pdf"].read_bytes().startswith(b"%PDF-")
    assert files["pdf"].read_bytes().rstrip().endswith(b"%%EOF")


def test_cancel_stops_the_filling(notebook):
    explorer = Explorer(notebook.cell(ENDLESS))
    explorer.expect(re.compile("^50 %: perplexity"))
    explorer.fill.click()
    expect(explorer.filling).to_have_text(re.compile(r"magnitude biases at 30 %.* h left$"))
    notebook.screenshot("grid_6_endless", ENDLESS)
    expect(explorer.cancel).to_be_enabled()
    explorer.cancel.click()
    expect(explorer.filling).to_have_text(re.compile(r"^cancelled: \d of 4 rows of the grid finished$"))
    expect(explorer.fill).to_be_enabled()
    explorer.press("ArrowRight")
    explorer.expect(re.compile("^55 %: perplexity"))
