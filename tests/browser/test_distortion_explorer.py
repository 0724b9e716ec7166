"""The distortion and the generation explorer in JupyterLab: chosen, typed, uploaded, cancelled, broken."""

import io
import re

import pytest
from PIL import Image
from playwright.sync_api import Locator, expect

from .lab import Explorer, opened

pytestmark = [pytest.mark.browser, pytest.mark.slow]

SOURCES = [
    """from perpkit.interactive.explorers.distortion import DistortionExplorer
from perpkit.interactive.explorers.generation import GenerationExplorer

DistortionExplorer(steps=3)""",
    "DistortionExplorer('tiny-opt', steps=3)",
    "GenerationExplorer(steps=3)",
    "GenerationExplorer(steps=1_000_000)",
    "print('alive')",
]
PICTURES, LANGUAGE, TEXTS, ENDLESS, ALIVE = range(5)
PICTURED = re.compile(r"^filter \d+ of \S+: relative error \S+ pruned → \S+ after retraining \S+$")
PRUNED = "^70 % pruned by magnitude, biases\\+norms retrained for 3 steps;"
READ = re.compile(
    "^hidden state after the last block, on 16 test windows: relative error .* after retraining "
    "biases\\+norms$"
)


@pytest.fixture(scope="module")
def notebook(browser, lab):
    with opened(browser, lab, "distortion.ipynb", SOURCES) as notebook:
        yield notebook


def png(picture: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def upload(cell: Locator, name: str, content: bytes) -> None:
    with cell.page.expect_file_chooser() as chooser:
        cell.locator("button.perpkit-upload").click()
    chooser.value.set_files({"name": name, "mimeType": "image/png", "buffer": content})


def write(cell: Locator, kind: str, text: str) -> None:
    """Type a prompt and leave its field."""
    field = cell.locator(f".perpkit-prompt {kind}")
    field.fill(text)
    field.blur()


def test_a_picture_a_layer_and_a_filter_are_chosen(notebook):
    cell = notebook.cell(PICTURES)
    explorer = Explorer(cell)
    explorer.expect(PICTURED)
    before = explorer.picture_bytes()
    cell.locator(".perpkit-subject select").select_option("heart")
    expect(cell.locator(".perpkit-predictions")).to_contain_text(re.compile("dense\\s*heart"))
    cell.locator(".perpkit-layer select").select_option("layer2.0.bn1")
    explorer.expect(re.compile("^filter 8 of layer2.0.bn1: .* after retraining"))
    cell.locator(".perpkit-filter .noUi-handle").focus()
    notebook.page.keyboard.press("ArrowRight")
    explorer.expect(re.compile("^filter 9 of layer2.0.bn1: .* after retraining"))
    explorer.drag(1)
    explorer.expect(PICTURED)
    expect(explorer.sparsity).to_contain_text("90 %")
    assert explorer.picture_bytes() != before
    notebook.screenshot("distortion_1_chosen", PICTURES)


def test_an_upload_is_looked_at(notebook):
    cell = notebook.cell(PICTURES)
    explorer = Explorer(cell)
    before = explorer.picture_bytes()
    upload(cell, "mine.png", png(Image.radial_gradient("L").convert("RGB")))
    expect(cell.locator(".perpkit-subject select")).to_have_value("your upload")
    explorer.expect(PICTURED)
    expect(explorer.again).to_be_disabled()
    assert explorer.picture_bytes() != before
    notebook.screenshot("distortion_2_upload", PICTURES)


def test_a_bad_upload_is_told_and_the_next_is_looked_at(notebook):
    cell = notebook.cell(PICTURES)
    explorer = Explorer(cell)
    upload(cell, "<b>notes</b>.txt", b"hello")
    explorer.expect(re.compile("^ValueError: '<b>notes</b>.txt' is no picture; the formats are PNG"))
    notebook.screenshot("distortion_3_bad_upload", PICTURES)
    frames = [Image.new("RGB", (40, 40), colour) for colour in ("red", "blue")]
    upload(cell, "moves.gif", png(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    explorer.expect(re.compile("^ValueError: 'moves.gif' is animated"))
    upload(cell, "large.png", bytes(21 * 2**20))
    explorer.expect(re.compile(r"^ValueError: 'large.png' has 21\.0 MB; a picture may have 20 MB"))
    upload(cell, "bomb.png", png(Image.new("1", (8000, 8000))))
    explorer.expect(re.compile("^ValueError: 'bomb.png' unpacks to 8000 × 8000 pixels"))
    # The same file twice, as when somebody has mended it.
    upload(cell, "bomb.png", png(Image.new("RGB", (40, 40), "green")))
    explorer.expect(PICTURED)
    assert notebook.run_cell(ALIVE).strip() == "alive"


def test_a_prompt_is_typed(notebook):
    cell = notebook.cell(LANGUAGE)
    explorer, predictions = Explorer(cell), cell.locator(".perpkit-predictions")
    explorer.expect(READ)
    expect(explorer.sparsity).to_be_visible()
    expect(predictions).to_contain_text("' Monday'")
    write(cell, "input", "On the floor")
    expect(predictions).to_contain_text("after “On the floor” comes")
    expect(predictions).to_contain_text("' lie'")
    explorer.expect(READ)
    write(cell, "input", "It is a ☃")
    explorer.expect(re.compile("characters outside the vocabulary: ☃ \\(U\\+2603\\)"))
    write(cell, "input", "<img src=x onerror=alert(1)>")
    expect(predictions).to_contain_text("after “<img src=x onerror=alert(1)>” comes")
    write(cell, "input", "")
    explorer.expect("ValueError: the prompt is empty; write how the text begins")
    notebook.screenshot("distortion_4_bad_prompt", LANGUAGE)
    write(cell, "input", "It is a")
    explorer.expect(READ)
    notebook.screenshot("distortion_5_language", LANGUAGE)


def test_a_prompt_is_continued_three_times(notebook):
    cell = notebook.cell(TEXTS)
    explorer, texts = Explorer(cell), cell.locator(".perpkit-texts")
    explorer.expect(re.compile(f"{PRUNED} greedy; perplexities on 160 test windows$"))
    greedy = texts.inner_text()
    expect(texts.locator("td")).to_have_count(3)
    cell.locator(".perpkit-sampling select").select_option("sampled")
    explorer.expect(re.compile(f"{PRUNED} temperature 0.8, seed 0;"))
    assert texts.inner_text() != greedy
    write(cell, "textarea", "On the <i>floor</i> lie")
    expect(texts.locator("td").first).to_contain_text("On the <i>floor</i> lie")
    expect(texts.locator("td")).to_have_count(3)
    cell.locator(".perpkit-seed input").fill("7")
    cell.locator(".perpkit-seed input").blur()
    explorer.expect(re.compile(f"{PRUNED} temperature 0.8, seed 7;"))
    notebook.screenshot("generation_1_texts", TEXTS)
    with notebook.page.expect_download() as download:
        cell.locator("button.perpkit-export-csv").click()
        cell.locator(".perpkit-exported a").click()
    assert download.value.path().read_text().startswith("version,text,perplexity,model,prompt,")


def test_a_long_retraining_is_cancelled(notebook):
    cell = notebook.cell(ENDLESS)
    explorer = Explorer(cell)
    expect(explorer.message).to_have_text(
        re.compile(r"retraining biases\+norms, step \d+ of 1000000\s+about .* left")
    )
    expect(cell.locator(".perpkit-texts td")).to_have_count(2)
    notebook.screenshot("generation_2_retraining", ENDLESS)
    explorer.cancel.click()
    explorer.expect(re.compile("^cancelled"))
    write(cell, "textarea", "")
    explorer.expect("ValueError: the prompt is empty; write how the text begins")
    assert notebook.run_cell(ALIVE).strip() == "alive"


def test_both_can_be_read_in_the_dark_theme(notebook):
    notebook.menu("Settings", "Theme", "JupyterLab Dark")
    expect(notebook.page.locator("body")).to_have_attribute("data-jp-theme-light", "false")
    for name, number in (("distortion_6_dark", LANGUAGE), ("generation_3_dark", TEXTS)):
        notebook.screenshot(name, number)
    colours = (
        notebook.cell(TEXTS).locator(".perpkit-texts td").first.evaluate("e => getComputedStyle(e).color")
    )
    assert min(map(int, re.findall(r"\d+", colours)[:3])) > 150
