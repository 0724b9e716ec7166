"""perpkit doctor: what is well, what is not, and what to do."""

import json
import shutil
import sqlite3
from contextlib import closing

import pytest
from typer.testing import CliRunner

import perpkit as pk
from perpkit import cli
from perpkit.experiments.experiment import RESULT_FORMAT

doctoring = cli.doctor


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("perpkit.sources.hub.hub_reachable", lambda: False)


def report(code: int = 0, *arguments) -> dict[str, dict]:
    done = CliRunner().invoke(cli.main, ["doctor", "--json", *map(str, arguments)])
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


def test_an_optional_package_that_is_missing_is_named_with_the_command(monkeypatch):
    monkeypatch.setattr(doctoring, "OPTIONAL", {"no-such-package": "nothing at all"})
    monkeypatch.setattr(doctoring, "CHECKS", (doctoring._packages,))
    found = report()["no-such-package"]
    assert found["found"] == "optional, not installed; it is for nothing at all"
    assert (found["state"], found["remedy"]) == ("ok", "pip install no-such-package")


@pytest.mark.parametrize(("free", "state"), [(2**31 - 1, "warning"), (2**31, "ok")])
def test_little_room_for_models_is_a_warning_that_names_the_folder(monkeypatch, tmp_path, free, state):
    from huggingface_hub import constants

    cache = tmp_path / "not" / "yet"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    room = {tmp_path: free}
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(
        doctoring.shutil, "disk_usage", lambda path: usage._replace(free=room.get(path, 2**40))
    )
    monkeypatch.setattr(doctoring, "CHECKS", (doctoring._disks,))
    monkeypatch.setenv("PERPKIT_STORE", "/")
    found = report(code=1)  # a folder is no store
    assert str(cache) in found["Hub cache"]["found"]
    assert found["Hub cache"]["state"] == state
    assert ("HF_HUB_CACHE" in found["Hub cache"]["remedy"]) == (state == "warning")
    assert found["disk"]["state"] == "ok"


def test_a_classifier_that_has_forgotten_is_a_problem(monkeypatch):
    from perpkit.evaluation import accuracy as measuring

    monkeypatch.setattr(measuring, "accuracy", lambda model, data: 0.1)
    monkeypatch.setattr(doctoring, "CHECKS", (doctoring._classifier,))
    assert report(code=1)["classifier"]["state"] == "problem"


# --- a store --------------------------------------------------------------------------------------


@pytest.fixture
def only_the_store(monkeypatch):
    monkeypatch.setattr(doctoring, "CHECKS", ())


def test_the_store_is_counted(monkeypatch, tmp_path, only_the_store):
    path = tmp_path / "results.sqlite"
    monkeypatch.setenv("PERPKIT_STORE", str(path))
    assert "not there yet" in report()["store"]["found"]
    assert not path.exists()
    store = pk.Store(path)
    store.put("a", {"perplexity": 2.0, "error": None})
    store.put("b", {"error": "ValueError: no"})
    assert "2 rows, 1 of them failed" in report()["store"]["found"]


def test_a_store_that_is_none_is_a_problem(monkeypatch, tmp_path, only_the_store):
    path = tmp_path / "results.sqlite"
    path.write_text("no database at all, but long enough to be taken for one" * 40)
    monkeypatch.setenv("PERPKIT_STORE", str(path))
    assert report(code=1)["store"]["state"] == "problem"


def test_a_store_may_be_named(tmp_path, only_the_store):
    store = pk.Store(tmp_path / "named.sqlite")
    experiment = pk.Experiment()
    store.put(experiment.key(), {**experiment.asdict(), "error": None, "format": RESULT_FORMAT})
    store.put("old", {**experiment.asdict(), "error": None, "format": 2})
    found = report(0, "--store", store.path)["store"]
    assert f"{store.path}: 2 rows, 0 of them failed, 1 outdated, format 2" in found["found"]
    assert "--outdated" in found["found"]


def test_a_store_in_a_folder_that_cannot_be_written_is_a_problem(tmp_path, only_the_store, monkeypatch):
    store = pk.Store(tmp_path / "results.sqlite")
    store.put("a", {"sparsity": 0.5})
    # Not by chmod: root may write everywhere.
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path)
    found = report(1, "--store", store.path)["store"]
    assert found["state"] == "problem"
    assert "it or its folder is not writable" in found["found"]


def test_a_named_store_that_is_not_there_is_a_problem(tmp_path, only_the_store):
    found = report(1, "--store", tmp_path / "nowhere.sqlite")["store"]
    assert (found["state"], "there is no store" in found["found"]) == ("problem", True)
    assert found["remedy"].startswith("there is none there yet: a sweep makes it")
    assert list(tmp_path.iterdir()) == []


def test_a_store_of_format_1_is_looked_at_and_left_as_it_is(tmp_path, only_the_store):
    path = tmp_path / "old.sqlite"
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE rows (key TEXT PRIMARY KEY, row TEXT NOT NULL)")
        connection.execute("INSERT INTO rows VALUES ('a', '{}')")
        connection.execute("PRAGMA user_version = 1")
    before = path.read_bytes()
    assert (
        "1 rows, 0 of them failed, 0 outdated, format 1 (a sweep brings it"
        in report(0, "--store", path)["store"]["found"]
    )
    assert path.read_bytes() == before


@pytest.mark.parametrize("damage", ["row", "index"])
def test_a_damaged_store_is_a_problem(tmp_path, only_the_store, damage):
    store = pk.Store(tmp_path / "damaged.sqlite")
    for number in range(50):
        store.put(f"key {number}", {"perplexity": 2.0})
    with closing(sqlite3.connect(store.path)) as connection, connection:
        ((page,),) = connection.execute("SELECT rootpage FROM sqlite_master WHERE type = 'index'")
        ((size,),) = connection.execute("PRAGMA page_size")
        if damage == "row":
            connection.execute("UPDATE rows SET row = '{\"perplexity\": 3.0}' WHERE key = 'key 7'")
    if damage == "index":
        content = bytearray(store.path.read_bytes())
        start, end = size * (page - 1), size * page
        content[start:end] = content[start:end].replace(b"key 31", b"kez 31")
        store.path.write_bytes(content)
    found = report(1, "--store", store.path)["store"]
    assert found["state"] == "problem"
    assert "damaged" in found["found"]
    assert "--store" in found["remedy"]
