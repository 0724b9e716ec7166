"""perpkit doctor: what is well, what is not, and what to do."""

import json

import pytest
from typer.testing import CliRunner

import perpkit as pk
from perpkit import cli

doctoring = cli.doctor


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("perpkit.sources.hub.hub_reachable", lambda: False)


def report(code: int = 0) -> dict[str, dict]:
    done = CliRunner().invoke(cli.main, ["doctor", "--json"])
    assert done.exit_code == code, done.output
    return {finding["what"]: finding for finding in json.loads(done.stdout)["findings"]}


def test_all_is_well_on_this_machine():
    found = report()
    assert {"python", "torch", "CPU", "Hub", "model", "papers", "store", "disk"} <= set(found)
    assert all(finding["state"] != "problem" for finding in found.values())
    assert "perplexity 1.96" in found["model"]["found"]
    assert found["Hub"]["state"] == "warning"
    assert "work without it" in found["Hub"]["remedy"]


def test_the_lines_are_read_by_a_person():
    done = CliRunner().invoke(cli.main, ["doctor"])
    assert done.exit_code == 0
    assert "all is there" in done.stdout
    assert "ok       model" in done.stdout


def test_weights_that_are_not_those_that_were_measured_are_a_problem(monkeypatch):
    from perpkit.evaluation import perplexity as measuring

    monkeypatch.setattr(measuring, "perplexity", lambda model, windows: 2.5)
    found = report(code=1)
    assert found["model"]["state"] == "problem"
    assert "should be 1.963" in found["model"]["found"]


def test_a_check_that_breaks_is_a_problem_and_the_others_go_on(monkeypatch):
    def _embedded():
        raise OSError("no such disk")
        yield

    monkeypatch.setattr(doctoring, "CHECKS", (_embedded, doctoring._python))
    found = report(code=1)
    assert found["embedded"]["state"] == "problem"
    assert "no such disk" in found["embedded"]["found"]
    assert found["python"]["state"] == "ok"


def test_a_missing_package_is_a_problem(monkeypatch):
    monkeypatch.setattr(doctoring, "PACKAGES", ("no-such-package",))
    assert report(code=1)["no-such-package"]["state"] == "problem"


def test_the_store_is_counted(monkeypatch, tmp_path):
    path = tmp_path / "results.sqlite"
    monkeypatch.setenv("PERPKIT_STORE", str(path))
    assert "not there yet" in report()["store"]["found"]
    assert not path.exists()
    store = pk.Store(path)
    store.put("a", {"perplexity": 2.0, "error": None})
    store.put("b", {"error": "ValueError: no"})
    assert "2 rows, 1 of them failed" in report()["store"]["found"]


def test_a_store_that_is_none_is_a_problem(monkeypatch, tmp_path):
    path = tmp_path / "results.sqlite"
    path.write_text("no database at all, but long enough to be taken for one" * 40)
    monkeypatch.setenv("PERPKIT_STORE", str(path))
    assert report(code=1)["store"]["state"] == "problem"
