"""The explorers without code, served by Voilà as `make app` does."""

import os
import re
import shutil
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest
from playwright.sync_api import expect

from .lab import PATIENCE, ROOT, SCREENSHOTS, Explorer, free_port, make_command

pytestmark = [pytest.mark.browser, pytest.mark.slow]


@pytest.fixture(scope="module")
def page(browser, tmp_path_factory):
    """The page that the command of `make app` serves, in a folder of its own."""
    home = tmp_path_factory.mktemp("app")
    (home / "notebooks").mkdir()
    shutil.copy(ROOT / "notebooks" / "explorer.ipynb", home / "notebooks")
    port = free_port()
    address = f"http://127.0.0.1:{port}/"
    private = {name: str(home / name) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "IPYTHONDIR")}
    environment = {**os.environ, **private, "PERPKIT_STORE": str(home / "rows.sqlite")}
    with (home / "log").open("w") as log:
        server = subprocess.Popen(
            [*make_command("app"), "--no-browser", f"--port={port}"],
            cwd=home,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            wait_until_it_listens(port, server, home / "log")
            page = browser.new_page(viewport={"width": 1200, "height": 1000})
            page.set_default_timeout(PATIENCE)
            page.goto(address)
            yield page
            page.close()
        finally:
            server.terminate()
            server.wait(60)


def wait_until_it_listens(port: int, server: subprocess.Popen, log: Path) -> None:
    for _ in range(600):
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5):
            return
        if server.poll() is not None:
            break
        time.sleep(0.2)
    raise RuntimeError(f"Voilà did not start:\n{log.read_text()}")


def test_there_is_no_code(page):
    expect(page.locator("h1")).to_contain_text("Explorers")
    expect(page.locator(".lm-TabBar-tabLabel").first).to_have_text("Sparsity")
    assert page.locator(".jp-InputArea-editor").count() == 0
    assert "import perpkit" not in page.inner_text("body")


def test_the_slider_moves_and_the_picture_follows(page):
    explorer = Explorer(page.locator("body"))
    expect(explorer.message).to_contain_text(re.compile(r"50 %: perplexity [\d.]+ dense → [\d.]+ pruned"))
    before = explorer.picture_bytes()
    explorer.press("ArrowRight", 2)
    expect(explorer.message).to_contain_text(re.compile(r"60 %: perplexity [\d.]+ dense → [\d.]+ pruned"))
    assert explorer.picture_bytes() != before
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / "app.png")


@pytest.mark.parametrize("name", ["Masks", "Outliers", "Distortion", "Adapters", "Soups", "Generation"])
def test_every_tab_opens(page, name):
    page.locator(".lm-TabBar-tabLabel").get_by_text(name, exact=True).click()
    # Exports wait for something to be shown, Cancel while more is coming.
    expect(page.locator("button.perpkit-export-png:visible")).to_be_enabled()
    expect(page.locator("button.perpkit-cancel:visible")).to_be_disabled()
    expect(page.locator("details:visible")).to_have_count(0)
    page.screenshot(path=SCREENSHOTS / f"app_{name.lower()}.png")
