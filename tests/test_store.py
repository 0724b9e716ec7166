"""The store: what was put is there, in words as in numbers, and nothing else."""

import math
import sqlite3
from datetime import UTC, datetime

import numpy as np
import pytest
import torch

import perpkit as pk
from perpkit.experiments import database
from perpkit.experiments import store as storing
from perpkit.experiments.store import default_store


@pytest.fixture
def path(tmp_path):
    return tmp_path / "folder" / "results.sqlite"


def test_a_row_outlives_the_object_that_put_it(path):
    row = {
        "perplexity": 2.5,
        "model": "tiny-opt",
        "length": None,
        "list": [1, "a"],
        "name": "Größe",
        "on": True,
    }
    pk.Store(path).put("a", row)
    assert pk.Store(path).get(["a"]) == {"a": row}
    assert pk.Store(path, readonly=True).get(["a"]) == {"a": row}


def test_nan_and_infinity_survive(path):
    store = pk.Store(path)
    store.put("a", {"up": float("inf"), "down": -float("inf"), "nan": float("nan")})
    row = store.get(["a"])["a"]
    assert (row["up"], row["down"]) == (math.inf, -math.inf)
    assert math.isnan(row["nan"])


def test_numpy_scalars_become_pythons(path):
    store = pk.Store(path)
    store.put(
        "a",
        {
            "f": np.float32(0.5),
            "d": np.float64(0.1),
            "i": np.int64(3),
            "b": np.bool_(True),
            "s": [np.int8(1)],
        },
    )
    row = store.get(["a"])["a"]
    assert row == {"f": 0.5, "d": 0.1, "i": 3, "b": True, "s": [1]}
    assert [type(value) for value in row.values()] == [float, float, int, bool, list]


def test_only_the_rows_asked_for_are_returned_in_the_order_of_the_keys(path):
    store = pk.Store(path)
    for key in "abc":
        store.put(key, {"is": key})
    found = store.get(key for key in ["c", "a", "missing", "c"])
    assert list(found.items()) == [("c", {"is": "c"}), ("a", {"is": "a"})]
    assert store.get([]) == {}


def test_thousands_of_keys_are_looked_up_and_deleted_at_once(path, monkeypatch):
    connect = sqlite3.connect

    def connect_to_old_sqlite(*where, **how):
        connection = connect(*where, **how)
        connection.setlimit(sqlite3.SQLITE_LIMIT_VARIABLE_NUMBER, 999)
        return connection

    monkeypatch.setattr(database.sqlite3, "connect", connect_to_old_sqlite)
    store = pk.Store(path)
    for number in range(5):
        store.put(str(number), {"number": number})
    # Wanted ones at both ends of what is asked in several parts.
    many = ["0", "1", *(f"missing {n}" for n in range(4000)), "3", "4"]
    assert store.get(many) == {key: {"number": int(key)} for key in "0134"}
    assert store.delete(many) == 4
    assert store.get("01234"[n] for n in range(5)) == {"2": {"number": 2}}


def test_a_row_of_the_same_key_is_replaced(path):
    store = pk.Store(path)
    store.put("a", {"perplexity": 1.0, "old": 1})
    store.put("a", {"perplexity": 2.0})
    assert store.get(["a"]) == {"a": {"perplexity": 2.0}}


def test_a_failed_row_is_there_and_gives_way_to_every_later_one(path):
    store = pk.Store(path)
    store.put("a", {"error": "first"})
    assert store.get(["a"]) == {"a": {"error": "first"}}
    store.put("a", {"error": "second"})
    assert store.get(["a"]) == {"a": {"error": "second"}}
    store.put("a", {"error": None, "perplexity": 1.0})
    assert store.get(["a"]) == {"a": {"error": None, "perplexity": 1.0}}


@pytest.mark.parametrize("finished", [{"perplexity": 1.0}, {"perplexity": 1.0, "error": None}])
@pytest.mark.parametrize("error", ["ValueError: late", ""])
def test_a_failed_row_never_replaces_a_finished_one(path, finished, error):
    store = pk.Store(path)
    store.put("a", finished)
    store.put("a", {"error": error})
    assert store.get(["a"]) == {"a": finished}
    assert len(store.table(failed=None)) == 1


def test_deleted_rows_are_gone_and_counted(path):
    store = pk.Store(path)
    for key in "abc":
        store.put(key, {"is": key})
    assert store.delete(["a", "c", "missing", "a"]) == 2
    assert store.delete(["a"]) == 0
    assert store.get("abc"[n] for n in range(3)) == {"b": {"is": "b"}}


def test_one_string_is_no_list_of_keys(path):
    store = pk.Store(path)
    store.put("a", {})
    for call in (store.get, store.delete):
        with pytest.raises(ValueError, match=r"got the string 'a': write \['a'\]"):
            call("a")
    assert store.get(["a"]) == {"a": {}}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"weights": torch.ones(2)}, "for its 'weights': use numbers, strings, .* not Tensor"),
        ({"key": "b"}, "other than key and finished, got 'key'"),
        ({"finished": True}, "other than key and finished, got 'finished'"),
        ({3: 1}, "must be strings .* got 3"),
        ({"error": ValueError("x")}, "for its 'error'"),
        ({"error": float("nan")}, "error must be a string or None, got nan"),
    ],
)
def test_a_row_that_would_come_back_as_another_is_refused(path, row, words):
    store = pk.Store(path)
    with pytest.raises(ValueError, match=words):
        store.put("a", row)
    assert store.get(["a"]) == {}


def test_a_row_is_seen_by_another_connection_when_put_returns(path):
    store = pk.Store(path)
    store.put("a", {"perplexity": 1.0})
    connection = sqlite3.connect(path)
    assert connection.execute("SELECT key FROM rows").fetchall() == [("a",)]
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    connection.close()


def test_the_time_of_finishing_is_utc(path):
    store = pk.Store(path)
    before = datetime.now(UTC)
    store.put("a", {})
    (text,) = store.table().finished
    finished = datetime.fromisoformat(text)
    assert before <= finished <= datetime.now(UTC)
    assert finished.utcoffset().total_seconds() == 0


def test_rows_come_in_the_order_they_were_finished_whatever_the_clock_says(path, monkeypatch):
    store = pk.Store(path)

    class Clock:
        hours = iter([9, 8, 7, 6])

        @classmethod
        def now(cls, zone):
            return datetime(2030, 1, 1, next(cls.hours), tzinfo=zone)

    monkeypatch.setattr(storing, "datetime", Clock)
    for key in "bca":
        store.put(key, {})
    store.put("b", {})
    assert store.table().key.tolist() == ["c", "a", "b"]
    assert store.table().finished[2] == "2030-01-01T06:00:00.000000+00:00"


def test_the_environment_names_the_default_file(path, monkeypatch):
    monkeypatch.setenv("PERPKIT_STORE", str(path))
    assert pk.Store().path == path
    assert path.is_file()


def test_without_a_name_the_file_lies_in_the_cache_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("PERPKIT_STORE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_store() == tmp_path / "perpkit" / "results.sqlite"


def test_signs_of_an_address_in_the_name_are_part_of_the_name(tmp_path):
    path = tmp_path / "100%41 ?mode=memory#ü.sqlite"
    pk.Store(path).put("a", {"is": "a"})
    assert path.is_file()
    assert pk.Store(path, readonly=True).get(["a"]) == {"a": {"is": "a"}}


def test_the_file_is_named_when_the_store_is_shown(path):
    assert repr(pk.Store(path)) == f"Store({str(path)!r})"
    assert repr(pk.Store(path, readonly=True)) == f"Store({str(path)!r}, readonly=True)"
