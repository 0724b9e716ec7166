"""The soup explorer in JupyterLab, moved by hand; and all figures in the dark theme."""

import re

import pytest
from playwright.sync_api import expect

from .lab import Explorer, opened

pytestmark = [pytest.mark.browser, pytest.mark.slow]

SOURCES = [
    "import perpkit as pk\n\npk.SoupExplorer(steps=3)",
    "pk.SoupExplorer(steps=1_000_000)",
    "pk.SparsityExplorer(pk.Grid(sparsity=[0.3, 0.5, 0.7], steps=5), store='stores/rows.sqlite')",
    "print('alive')",
]
SOUP, ENDLESS, SPARSITY, ALIVE = range(4)
POINT = r"loss [\d.]+, accuracy [\d.]+ %, sparsity {} %"


@pytest.fixture(scope="module")
def notebook(browser, lab):
    with opened(browser, lab, "soups.ipynb", SOURCES) as notebook:
        yield notebook


def test_the_point_moves_through_the_triangle(notebook):
    cell = notebook.cell(SOUP)
    explorer = Explorer(cell)
    explorer.expect(re.compile("^A 33 %, B 33 %, C 33 %: " + POINT.format("70.0")))
    before = explorer.picture_bytes()
    cell.locator(".perpkit-up .noUi-handle").focus()
    notebook.page.keyboard.press("End")
    explorer.expect(re.compile("^A 0 %, B 0 %, C 100 %: " + POINT.format("70.0")))
    assert explorer.picture_bytes() != before
    notebook.screenshot("soups_1_triangle", SOUP)
    cell.locator(".perpkit-view select").select_option("edge A–B")
    explorer.expect(re.compile(r"barrier of edge A–B: -?[\d.]+"))
    notebook.screenshot("soups_2_edge", SOUP)


def test_masks_of_their_own_lose_the_sparsity(notebook):
    cell = notebook.cell(SOUP)
    explorer = Explorer(cell)
    cell.locator(".perpkit-up .noUi-handle").focus()
    notebook.page.keyboard.press("Home")
    cell.locator(".perpkit-masks select").select_option(index=1)
    explorer.expect(re.compile(r"sparsity 49\.\d % \(each of the three: 70\.0 %\)"))
    notebook.screenshot("soups_3_own_masks", SOUP)


def test_retraining_the_candidates_can_be_cancelled(notebook):
    explorer = Explorer(notebook.cell(ENDLESS))
    expect(explorer.message).to_contain_text(re.compile("retraining A, [1-9]"))
    explorer.cancel.click()
    explorer.expect(re.compile("^cancelled"))
    assert notebook.run_cell(ALIVE).strip() == "alive"


def test_figures_can_be_read_in_the_dark_theme(notebook):
    """A figure has a ground of its own: its dark letters never stand on a dark page."""
    notebook.menu("Settings", "Theme", "JupyterLab Dark")
    body = notebook.page.locator("body")
    expect(body).to_have_attribute("data-jp-theme-light", "false")
    explorer = Explorer(notebook.cell(SPARSITY))
    explorer.expect(re.compile("^50 %: perplexity"))
    corner = explorer.picture.evaluate(
        """image => {
            const canvas = document.createElement('canvas');
            canvas.width = image.naturalWidth;
            canvas.height = image.naturalHeight;
            const context = canvas.getContext('2d');
            context.drawImage(image, 0, 0);
            return Array.from(context.getImageData(2, 2, 1, 1).data);
        }"""
    )
    assert corner == [255, 255, 255, 255]
    notebook.screenshot("dark_sparsity", SPARSITY)
    notebook.screenshot("dark_soups", SOUP)
    # The words around the figure follow the theme: light on dark.
    colour = explorer.message.evaluate("element => getComputedStyle(element).color")
    assert min(map(int, re.findall(r"\d+", colour)[:3])) > 128, colour
    notebook.menu("Settings", "Theme", "JupyterLab Light")
    expect(body).to_have_attribute("data-jp-theme-light", "true")
