"""The store shared: several processes and threads write it at once, are killed, and are watched."""

import random
import sqlite3
import subprocess
import sys
import threading
import time

import pytest

import perpkit as pk

WAIT = """
import sys
from perpkit.experiments.store import Store
print("ready", flush=True)
sys.stdin.readline()
path, name = sys.argv[1:]
"""
WRITE = """
for number in range(200):
    Store(path).put(f"{name} {number}", {"writer": name, "number": number})
"""
# Rows of several pages: half of one would show.
WRITE_UNTIL_KILLED = """
store, number = Store(path), 0
while True:
    store.put(f"{name} {number}", {"writer": name, "number": number, "text": f"{name} {number} " * 2000})
    print(number, flush=True)
    number += 1
"""
RACE = """
for number in range(100):
    Store(path).put(str(number), {"writer": name, "error": None if name == "finisher" else "lost"})
"""


@pytest.fixture
def path(tmp_path):
    return tmp_path / "folder" / "results.sqlite"


def start(code, path, names):
    """Processes that have all begun when one of them goes on."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    started = [
        subprocess.Popen([sys.executable, "-c", WAIT + code, str(path), name], **pipes) for name in names
    ]
    for process in started:
        assert process.stdout.readline() == "ready\n"
    for process in started:
        process.stdin.write("go\n")
        process.stdin.flush()
    return started


def finish(processes):
    for process in processes:
        process.communicate(timeout=60)
        assert process.returncode == 0


def test_processes_writing_at_once_lose_nothing(path):
    finish(start(WRITE, path, "abcd"))
    expected = {f"{name} {n}": {"writer": name, "number": n} for name in "abcd" for n in range(200)}
    assert pk.Store(path).get(expected) == expected
    assert len(pk.Store(path).table()) == len(expected)


def test_a_finished_row_wins_whoever_is_first(path):
    finish(start(RACE, path, ["finisher", "loser", "finisher", "loser"]))
    table = pk.Store(path).table(failed=None)
    assert sorted(table.key, key=int) == [str(number) for number in range(100)]
    assert set(table.writer) == {"finisher"}


def test_a_killed_writer_leaves_whole_rows_and_all_it_had_put(path):
    seed, acknowledged = random.Random(0), {}
    for life in range(12):
        (writer,) = start(WRITE_UNTIL_KILLED, path, [f"life {life}"])
        for _ in range(seed.randrange(1, 6)):
            last = int(writer.stdout.readline())
        time.sleep(seed.random() / 100)
        writer.kill()
        rest = writer.communicate()[0].split()
        acknowledged[f"life {life}"] = int(rest[-1]) if rest else last
    for store in (pk.Store(path, readonly=True), pk.Store(path)):
        table = store.table()
        for writer, last in acknowledged.items():
            rows = table[table.writer == writer]
            numbers = rows.number.tolist()
            # At most the one in work when it was killed comes on top.
            assert numbers in (list(range(last + 1)), list(range(last + 2)))
            assert rows.text.tolist() == [f"{writer} {number} " * 2000 for number in numbers]


def test_plots_follow_a_sweep_that_writes(path):
    pk.Store(path)
    reader, seen = pk.Store(path, readonly=True), [0]
    writers = start(WRITE, path, "ab")
    while any(writer.poll() is None for writer in writers):
        table = reader.table()
        assert (
            table.key == table.get("writer", table.key) + " " + table.get("number", table.key).astype(str)
        ).all()
        seen.append(len(table))
    finish(writers)
    assert seen == sorted(seen)
    assert len(set(seen)) > 2
    assert len(reader.table()) == 400


def test_threads_writing_at_once_lose_nothing(path):
    store = pk.Store(path)

    def write(name):
        for number in range(25):
            store.put(f"{name} {number}", {"number": number})

    run_at_once([lambda name=name: write(name) for name in "abcd"])
    assert len(store.get(f"{name} {n}" for name in "abcd" for n in range(25))) == 100


def test_a_store_may_be_created_by_several_at_once(tmp_path):
    for number in range(10):
        path = tmp_path / str(number) / "results.sqlite"
        failures = run_at_once([lambda key=key, path=path: pk.Store(path).put(key, {}) for key in "abcdef"])
        assert failures == []
        assert sorted(pk.Store(path).table().key) == list("abcdef")


def run_at_once(tasks):
    """Run each in a thread; what they raised."""
    failures, begin = [], threading.Barrier(len(tasks))

    def run(task):
        begin.wait()
        try:
            task()
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(task,)) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return failures


def hold(path):
    """A connection that no other may share the file with."""
    holder = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    holder.execute("PRAGMA locking_mode = EXCLUSIVE")
    holder.execute("BEGIN EXCLUSIVE")
    holder.execute("INSERT INTO rows (key, failed, row, checksum) VALUES ('held', 0, '{}', 0)")
    holder.execute("COMMIT")
    return holder


def test_a_locked_store_is_a_sentence_and_usable_afterwards(path, monkeypatch):
    store, reader = pk.Store(path), pk.Store(path, readonly=True)
    store.put("a", {"is": "a"})
    monkeypatch.setattr(pk.Store, "_timeout", 0.2)
    holder = hold(path)
    for call in (
        lambda: store.put("b", {}),
        lambda: store.get(["a"]),
        lambda: store.delete(["a"]),
        lambda: reader.get(["a"]),
        lambda: pk.Store(path),
        lambda: pk.Store(path, readonly=True),
    ):
        with pytest.raises(
            ValueError, match=r"locked by another process for more than 0\.2 seconds\. Let it"
        ) as error:
            call()
        assert str(path) in str(error.value)
    holder.close()
    store.put("b", {"is": "b"})
    assert reader.get(["a", "b"]) == store.get(["a", "b"]) == {"a": {"is": "a"}, "b": {"is": "b"}}


def test_a_lock_is_waited_for(path):
    assert pk.Store._timeout == 30
    store = pk.Store(path)
    holder = hold(path)
    release = threading.Timer(1.5, holder.close)  # longer than one wait of SQLite's
    release.start()
    store.put("a", {"is": "a"})
    release.join()
    assert store.get(["a"]) == {"a": {"is": "a"}}


def test_reading_does_not_wait_for_a_writer_at_work(path, monkeypatch):
    store = pk.Store(path)
    store.put("a", {"is": "a"})
    monkeypatch.setattr(pk.Store, "_timeout", 0.2)
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    holder.execute("DELETE FROM rows")
    for reader in (store, pk.Store(path, readonly=True)):
        assert reader.get(["a"]) == {"a": {"is": "a"}}
        assert len(reader.table()) == 1
    holder.close()
