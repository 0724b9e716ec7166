"""Every committed notebook runs, was run as it stands, and can be read without running it."""

import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "notebooks"
NOTEBOOKS = [path for path in sorted(FOLDER.rglob("*.ipynb")) if ".ipynb_checkpoints" not in path.parts]
WIDGET = "application/vnd.jupyter.widget-view+json"

each_notebook = pytest.mark.parametrize(
    "path", NOTEBOOKS, ids=[str(path.relative_to(FOLDER)) for path in NOTEBOOKS]
)


def code_cells(path: Path) -> list:
    notebook = nbformat.read(path, as_version=4)
    return [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]


def execute(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "tools" / "execute_notebooks.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


# --- the committed notebooks ----------------------------------------------------------------------


def test_there_are_notebooks():
    assert NOTEBOOKS, f"no notebook under {FOLDER}"


def test_every_notebook_of_the_series_has_its_solutions():
    series = {path.name for path in FOLDER.glob("[0-9][0-9]_*.ipynb")}
    assert len(series) == 10
    assert {path.name for path in (FOLDER / "solutions").glob("*.ipynb")} == series


@pytest.mark.parametrize("path", sorted(FOLDER.glob("[0-9][0-9]_*.ipynb")), ids=lambda path: path.stem)
def test_its_solutions_can_be_found(path):
    texts = [cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "markdown"]
    assert any(f"](solutions/{path.name})" in text for text in texts)


@pytest.mark.parametrize("name", sorted(path.name for path in FOLDER.glob("[0-9][0-9]_*.ipynb")))
def test_solutions_pass_every_check_of_their_notebook(name):
    def checks(path: Path) -> set[str]:
        return set(re.findall(r"exercises\.(check_\w+)", "".join(cell.source for cell in code_cells(path))))

    asked = checks(FOLDER / name)
    assert asked
    assert checks(FOLDER / "solutions" / name) >= asked


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    """One store for all the notebooks: what one has computed the next finds."""
    return tmp_path_factory.mktemp("notebooks") / "results.sqlite"


@pytest.mark.slow
@each_notebook
def test_it_runs_and_is_what_was_executed(path, store):
    done = execute("--check", "--store", store, path)
    assert done.returncode == 0, done.stderr


@each_notebook
def test_it_is_committed_with_its_outputs_and_without_errors(path):
    cells = code_cells(path)
    outputs = [output for cell in cells for output in cell.outputs]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert outputs
    assert [output for output in outputs if output.output_type == "error"] == []
    assert [output.text for output in outputs if output.get("name") == "stderr"] == []


@each_notebook
def test_its_cells_are_short(path):
    assert [cell.source for cell in code_cells(path) if len(cell.source.splitlines()) > 15] == []


@each_notebook
def test_it_prints_versions_first(path):
    printed = "".join(output.get("text", "") for output in code_cells(path)[0].outputs)
    assert re.search(r"perpkit\D*\d+\.\d+", printed), "the first code cell does not print perpkit's version"
    assert re.search(r"torch\D*\d+\.\d+", printed), "the first code cell does not print torch's version"


@each_notebook
def test_it_holds_no_widgets(path):
    assert "widgets" not in nbformat.read(path, as_version=4).metadata
    assert [
        cell.source for cell in code_cells(path) if any(WIDGET in o.get("data", {}) for o in cell.outputs)
    ] == []


@each_notebook
def test_it_is_small(path):
    assert path.stat().st_size < 1_500_000


# --- the tool -------------------------------------------------------------------------------------

SOURCES = [
    "import os\nprint(os.path.basename(os.getcwd()), os.path.basename(os.environ['PERPKIT_STORE']))",
    "import sys\nfor part in (0, 50, 100):\n    print(f'\\r{part:3}%|##  | 1/2', end='', file=sys.stderr)",
    "print('a warning', file=sys.stderr)",
    "import ipywidgets\nipywidgets.IntSlider()",
    "display(ipywidgets.IntProgress())",
    "6 * 7",
]


@pytest.fixture(scope="module")
def executed(tmp_path_factory) -> Path:
    """A notebook with everything that must not be kept, after its execution."""
    path = tmp_path_factory.mktemp("series") / "part" / "00_all.ipynb"
    path.parent.mkdir()
    cells = [new_markdown_cell("# All"), *map(new_code_cell, SOURCES)]
    cells[1].metadata = {"execution": {"iopub.execute_input": "now"}, "tags": ["kept"]}
    state = {"widgets": {"application/vnd.jupyter.widget-state+json": {"state": {}}}}
    nbformat.write(new_notebook(cells=cells, metadata=state), path)
    done = execute(path)
    assert done.returncode == 0, done.stderr
    return path


@pytest.mark.slow
def test_what_is_kept_of_an_execution(executed):
    outputs = [cell.outputs for cell in code_cells(executed)]
    assert outputs[0][0].text == "part results.sqlite\n"
    assert outputs[1] == []
    assert [(output.name, output.text) for output in outputs[2]] == [("stderr", "a warning\n")]
    assert list(outputs[3][0].data) == ["text/plain"]
    assert outputs[4] == []
    assert outputs[5][0].data == {"text/plain": "42"}
    notebook = nbformat.read(executed, as_version=4)
    assert set(notebook.metadata) == {"kernelspec", "language_info", "perpkit"}
    assert notebook.cells[1].metadata == {"tags": ["kept"]}


@pytest.mark.slow
def test_badges_open_the_notebook(executed):
    series = executed.parents[1] / "notebooks" / "00_all.ipynb"
    series.parent.mkdir(exist_ok=True)
    series.write_bytes(executed.read_bytes())
    assert execute(series).returncode == 0
    first = nbformat.read(series, as_version=4).cells[0].source
    assert first.endswith("\n\n# All")
    links = re.findall(r"\]\((https://[^)]*)\)", first.split("\n")[0])
    # Each badge is a picture inside its link.
    _, binder, _, colab = links
    assert re.fullmatch(
        r"https://mybinder\.org/v2/gh/[^/]+/[^/]+/HEAD\?labpath=notebooks%2F00_all\.ipynb", binder
    )
    assert colab.endswith("/blob/main/notebooks/00_all.ipynb")
    assert execute(series).returncode == 0
    assert nbformat.read(series, as_version=4).cells[0].source == first
    series.write_text(series.read_text().replace("mybinder", "theirbinder"))
    done = execute("--check", series)
    assert "begins with other badges" in done.stderr


@pytest.mark.slow
def test_executing_again_changes_nothing(executed):
    before = executed.read_bytes()
    assert execute(executed).returncode == 0
    assert executed.read_bytes() == before


@pytest.mark.slow
def test_check_writes_nothing_and_finds_what_was_edited(executed, tmp_path):
    copy = tmp_path / "copy.ipynb"
    for change, said in [
        (lambda cells: None, ""),
        (lambda cells: cells[0].update(source="# Another text around the code"), ""),
        (lambda cells: cells[6].update(source="6 * 8"), "was edited after it was executed"),
        (lambda cells: cells[1].metadata.update(execution={}), "holds more than its outputs"),
        (lambda cells: cells[6].update(source="1 / 0"), "ZeroDivisionError"),
    ]:
        notebook = nbformat.read(executed, as_version=4)
        change(notebook.cells)
        nbformat.write(notebook, copy)
        before = copy.read_bytes()
        done = execute("--check", copy)
        assert (done.returncode == 0) == (said == ""), done.stderr
        assert said in done.stderr
        assert copy.read_bytes() == before


@pytest.mark.slow
def test_a_notebook_that_does_not_run_is_left_as_it_is(tmp_path):
    path = tmp_path / "broken.ipynb"
    nbformat.write(new_notebook(cells=[new_code_cell("1 / 0")]), path)
    before = path.read_bytes()
    missing = tmp_path / "missing.ipynb"
    done = execute(path, missing)
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr
    assert "missing.ipynb" in done.stderr
    assert path.read_bytes() == before
