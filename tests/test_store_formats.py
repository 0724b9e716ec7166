"""The store's formats: the earlier one is migrated whole, a later one and other databases are left alone."""

import json
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing

import pytest

import perpkit as pk
from perpkit.experiments import database

ROWS = {f"key {n}": {"number": n, "perplexity": n / 7, "bad": float("inf")} for n in range(1500)}


def write_format_1(path, rows=ROWS, version=1):
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("CREATE TABLE rows (key TEXT PRIMARY KEY, row TEXT NOT NULL)")
        connection.executemany(
            "INSERT INTO rows VALUES (?, ?)", [(k, json.dumps(r)) for k, r in rows.items()]
        )
        connection.execute(f"PRAGMA user_version = {version}")


def ask(path, question):
    with closing(sqlite3.connect(path)) as connection, connection:
        return connection.execute(question).fetchall()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "results.sqlite"


@pytest.mark.parametrize("version", [0, 1])  # 0: killed before it had named the format
def test_format_1_is_migrated_when_opened_for_writing(path, version):
    write_format_1(path, version=version)
    store = pk.Store(path)
    assert ask(path, "PRAGMA user_version") == [(2,)]
    assert ask(path, "SELECT name FROM sqlite_master WHERE type = 'table'") == [("rows",)]
    assert store.get(ROWS) == ROWS
    table = store.table()
    assert table.key.tolist() == list(ROWS)
    assert table.finished.isna().all()
    store.put("key 0", {"error": "late"})
    assert store.get(["key 0"]) == {"key 0": ROWS["key 0"]}
    store.put("key 0", {"number": -1})
    assert store.table().key.tolist() == [*list(ROWS)[1:], "key 0"]


@pytest.mark.parametrize("version", [0, 1])
def test_format_1_is_read_without_migration(path, version):
    write_format_1(path, version=version)
    before = path.read_bytes()
    store = pk.Store(path, readonly=True)
    assert store.get(ROWS) == ROWS
    assert store.table().key.tolist() == list(ROWS)
    assert store.table().finished.isna().all()
    assert path.read_bytes() == before


def test_a_migration_that_fails_leaves_format_1(path, monkeypatch):
    write_format_1(path)
    with monkeypatch.context() as broken:

        def insert(connection, rows):
            connection.execute("INSERT INTO rows VALUES (1, 'half', NULL, 0, '{}', 0)")
            raise sqlite3.OperationalError("interrupted")

        broken.setattr(database, "insert", insert)
        with pytest.raises(ValueError, match="interrupted"):
            pk.Store(path)
    assert ask(path, "PRAGMA user_version") == [(1,)]
    assert pk.Store(path, readonly=True).get(ROWS) == ROWS
    assert pk.Store(path).get(ROWS) == ROWS


def test_what_another_process_has_migrated_meanwhile_is_not_migrated_again(path):
    write_format_1(path, {"a": {"is": "old"}})
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    opening = threading.Thread(target=pk.Store, args=(path,))
    opening.start()
    time.sleep(0.3)
    assert opening.is_alive()  # it has seen format 1 and waits
    stored = database.Stored("a", "2030-01-01", False, '{"is": "new"}')
    other.execute("DROP TABLE rows")
    other.execute(database.SCHEMA)
    database.insert(other, [stored])
    other.execute("PRAGMA user_version = 2")
    other.execute("COMMIT")
    other.close()
    opening.join()
    assert pk.Store(path).table().values.tolist() == [["a", "2030-01-01", "new"]]


MIGRATE = """
import sys
from perpkit.experiments.store import Store
print("ready", flush=True)
sys.stdin.readline()
Store(sys.argv[1]).put(sys.argv[2], {"writer": sys.argv[2]})
"""


def test_processes_that_migrate_at_once_lose_nothing(path):
    write_format_1(path)
    command = [sys.executable, "-c", MIGRATE, str(path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    writers = [subprocess.Popen([*command, name], **pipes) for name in "abcd"]
    for writer in writers:
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        writer.stdin.write("go\n")
        writer.stdin.flush()
    for writer in writers:
        writer.communicate(timeout=60)
        assert writer.returncode == 0
    table = pk.Store(path).table()
    assert table.key.tolist()[: len(ROWS)] == list(ROWS)
    new = table.iloc[len(ROWS) :]
    assert sorted(new.key) == list("abcd")
    assert new.finished.notna().all()


@pytest.mark.parametrize("readonly", [False, True])
@pytest.mark.parametrize("command", ["", "ALTER TABLE rows ADD COLUMN more", "CREATE TABLE more (a)"])
def test_a_newer_format_is_refused_with_the_way_out_and_left_as_it_is(path, readonly, command):
    pk.Store(path).put("a", {"perplexity": 1.0})
    ask(path, command)
    ask(path, "PRAGMA user_version = 3")
    before = path.read_bytes()
    with pytest.raises(
        ValueError, match=r"Update perpkit, or move the file away .* or name another file"
    ) as error:
        pk.Store(path, readonly=readonly)
    assert "has format 3, this version reads up to 2" in str(error.value)
    assert str(path) in str(error.value)
    assert path.read_bytes() == before


@pytest.mark.parametrize("readonly", [False, True])
@pytest.mark.parametrize("version", [0, 1, 2, 7])
@pytest.mark.parametrize(
    "command", ["CREATE TABLE moz_places (url)", "CREATE TABLE rows (x)", "CREATE VIEW v AS SELECT 1"]
)
def test_the_database_of_another_program_is_refused_and_left_as_it_is(path, readonly, version, command):
    ask(path, command)
    ask(path, f"PRAGMA user_version = {version}")
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"no store of perpkit|has format 7") as error:
        pk.Store(path, readonly=readonly)
    assert "name another file with store= in Python, --store in a shell, or PERPKIT_STORE" in str(error.value)
    assert path.read_bytes() == before


def test_a_store_replaced_by_a_newer_one_is_not_written(path):
    store = pk.Store(path)
    ask(path, "PRAGMA user_version = 3")
    for call in (
        lambda: store.put("a", {}),
        lambda: store.get(["a"]),
        store.table,
        lambda: store.delete(["a"]),
    ):
        with pytest.raises(ValueError, match="has format 3"):
            call()


def test_a_row_of_format_1_that_is_no_mapping_is_not_misread(path):
    write_format_1(path, {"a": [], "b": {"is": "b"}})
    for store in (pk.Store(path, readonly=True), pk.Store(path)):
        assert store.get(["b"]) == {"b": {"is": "b"}}
        with pytest.raises(ValueError, match="is damaged"):
            store.get(["a"])
