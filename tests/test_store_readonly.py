"""Reading a store that others may be writing: the latest rows, no traces, never half of a change."""

import os
import sqlite3
import time

import pytest

import perpkit as pk
from perpkit.experiments.database import TICK_SECONDS, Database


@pytest.fixture
def store(tmp_path):
    store = pk.Store(tmp_path / "results.sqlite")
    store.put("a", {"is": "a"})
    return store


def files(store):
    return sorted(file.name for file in store.path.parent.iterdir())


def settle(path):
    """As if it had been written long ago."""
    os.utime(path, ns=(time.time_ns() - 10**12, time.time_ns() - 10**12))


@pytest.mark.parametrize("settled", [True, False])
def test_reading_leaves_no_trace(store, settled):
    if settled:
        settle(store.path)
    before, time_before = store.path.read_bytes(), store.path.stat().st_mtime_ns
    assert files(store) == ["results.sqlite"]
    reader = pk.Store(store.path, readonly=True)
    assert reader.get(["a"]) == {"a": {"is": "a"}}
    assert reader.table().key.tolist() == ["a"]
    assert files(store) == ["results.sqlite"]
    assert (store.path.read_bytes(), store.path.stat().st_mtime_ns) == (before, time_before)


def test_rows_that_are_still_in_the_log_are_read(store):
    reader = pk.Store(store.path, readonly=True)
    keeps_the_log = sqlite3.connect(store.path)
    keeps_the_log.execute("SELECT * FROM rows").fetchall()
    store.put("b", {"is": "b"})
    settle(store.path)
    assert store.path.with_name("results.sqlite-wal").stat().st_size
    assert reader.get(["b"]) == {"b": {"is": "b"}}
    keeps_the_log.close()


@pytest.fixture
def during_reading(monkeypatch):
    """Calls what is in the list, once each, while the file is read as it is."""
    interruptions, once = [], Database._once

    def interrupted(self, mode, begin, work):
        if "immutable" not in mode or not interruptions:
            return once(self, mode, begin, work)
        return once(self, mode, begin, lambda connection: (work(connection), interruptions.pop()())[0])

    monkeypatch.setattr(Database, "_once", interrupted)
    return interruptions


def test_what_was_written_meanwhile_is_read_again(store, during_reading):
    settle(store.path)
    reader = pk.Store(store.path, readonly=True)
    during_reading.append(lambda: store.put("b", {"is": "b"}))
    assert reader.get(["a", "b"]) == {"a": {"is": "a"}, "b": {"is": "b"}}
    assert not during_reading


@pytest.mark.parametrize("error", [sqlite3.DatabaseError("torn"), ValueError("torn")])
def test_an_error_of_what_was_written_meanwhile_is_no_error(store, during_reading, error):
    settle(store.path)
    reader = pk.Store(store.path, readonly=True)

    def write():
        store.put("b", {"is": "b"})
        raise error

    during_reading.append(write)
    assert reader.get(["a", "b"]) == {"a": {"is": "a"}, "b": {"is": "b"}}


def test_an_error_of_what_was_not_written_is_one(store, during_reading):
    settle(store.path)
    reader = pk.Store(store.path, readonly=True)

    def fail():
        raise ValueError("really")

    during_reading.append(fail)
    with pytest.raises(ValueError, match="really"):
        reader.get(["a"])


def test_a_file_is_read_as_it_is_only_when_the_clock_could_tell_a_change(store, monkeypatch):
    ages, once = [], Database._once

    def watched(self, mode, begin, work):
        if "immutable" in mode:
            ages.append(time.time() - store.path.stat().st_mtime)
        return once(self, mode, begin, work)

    monkeypatch.setattr(Database, "_once", watched)
    reader = pk.Store(store.path, readonly=True)
    os.utime(store.path)
    assert reader.get(["a"]) == {"a": {"is": "a"}}
    assert len(ages) == 2
    assert min(ages) > TICK_SECONDS
