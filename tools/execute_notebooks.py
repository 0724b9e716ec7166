"""Execute the notebooks from top to bottom, each in a fresh kernel, and store their outputs.

    python tools/execute_notebooks.py [--check] [--store results.sqlite] [notebook ...]

What is written can be compared: no widget state, no progress bars, no times or versions of a machine. A
digest of the executed code is written into the notebook, and badges into the first cell of those of the
series; `--check` writes nothing and fails where a notebook does not run, was edited after it was executed, or
holds anything that executing would not have left there.
"""

import argparse
import hashlib
import sys
import tempfile
import tomllib
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from perpkit.interactive.notebooks import execute_notebook, readable

ROOT = Path(__file__).parents[1]
SERIES = "[0-9][0-9]_*.ipynb"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", nargs="*", type=Path, help="notebooks to execute; all unless told")
    parser.add_argument("--check", action="store_true", help="execute copies and write nothing")
    parser.add_argument(
        "--store", type=Path, help="where finished rows are kept; a temporary file unless told"
    )
    options = parser.parse_args()
    found = sorted((ROOT / "notebooks").rglob("*.ipynb"))
    paths = options.notebooks or [path for path in found if ".ipynb_checkpoints" not in path.parts]
    if not paths:
        sys.exit("there are no notebooks to execute")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        store = (options.store or Path(folder) / "results.sqlite").resolve()
        problems = [problem for path in paths if (problem := process(path, store, options.check))]
    for problem in problems:
        print(f"*** {problem}", file=sys.stderr)
    sys.exit(bool(problems))


def process(path: Path, store: Path, check: bool) -> str | None:
    """Execute one notebook; what is wrong with it, if anything."""
    print(path, flush=True)
    try:
        committed = path.read_text(encoding="utf-8")
        notebook = nbformat.reads(committed, as_version=4)
        stale = check and difference(notebook, path, committed)
        execute_notebook(notebook, path.parent, store)
        badge(notebook, path)
        notebook.metadata["perpkit"] = {"executed": digest(notebook)}
    except (OSError, ValueError) as error:
        return f"{path}: {error}"
    if not check:
        path.write_text(text(clean(notebook)), encoding="utf-8")
    return f"{path} {stale}: run `make notebooks`" if stale else None


def clean(notebook: NotebookNode) -> NotebookNode:
    """Leave out, in place, what differs from run to run or cannot be shown without a kernel."""
    notebook.metadata = NotebookNode(
        kernelspec={"display_name": "Python 3", "language": "python", "name": "python3"},
        language_info={"name": "python"},
        **{name: value for name, value in notebook.metadata.items() if name == "perpkit"},
    )
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
    readable(notebook)
    return notebook


def digest(notebook: NotebookNode) -> str:
    """What tells whether the code is the one that was executed."""
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256("\0".join(code).encode()).hexdigest()[:16]


def badge(notebook: NotebookNode, path: Path) -> None:
    """Begin a notebook of the series, in place, with the links that open it on Binder and Colab."""
    if not path.match(f"notebooks/{SERIES}"):
        return
    first = notebook.cells[0]
    lines = first.source.split("\n")
    rest = lines[2:] if lines[0].startswith("[![") else lines
    first.source = "\n".join([badges(path.name), "", *rest])


def badges(name: str) -> str:
    """One line of Markdown; the repository's address stands in pyproject.toml alone."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    address = project["urls"]["Repository"]
    owner_and_name = address.removeprefix("https://github.com/")
    binder = f"https://mybinder.org/v2/gh/{owner_and_name}/HEAD?labpath=notebooks%2F{name}"
    colab = f"https://colab.research.google.com/github/{owner_and_name}/blob/main/notebooks/{name}"
    return (
        f"[![Binder](https://mybinder.org/badge_logo.svg)]({binder}) "
        f"[![Colab](https://colab.research.google.com/assets/colab-badge.svg)]({colab}) "
        f"(in Colab, run `%pip install git+{address}` first)"
    )


def difference(notebook: NotebookNode, path: Path, committed: str) -> str | None:
    """In which way a committed notebook is not what executing it would have written."""
    if notebook.metadata.get("perpkit", {}).get("executed") != digest(notebook):
        return "was edited after it was executed"
    first = notebook.cells[0].source
    badge(notebook, path)
    if notebook.cells[0].source != first:
        return "begins with other badges than those of the address in pyproject.toml"
    if text(clean(notebook)) != committed:
        return "holds more than its outputs (widgets, times, versions or progress bars)"
    return None


def text(notebook: NotebookNode) -> str:
    return nbformat.writes(notebook, version=4) + "\n"


if __name__ == "__main__":
    main()
