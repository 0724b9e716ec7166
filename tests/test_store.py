"""The store: what was put is there, whoever wrote it, and every failure says what to do."""

import sqlite3
import subprocess
import sys
import threading

import pytest

import perpkit as pk
from perpkit.experiments import store as storing
from perpkit.experiments.store import FORMAT, default_store


@pytest.fixture
def path(tmp_path):
    return tmp_path / "folder" / "results.sqlite"


def test_a_row_outlives_the_object_that_put_it(path):
    row = {"perplexity": 2.5, "model": "tiny-opt", "length": None, "bad": float("inf"), "name": "Größe"}
    pk.Store(path).put("a", row)
    assert pk.Store(path).get(["a"]) == {"a": row}


def test_only_the_rows_asked_for_are_returned(path):
    store = pk.Store(path)
    for key in "abc":
        store.put(key, {"is": key})
    assert store.get(["c", "a", "missing"]) == {"a": {"is": "a"}, "c": {"is": "c"}}
    assert store.get([]) == {}


def test_a_row_of_the_same_key_is_replaced(path):
    store = pk.Store(path)
    store.put("a", {"perplexity": 1.0})
    store.put("a", {"perplexity": 2.0})
    assert store.get(["a"]) == {"a": {"perplexity": 2.0}}


def test_a_row_is_seen_by_another_connection_when_put_returns(path):
    store = pk.Store(path)
    store.put("a", {"perplexity": 1.0})
    connection = sqlite3.connect(path)
    assert connection.execute("SELECT key FROM rows").fetchall() == [("a",)]
    connection.close()


def test_the_environment_names_the_default_file(path, monkeypatch):
    monkeypatch.setenv("PERPKIT_STORE", str(path))
    assert pk.Store().path == path
    assert path.is_file()


def test_without_a_name_the_file_lies_in_the_cache_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("PERPKIT_STORE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_store() == tmp_path / "perpkit" / "results.sqlite"


WRITER = """
import sys
from perpkit.experiments.store import Store
store = Store(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
for number in range(100):
    store.put(f"{sys.argv[2]} {number}", {"writer": sys.argv[2], "number": number})
"""


def test_two_processes_writing_at_once_lose_nothing(path):
    command = [sys.executable, "-c", WRITER, str(path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    writers = [subprocess.Popen([*command, name], **pipes) for name in "ab"]
    for writer in writers:
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        writer.stdin.write("go\n")
        writer.stdin.flush()
    for writer in writers:
        writer.communicate(timeout=60)
        assert writer.returncode == 0
    expected = {f"{name} {n}": {"writer": name, "number": n} for name in "ab" for n in range(100)}
    assert pk.Store(path).get(expected) == expected


def test_threads_writing_at_once_lose_nothing(path):
    store = pk.Store(path)

    def write(name):
        for number in range(25):
            store.put(f"{name} {number}", {"number": number})

    threads = [threading.Thread(target=write, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(store.get(f"{name} {n}" for name in "abcd" for n in range(25))) == 100


def test_another_format_is_refused_with_the_way_out_and_left_as_it_is(path):
    pk.Store(path).put("a", {"perplexity": 1.0})
    with sqlite3.connect(path) as connection:
        connection.execute(f"PRAGMA user_version = {FORMAT + 1}")
    connection.close()
    with pytest.raises(ValueError, match="name another file, or delete this one") as error:
        pk.Store(path)
    assert f"format {FORMAT + 1}" in str(error.value)
    assert str(path) in str(error.value)
    with sqlite3.connect(path) as connection:
        assert connection.execute("SELECT count(*) FROM rows").fetchone() == (1,)
    connection.close()


def test_a_directory_in_the_place_of_the_file_is_refused_with_the_way_out(path):
    path.mkdir(parents=True)
    with pytest.raises(ValueError, match="name another file with store= or PERPKIT_STORE") as error:
        pk.Store(path)
    assert str(path) in str(error.value)


def test_a_file_that_is_no_store_is_refused_and_left_as_it_is(path):
    path.parent.mkdir()
    garbage = b"the shopping list of last week\n" * 200
    path.write_bytes(garbage)
    with pytest.raises(ValueError, match="name another file with store= or PERPKIT_STORE") as error:
        pk.Store(path)
    assert str(path) in str(error.value)
    assert path.read_bytes() == garbage


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot create the folder of the store"):
        pk.Store(tmp_path / "file" / "results.sqlite")


class FullDisk:
    """A connection that reads but cannot insert."""

    def __init__(self, connection):
        self.connection = connection

    def execute(self, command, *values):
        if command.startswith("INSERT"):
            raise sqlite3.OperationalError("database or disk is full")
        return self.connection.execute(command, *values)

    def __enter__(self):
        self.connection.__enter__()

    def __exit__(self, *error):
        return self.connection.__exit__(*error)

    def close(self):
        self.connection.close()


def test_a_full_disk_is_a_sentence_and_the_rows_before_it_are_kept(path, monkeypatch):
    store = pk.Store(path)
    store.put("a", {"perplexity": 1.0})
    connect = sqlite3.connect
    with monkeypatch.context() as full:
        full.setattr(storing.sqlite3, "connect", lambda *a, **k: FullDisk(connect(*a, **k)))
        with pytest.raises(ValueError, match=r"disk is full\. Free some disk space") as error:
            store.put("b", {"perplexity": 2.0})
        assert str(path) in str(error.value)
    assert store.get(["a", "b"]) == {"a": {"perplexity": 1.0}}


def test_the_file_is_named_when_the_store_is_shown(path):
    assert repr(pk.Store(path)) == f"Store({str(path)!r})"
