"""The explorers of masks, outliers and adapters in JupyterLab, moved by mouse and keyboard."""

import re

import pytest
from playwright.sync_api import expect

from .lab import Explorer, opened

pytestmark = [pytest.mark.browser, pytest.mark.slow]

SOURCES = [
    """from perpkit.interactive.explorers.adapters import AdapterExplorer
from perpkit.interactive.explorers.masks import MaskExplorer
from perpkit.interactive.explorers.outliers import OutlierExplorer""",
    "masks = MaskExplorer()\nmasks",
    "outliers = OutlierExplorer(strengths=[0, 1, 2], seeds=[0])\noutliers",
    "AdapterExplorer(steps=15)",
    "AdapterExplorer(steps=100_000)",
    "print(float(1 - masks.figure().table['kept'].mean()))",
    """from torch import nn
made = [*globals().get("made", []), MaskExplorer(nn.Linear(4, 4))]
print(len(made))""",
    "print([explorer.comm is None for explorer in made])",
]
MASKS, OUTLIERS, ADAPTERS, ENDLESS, PRUNED, MADE, CLOSED = 1, 2, 3, 4, 5, 6, 7
# Counts the pictures that the page has shown, while a hand drags.
COUNT = """image => {
    window.pictures = 0;
    new MutationObserver(() => window.pictures++).observe(image, {attributeFilter: ['src']});
}"""


@pytest.fixture(scope="module")
def notebook(browser, lab):
    with opened(browser, lab, "matrices.ipynb", SOURCES) as notebook:
        yield notebook


def choose(explorer: Explorer, cell, name: str, label: str) -> None:
    cell.locator(f".perpkit-{name} select").select_option(label)


def test_the_mask_follows_the_hand(notebook):
    cell = notebook.cell(MASKS)
    explorer = Explorer(cell)
    explorer.expect(re.compile(r"^0\.fc1: 50 % of 12,544 weights pruned, threshold 0\.172$"))
    explorer.picture.evaluate(COUNT)
    track, handle = explorer.sparsity.locator(".noUi-base").bounding_box(), explorer.handle.bounding_box()
    height = handle["y"] + handle["height"] / 2
    mouse = notebook.page.mouse
    mouse.move(handle["x"] + handle["width"] / 2, height)
    mouse.down()
    # There and back until it has followed a few times: a busy machine leaves moves out.
    for step in range(1500):
        mouse.move(track["x"] + (0.5 + abs((step + 30) % 60 - 30) / 75) * track["width"], height)
        notebook.page.wait_for_timeout(30)
        if step >= 30 and notebook.page.evaluate("window.pictures > 3"):
            break
    # The button is still held down.
    assert notebook.page.evaluate("window.pictures > 3")
    mouse.move(track["x"] + 0.8 * track["width"], height)
    expect(explorer.message).not_to_have_text(re.compile("50 %"))
    mouse.up()
    explorer.drag(1)
    explorer.expect(re.compile(r"^0\.fc1: 99 % of"))
    explorer.press("ArrowLeft", 9)
    explorer.expect(re.compile(r"^0\.fc1: 90 % of"))
    assert notebook.run_cell(PRUNED).strip().startswith("0.9")
    notebook.screenshot("masks_1_dragged", MASKS)


def test_groups_and_two_criteria(notebook):
    cell = notebook.cell(MASKS)
    explorer = Explorer(cell)
    before = explorer.picture_bytes()
    choose(explorer, cell, "pattern", "2:4")
    choose(explorer, cell, "criterion", "wanda")
    explorer.expect(re.compile("2 of every 4 consecutive inputs of a row are kept$"))
    notebook.screenshot("masks_2_groups", MASKS)
    choose(explorer, cell, "other", "magnitude")
    explorer.expect(re.compile(r"with magnitude it agrees on [\d.]+ % of the weights"))
    assert explorer.picture_bytes() != before
    notebook.screenshot("masks_3_compared", MASKS)
    choose(explorer, cell, "other", "sparsegpt")
    explorer.expect(re.compile(r"with sparsegpt it agrees on [\d.]+ %"))
    cell.locator("button.perpkit-export-png").click()
    expect(cell.locator(".perpkit-exported a")).to_have_attribute("download", "mask.png")


def test_the_dial_of_the_outliers(notebook):
    cell = notebook.cell(OUTLIERS)
    explorer = Explorer(cell)
    explorer.expect(re.compile(r"^σ = 1: the function is the same up to rounding.*by Wanda 2\.46 → 2\.46$"))
    before = explorer.picture_bytes()
    cell.locator(".perpkit-strength .noUi-handle").focus()
    notebook.page.keyboard.press("ArrowRight")
    explorer.expect(re.compile(r"^σ = 2: .* by magnitude 2\.65 → 50\.\d+, by Wanda 2\.46 → 2\.46$"))
    assert explorer.picture_bytes() != before
    notebook.screenshot("outliers", OUTLIERS)
    choose(explorer, cell, "sparsity", "60 %")
    explorer.expect(re.compile(r"^σ = 2: .*pruned to 60 % by magnitude 6\.\d+ → \d+\.\d+, by Wanda"))


def test_adapters_are_trained_and_merged(notebook):
    cell = notebook.cell(ADAPTERS)
    explorer = Explorer(cell)
    explorer.expect(re.compile("^mask_lora, rank 4, .* 70 % merged: merging changes nothing$"))
    notebook.screenshot("adapters_1", ADAPTERS)
    before = explorer.picture_bytes()
    choose(explorer, cell, "kind", "lora")
    explorer.expect(re.compile("^lora, rank 4, .* plain LoRA makes the model dense"))
    assert explorer.picture_bytes() != before
    notebook.screenshot("adapters_2_dense", ADAPTERS)


def test_training_adapters_can_be_cancelled(notebook):
    cell = notebook.cell(ENDLESS)
    explorer = Explorer(cell)
    expect(explorer.message).to_have_text(re.compile("training step [1-9]"))
    expect(explorer.picture).to_be_visible()
    notebook.screenshot("adapters_3_training", ENDLESS)
    explorer.cancel.click()
    explorer.expect(re.compile("^cancelled"))
    assert notebook.run_cell(PRUNED).strip() == "0.5"


def test_a_cell_that_is_run_again_closes_what_it_has_made(notebook):
    assert notebook.run_cell(MADE).strip() == "2"
    assert notebook.run_cell(CLOSED).strip() == "[True, False]"
