"""A JupyterLab server on this machine, a browser, and an explorer in a notebook as a hand meets it.

Stores belong into a folder below the notebook's: JupyterLab lists the latter every few seconds and opens a
dialog when a file, such as a store's journal, goes away meanwhile.
"""

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_notebook
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright
from playwright.sync_api import Error as PlaywrightError

ROOT = Path(__file__).parents[2]
SCREENSHOTS = ROOT / "out" / "browser"
BROWSERS = ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable"]
MACOS = [f"/Applications/{name}.app/Contents/MacOS/{name}" for name in ("Google Chrome", "Chromium")]
# Without a sandbox: Chromium refuses to have one when it is run as root, as in a container.
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
FLAGS += ["--disable-component-update", "--disable-sync"]
# No question about news on the first start.
NOTIFICATIONS = '{"fetchNews": "false", "checkForUpdates": false}'
PATIENCE = 100_000  # milliseconds, for a machine that does other things too
TOKEN = "perpkit"


class NoBrowser(Exception):
    """No browser is installed that could be driven."""


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser without a window; raises NoBrowser where none is installed."""
    found = [path for name in BROWSERS if (path := shutil.which(name))]
    found += [path for path in MACOS if os.access(path, os.X_OK)]
    if not found:
        raise NoBrowser(f"none of {', '.join(BROWSERS)} is installed")
    expect.set_options(timeout=PATIENCE)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found[0], args=FLAGS)
        yield browser
        browser.close()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def make_command(target: str) -> list[str]:
    """What a target of the Makefile would run."""
    # Not as a part of the `make test` that may be running: its flags would add lines about directories.
    outside = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    command = ["make", "-n", "--no-print-directory", target]
    said = subprocess.run(command, cwd=ROOT, env=outside, capture_output=True, text=True, check=True)
    program, *rest = shlex.split(said.stdout.splitlines()[-1])
    return [str(ROOT / program), *rest]


@contextmanager
def jupyterlab(home: Path) -> Iterator[tuple[str, Path]]:
    """JupyterLab as `make lab` starts it, without any of the user's settings: its address and its folder."""
    root = home / "root"
    settings = home / "settings" / "@jupyterlab" / "apputils-extension"
    for folder in (root, settings):
        folder.mkdir(parents=True)
    (settings / "notification.jupyterlab-settings").write_text(NOTIFICATIONS)
    port = free_port()
    environment = {
        **os.environ,
        "IPYTHONDIR": str(home / "ipython"),
        "JUPYTER_CONFIG_DIR": str(home / "config"),
        "JUPYTER_DATA_DIR": str(home / "data"),
        "JUPYTER_RUNTIME_DIR": str(home / "runtime"),
        "JUPYTERLAB_SETTINGS_DIR": str(home / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces"),
    }
    _, _, _, *limits = make_command("lab")
    options = ["--no-browser", "--allow-root", f"--port={port}", "--ServerApp.port_retries=0"]
    options += ["--ServerApp.ip=127.0.0.1", f"--ServerApp.root_dir={root}", *limits]
    command = [sys.executable, "-m", "jupyter", "lab", *options, f"--IdentityProvider.token={TOKEN}"]
    with (home / "log").open("w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            _wait_for(f"http://127.0.0.1:{port}/api?token={TOKEN}", server, home / "log")
            yield f"http://127.0.0.1:{port}/lab", root
        finally:
            server.terminate()
            server.wait(60)


def _wait_for(address: str, server: subprocess.Popen, log: Path) -> None:
    for _ in range(600):
        if server.poll() is not None:
            break
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise RuntimeError(f"JupyterLab did not start:\n{log.read_text()}")


@contextmanager
def opened(
    browser: Browser, lab: tuple[str, Path], name: str, sources: Sequence[str]
) -> Iterator["Notebook"]:
    """A notebook of these cells in JupyterLab, all of them run."""
    address, root = lab
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    cells = [new_code_cell(source) for source in sources]
    nbformat.write(new_notebook(cells=cells, metadata=kernel), root / name)
    page = browser.new_page(viewport={"width": 1200, "height": 1000})
    try:
        yield Notebook(page, address, name)
    finally:
        page.close()
        # What a test that failed has begun goes on otherwise.
        _end_kernels(address.removesuffix("lab"))


def _end_kernels(address: str) -> None:
    def ask(method: str, path: str = "") -> bytes:
        request = urllib.request.Request(f"{address}api/kernels{path}?token={TOKEN}", method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.read()

    for kernel in json.loads(ask("GET")):
        ask("DELETE", f"/{kernel['id']}")


class Notebook:
    """One notebook in JupyterLab, all its cells run."""

    def __init__(self, page: Page, address: str, name: str):
        self.page = page
        page.set_default_timeout(PATIENCE)
        # Without the tabs of the notebook before.
        page.goto(f"{address}/tree/{name}?reset&token={TOKEN}")
        try:
            self.run_all()
        except (AssertionError, PlaywrightError):
            SCREENSHOTS.mkdir(parents=True, exist_ok=True)
            page.screenshot(path=SCREENSHOTS / "failed.png")
            raise

    def run_all(self) -> None:
        self.wait_until_idle()
        prompts = self.page.locator(".jp-CodeCell .jp-InputPrompt")
        # The first attempts may do nothing: on a busy machine the page says that it is idle too early.
        for _ in range(10):
            self.menu("Run", "Run All Cells")
            with suppress(AssertionError):
                expect(prompts.first).not_to_have_text("[ ]:", timeout=5000)
                break
        expect(prompts.last).to_have_text(re.compile(r"\[\d+\]:"))

    def wait_until_idle(self) -> None:
        # All three: each of them says so before the others do.
        expect(self.page.locator(".jp-KernelName")).not_to_have_text("No Kernel")
        indicator = self.page.locator(".jp-Notebook-ExecutionIndicator")
        expect(indicator).to_have_attribute("data-status", "idle")
        expect(self.page.locator("#jp-main-statusbar")).to_contain_text("| Idle")

    def menu(self, *names: str) -> None:
        for name in names:
            label = self.page.locator(".lm-MenuBar-itemLabel, .lm-Menu-itemLabel")
            label.get_by_text(name, exact=True).click()

    def cell(self, number: int) -> Locator:
        return self.page.locator(".jp-CodeCell").nth(number)

    def run_cell(self, number: int) -> str:
        """Run a cell again and return what it printed."""
        cell = self.cell(number)
        before = cell.locator(".jp-InputPrompt").inner_text()
        cell.locator(".cm-content").click()
        self.page.keyboard.press("Control+Enter")
        prompt = re.compile(rf"\[(?!{re.escape(before.strip('[]: '))}\])\d+\]:")
        expect(cell.locator(".jp-InputPrompt")).to_have_text(prompt)
        return cell.locator(".jp-OutputArea-output").inner_text()

    def screenshot(self, name: str, number: int) -> None:
        """Keep a picture of a cell, for people to look at."""
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        self.cell(number).scroll_into_view_if_needed()
        self.cell(number).screenshot(path=SCREENSHOTS / f"{name}.png")


class Explorer:
    """A SparsityExplorer in the output of a cell, moved as by a hand."""

    def __init__(self, cell: Locator):
        self.page, self.cell = cell.page, cell
        self.sparsity = cell.locator(".perpkit-sparsity")
        self.handle = self.sparsity.locator(".noUi-handle")
        self.retrain = cell.locator(".perpkit-retrain select")
        self.criterion = cell.locator(".perpkit-criterion select")
        self.pattern = cell.locator(".perpkit-pattern select")
        self.fill = cell.locator("button.perpkit-fill")
        self.filling = cell.locator(".perpkit-filling .widget-html-content")
        self.rows = cell.locator(".perpkit-rows")
        self.exported = cell.locator(".perpkit-exported .widget-html-content")
        self.cancel = cell.locator("button.perpkit-cancel")
        self.again = cell.locator("button.perpkit-again")
        self.message = cell.locator(".perpkit-message .widget-html-content")
        self.picture = cell.locator("img.perpkit-picture")

    def press(self, key: str, times: int = 1) -> None:
        """Move the slider by the keyboard."""
        self.handle.focus()
        for _ in range(times):
            self.page.keyboard.press(key)

    def drag(self, fraction: float) -> None:
        """Drag the slider to a place, 0 its left and 1 its right end, and let go."""
        track, handle = self.sparsity.locator(".noUi-base").bounding_box(), self.handle.bounding_box()
        assert track is not None
        assert handle is not None
        height = handle["y"] + handle["height"] / 2
        self.page.mouse.move(handle["x"] + handle["width"] / 2, height)
        self.page.mouse.down()
        self.page.mouse.move(track["x"] + fraction * track["width"], height, steps=8)
        self.page.mouse.up()

    def expect(self, said: str | re.Pattern) -> None:
        """Wait for a message, and for the controls to be free again."""
        expect(self.message).to_have_text(said)
        expect(self.cancel).to_be_disabled()

    def export(self, ending: str) -> Path:
        """Click an export button and then the link that comes: the file that the browser has saved."""
        self.cell.locator(f"button.perpkit-export-{ending}").click()
        link = self.exported.locator(f'a[download$=".{ending}"]')
        expect(link).to_be_visible()
        with self.page.expect_download() as saved:
            link.click()
        return Path(saved.value.path())

    def picture_bytes(self) -> bytes:
        """The PNG file that the page shows."""
        read = "async image => Array.from(new Uint8Array(await (await fetch(image.src)).arrayBuffer()))"
        return bytes(self.picture.evaluate(read))
