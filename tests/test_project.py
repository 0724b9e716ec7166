"""What the project's own files promise: one list of dependencies, no machine's traces, rooms in order."""

import ast
import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pandas as pd
import pytest
import yaml
from browser.lab import make_command
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CORE = [Requirement(line) for line in PROJECT["dependencies"]]
DEV = [Requirement(line) for line in PROJECT["optional-dependencies"]["dev"]]
TARGETS = ["demo", "test", "lab", "app", "notebooks", "bench", "format", "lint", "clean"]
ALLOWED_ROOMS = {
    "sources": set(),
    "pruning": {"sources"},
    "retraining": {"sources", "pruning"},
    "evaluation": {"sources", "pruning"},
    "experiments": {"sources", "pruning", "retraining", "evaluation"},
    "interactive": {"sources", "pruning", "retraining", "evaluation", "experiments"},
    "cli": {"sources", "pruning", "retraining", "evaluation", "experiments", "interactive", "demo"},
}


def pins() -> dict[str, str]:
    """Package name -> version, of constraints.txt."""
    lines = [line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    requirements = [Requirement(line) for line in lines if line]
    return {canonicalize_name(r.name): str(r.specifier).removeprefix("==") for r in requirements}


# --- dependencies ---------------------------------------------------------------------------------


def test_environment_installs_the_project_with_its_constraints():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    *conda, pip = environment["dependencies"]
    assert [re.split("[=<>]", name)[0] for name in conda] == ["python", "pip"]
    first, *packages, last = pip["pip"]
    assert (first, last) == ("-c constraints.txt", "-e .[dev]")
    # Names alone: the ranges stand in pyproject.toml, the versions in constraints.txt.
    assert packages == [requirement.name for requirement in CORE]


def test_environment_says_what_each_package_is_for():
    lines = (ROOT / "environment.yml").read_text().split("- pip:\n")[1].splitlines()
    assert [line for line in lines if "#" not in line] == []


@pytest.mark.parametrize("requirement", CORE + DEV, ids=str)
def test_dependency_is_pinned_within_its_range(requirement):
    pin = pins()[canonicalize_name(requirement.name)]
    assert requirement.specifier.contains(pin)
    assert any(bound.operator == ">=" for bound in requirement.specifier), "has no lower bound"


def test_core_packages_are_all_required():
    fixed = {"torch", "transformers", "jupyterlab", "ipywidgets", "matplotlib", "pandas", "lm-eval"}
    assert fixed <= {canonicalize_name(requirement.name) for requirement in CORE}


def test_pins_are_plain_versions():
    # one build's local tag, such as +cpu, could be installed from one machine's index alone
    assert [name for name, version in pins().items() if not re.fullmatch(r"\d[\w.]*", version)] == []


# --- no traces of a machine -----------------------------------------------------------------------


def project_files() -> list[Path]:
    """The files git tracks or would add."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [path for name in listed.split("\0") if name and (path := ROOT / name).is_file()]


def traces(text: str) -> list[str]:
    """Package index hosts and options, and absolute paths that only one machine has."""
    # put together from pieces, so that this file passes its own test
    host = r"\b(pypi|pythonhosted|download\.pytorch|registry\.npmjs|conda\.anaconda)" + r"\.org\b"
    option = r"--(extra-)?index-url\b|--find" + r"-links\b"
    folder = r"(?<![\w.~}/-])/(work|root|home|Users|opt)" + r"/\w"
    return [line.strip()[:200] for line in text.splitlines() if re.search(f"{host}|{option}|{folder}", line)]


def test_traces_are_recognised():
    slash, dashes = "/", "--"
    assert traces(f'File "{slash}home{slash}ada/notes.py", line 1')
    assert traces(f"pip install {dashes}find-links wheels")
    assert not traces("see frame/work/notes.md, ~/work/notes.md and https://example.org/home/page")


def test_no_file_names_an_index_or_a_machine():
    found = {}
    for path in project_files():
        try:
            lines = traces(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError:  # not a text file
            continue
        if lines:
            found[str(path.relative_to(ROOT))] = lines
    assert found == {}


# --- make, citation, published numbers ------------------------------------------------------------


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_lists_and_plans_every_target():
    # Without the variables by which an outer make would make itself heard.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}

    def make(*arguments):
        command = ["make", *arguments]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)

    listed = make().stdout
    for target in TARGETS:
        assert f"make {target} " in listed
        assert make("-n", target).stdout, f"make {target} does nothing"


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_commands_of_make_are_found_inside_make_too(monkeypatch):
    monkeypatch.setenv("MAKEFLAGS", "w")
    monkeypatch.setenv("MAKELEVEL", "1")
    assert make_command("lab")[0] == str(ROOT / ".venv" / "bin" / "jupyter")


def test_citation_names_the_main_papers():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == PROJECT["version"]
    identifiers = {i["value"] for paper in citation["references"] for i in paper.get("identifiers", [])}
    assert {"arXiv:2312.15230", "arXiv:2306.16788"} <= identifiers


@pytest.mark.parametrize("path", sorted((ROOT / "data" / "paper").glob("*.csv")), ids=lambda path: path.stem)
def test_published_table_is_readable(path):
    table = pd.read_csv(path)
    assert len(table) > 0
    assert not table.isna().all().any()
    assert path.name in (path.parent / "README.md").read_text()


# --- the package ----------------------------------------------------------------------------------

MODULES = sorted((ROOT / "perpkit").rglob("*.py"))


def imported(path: Path) -> set[str]:
    """The absolute names of the modules a file imports, wherever in it."""
    package = path.relative_to(ROOT).parent.parts
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from perpkit import pruning` imports a room, not a name of the package
            names |= {f"{module}.{alias.name}" for alias in node.names} if module == "perpkit" else {module}
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_module_is_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 300


@pytest.mark.parametrize("room", ALLOWED_ROOMS)
def test_room_imports_only_from_rooms_before_it(room):
    found = set()
    for path in (ROOT / "perpkit" / room).rglob("*.py"):
        for name in imported(path):
            top, *rest = name.split(".")
            if top == "perpkit" and (not rest or rest[0] not in ALLOWED_ROOMS[room] | {room}):
                found.add(f"{path.relative_to(ROOT)} imports {name}")
    assert found == set()


def test_no_room_is_forgotten():
    rooms = {path.parent.name for path in (ROOT / "perpkit").glob("*/__init__.py")}
    assert rooms <= set(ALLOWED_ROOMS)
