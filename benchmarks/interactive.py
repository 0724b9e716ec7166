"""How fast the explorers answer a hand, in a real browser on the embedded model.

JupyterLab and Chromium run on this machine; times are taken inside the page, from the release of the mouse
to the picture that has changed, medians of several moves.
"""

import hashlib
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from _bars import Bars
from playwright.sync_api import FloatRect, Page, expect

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.browser.lab import Explorer, Notebook, chromium, jupyterlab, opened

SOURCES = [
    """import hashlib
import threading
import ipywidgets as widgets
from torch import nn
import perpkit as pk

every = pk.Grid(sparsity=[i / 20 for i in range(19)])
endless = pk.Grid(sparsity=0.5, retrain=["none", "biases"], steps=1_000_000)
_ = pk.sweep(every, store="stores/rows.sqlite", progress=False)
stopped = widgets.HTML("0")
stopped.add_class("bench-stopped")


def count_when_stopped():
    explorer.wait()
    stopped.value = str(int(stopped.value) + 1)""",
    "cached = pk.SparsityExplorer(every, store='stores/rows.sqlite')\ncached",
    "pk.SparsityExplorer(pk.Grid(sparsity=0.5), store='stores/new.sqlite')",
    """explorer = pk.SparsityExplorer(endless, store='stores/rows.sqlite')
explorer.cancel.on_click(lambda _: threading.Thread(target=count_when_stopped).start())
widgets.VBox([explorer, stopped])""",
    "pk.MaskExplorer(nn.Sequential(nn.Linear(128, 512)))",
    "print(hashlib.sha256(cached.figure().png()).hexdigest())",
]
CACHED, NEW, ENDLESS, MASKS, DIGEST = 1, 2, 3, 4, 5
# Notes when the mouse was last released or clicked, when the picture last changed, and when the message first
# spoke of another place than at the release: news of what runs is no answer.
WATCH = """([image, message]) => {
    window.unwatch?.abort();
    window.unwatch = new AbortController();
    const { signal } = window.unwatch;
    window.released = window.drawn = window.said = window.pictures = 0;
    const place = () => message.textContent.split(':')[0];
    let before = place();
    const release = () => { window.released = performance.now(); before = place(); };
    for (const kind of ['mouseup', 'pointerup'])
        document.addEventListener(kind, release, { capture: true, signal });
    const draw = () => { window.drawn = performance.now(); window.pictures++; };
    image.addEventListener('load', draw, { signal });
    const observer = new MutationObserver(() => {
        if (window.said < window.released && place() !== before) window.said = performance.now();
    });
    observer.observe(message, { childList: true, subtree: true, characterData: true });
    signal.addEventListener('abort', () => observer.disconnect());
}"""

# The kernel counts when nothing runs any more; the button is grey long before.
STOPPED = """place => new Promise(resolve => {
    const poll = () => place.textContent !== window.before
        ? resolve(performance.now() - window.released) : requestAnimationFrame(poll);
    poll();
})"""


def watched(notebook: Notebook, number: int) -> Explorer:
    explorer = Explorer(notebook.cell(number))
    expect(explorer.picture).to_be_visible()
    expect(explorer.cancel).to_be_disabled()
    notebook.cell(number).scroll_into_view_if_needed()
    handles = [explorer.picture.element_handle(), explorer.message.element_handle()]
    notebook.page.evaluate(WATCH, handles)
    return explorer


def after_release(explorer: Explorer, what: str) -> float:
    """Milliseconds from the release of the mouse to what changed last, once it has changed."""
    explorer.page.wait_for_function(f"window.{what} > window.released && window.released > 0")
    # Whatever else is drawn for the same move counts.
    explorer.page.wait_for_timeout(700)
    return explorer.page.evaluate(f"window.{what} - window.released")


def medians(explorer: Explorer, places: list[float], what: str) -> float:
    taken = []
    for place in places:
        explorer.page.wait_for_timeout(300)
        explorer.drag(place)
        taken.append(after_release(explorer, what))
    print("   ", " ".join(f"{each:.0f}" for each in taken), "ms", flush=True)
    return statistics.median(taken)


def cached(bars: Bars, notebook: Notebook) -> None:
    explorer = watched(notebook, CACHED)
    places = [n / 18 for n in (14, 4, 12, 8, 16, 6, 10, 2, 15)]
    bars.at_most("slider release to picture, cached row", medians(explorer, places, "drawn"), 300, 1, "ms")


def computed(bars: Bars, notebook: Notebook) -> None:
    explorer = watched(notebook, NEW)
    places = [n / 18 for n in (14, 4, 12, 8, 16, 6, 13)]
    measured = medians(explorer, places, "drawn")
    bars.at_most("slider release to picture, pruned and measured", measured, 1500, 1, "ms")


def while_retraining(bars: Bars, notebook: Notebook) -> None:
    explorer = watched(notebook, ENDLESS)
    stopped = notebook.cell(ENDLESS).locator(".bench-stopped .widget-html-content")
    echoes, stops = [], []
    for place in (0.4, 0.6, 0.3, 0.7, 0.5):
        explorer.retrain.select_option("biases")
        expect(explorer.message).to_contain_text("retraining biases, step")
        explorer.page.wait_for_timeout(1000)
        explorer.drag(place)
        explorer.page.wait_for_function("window.said > window.released")
        echoes.append(explorer.page.evaluate("window.said - window.released"))
        expect(explorer.message).to_contain_text("retraining biases, step")
        explorer.page.wait_for_timeout(1000)
        stopped.evaluate("place => { window.before = place.textContent; }")
        explorer.cancel.click()
        stops.append(stopped.evaluate(STOPPED))
        explorer.retrain.select_option("none")
        expect(explorer.cancel).to_be_disabled()
    print("   ", " ".join(f"{each:.0f}" for each in [*echoes, *stops]), "ms", flush=True)
    bars.at_most("slider echo while a retraining runs", statistics.median(echoes), 300, 1, "ms")
    bars.at_most("Cancel to stopped", statistics.median(stops), 500, 1, "ms")


def masks(bars: Bars, notebook: Notebook) -> None:
    explorer = watched(notebook, MASKS)
    page = explorer.page
    track, handle = explorer.sparsity.locator(".noUi-base").bounding_box(), explorer.handle.bounding_box()
    assert track is not None
    assert handle is not None
    height = handle["y"] + handle["height"] / 2
    page.mouse.move(handle["x"] + handle["width"] / 2, height)
    page.mouse.down()
    rates = [_redraws(page, track, height) for _ in range(3)]
    page.mouse.up()
    print("   ", " ".join(f"{each:.1f}" for each in rates), "a second", flush=True)
    bars.at_least("mask redraws a second, 512 × 128", statistics.median(rates), 10, 1)


def _redraws(page: Page, track: FloatRect, height: float) -> float:
    """Pictures a second while the handle is held and moved."""
    before, start = page.evaluate("[window.pictures, performance.now()]")
    for step in range(150):
        # There and back, a hundredth at a time.
        place = 0.5 + 0.4 * (1 - abs(step % 80 - 40) / 40)
        page.mouse.move(track["x"] + place * track["width"], height)
        page.wait_for_timeout(20)
    after, end = page.evaluate("[window.pictures, performance.now()]")
    return (after - before) / (end - start) * 1000


def quick_moves(bars: Bars, notebook: Notebook) -> None:
    explorer = watched(notebook, CACHED)
    before = explorer.page.evaluate("window.pictures")
    for n in range(20):
        explorer.press("ArrowRight" if n % 5 < 3 else "ArrowLeft")
    expect(explorer.cancel).to_be_disabled()
    explorer.page.wait_for_timeout(2000)
    drawn = explorer.page.evaluate("window.pictures") - before
    shown = hashlib.sha256(explorer.picture_bytes()).hexdigest()
    right = shown == notebook.run_cell(DIGEST).strip()
    bars.at_least("20 quick moves: the last picture is that of the last place", right, 1, 1)
    bars.at_most("20 quick moves: pictures drawn", drawn, 20, 1)


def main() -> None:
    parts: list[Callable[[Bars, Notebook], None]] = [cached, computed, while_retraining, masks, quick_moves]
    bars = Bars()
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        chromium() as browser,
        jupyterlab(Path(folder) / "lab") as lab,
        opened(browser, lab, "bench.ipynb", SOURCES) as notebook,
    ):
        expect(notebook.cell(MASKS).locator("img.perpkit-picture")).to_be_visible()
        for part in parts:
            part(bars, notebook)
    bars.finish()


if __name__ == "__main__":
    main()
