"""The wheel works without the clone: the embedded model, text and published tables travel inside it."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Run outside the clone. The site folder goes first, so that an editable install does not answer instead.
USE_THE_WHEEL = """
import math, sys
from pathlib import Path
site = Path(sys.argv[1])
sys.path.insert(0, str(site))
import perpkit as pk
assert Path(pk.__file__).is_relative_to(site), pk.__file__
model, tokenizer = pk.load_model("tiny-opt")
text = pk.load_text("storyworld", tokenizer)
perplexity = pk.perplexity(model, text.test)
assert math.isfinite(perplexity) and perplexity < 5, perplexity
"""


def run(*command, cwd):
    done = subprocess.run([sys.executable, *command], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder into which nothing but the freshly built wheel is installed."""
    folder = tmp_path_factory.mktemp("wheel")
    # without isolation the build uses the installed hatchling and needs no network
    run("-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT), cwd=folder)
    (wheel,) = folder.glob("perpkit-*.whl")
    run("-m", "pip", "install", "--no-deps", "--target", str(folder / "site"), str(wheel), cwd=folder)
    return folder / "site"


@pytest.mark.slow
def test_wheel_carries_the_data(site):
    inside = sorted(path.relative_to(site / "perpkit") for path in (site / "perpkit" / "data").rglob("*.csv"))
    assert inside == sorted(path.relative_to(ROOT) for path in (ROOT / "data").rglob("*.csv"))
    assert Path("data/paper/perp_v1_table5_subset_perplexity.csv") in inside


@pytest.mark.slow
def test_wheel_runs_outside_the_clone(site, tmp_path):
    run("-c", USE_THE_WHEEL, str(site), cwd=tmp_path)
