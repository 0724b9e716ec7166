"""One browser and one JupyterLab server for all tests."""

import pytest

from .lab import NoBrowser, chromium, jupyterlab


@pytest.fixture(scope="session")
def browser():
    try:
        with chromium() as browser:
            yield browser
    except NoBrowser as error:
        pytest.skip(f"NO BROWSER: {error}, the widgets are NOT TESTED")


@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    """A JupyterLab server: its address and the folder it shows."""
    with jupyterlab(tmp_path_factory.mktemp("lab")) as lab:
        yield lab
