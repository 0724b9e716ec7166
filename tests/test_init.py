"""The package: quick to import, every public name there, and a command of its own."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import perpkit as pk


def python(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=120, check=False
    )


def public_names() -> list[str]:
    stub = Path(pk.__file__).with_suffix(".pyi")
    imports = [node for node in ast.parse(stub.read_text()).body if isinstance(node, ast.ImportFrom)]
    return [alias.asname for node in imports for alias in node.names]


def test_importing_it_imports_nothing_heavy():
    heavy = "{'torch', 'transformers', 'matplotlib', 'pandas', 'datasets', 'lm_eval', 'ipywidgets'}"
    found = python("-c", f"import sys, perpkit; print(sorted({heavy} & set(sys.modules)))")
    assert found.stdout == "[]\n", found.stderr


def test_there_are_public_names():
    assert {"load_model", "prune", "retrain", "sweep"} <= set(public_names())


@pytest.mark.parametrize("name", public_names())
def test_a_public_name_is_there_and_documented(name):
    assert name in dir(pk)
    assert name in pk.__all__
    found = getattr(pk, name)
    assert found.__name__.rpartition(".")[2] == name
    assert found.__doc__


def test_an_unknown_name_is_refused():
    with pytest.raises(AttributeError, match="prnue"):
        _ = pk.prnue


def test_the_version_is_that_of_the_distribution():
    from importlib.metadata import version

    assert pk.__version__ == version("perpkit")


def test_the_module_is_the_command_line():
    found = python("-m", "perpkit", "--help")
    assert found.returncode == 0, found.stderr
    assert "demo" in found.stdout
