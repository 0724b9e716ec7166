"""A store that is missing, damaged, full or forbidden: what is wrong, what to do, and nothing misread."""

import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest

import perpkit as pk
from perpkit.experiments import database

ANOTHER = "name another file with store= in Python, --store in a shell, or PERPKIT_STORE"
ROWS = {f"key {n}": {"perplexity": 1000 + n, "text": "x" * 100} for n in range(300)}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "folder" / "results.sqlite"


def fill(path):
    store = pk.Store(path)
    store._database.write(
        lambda connection: database.insert(
            connection,
            [database.Stored(key, None, False, str(row).replace("'", '"')) for key, row in ROWS.items()],
        )
    )
    assert store.get(ROWS) == ROWS


def opened(path):
    """Both ways to open a store."""
    return [lambda: pk.Store(path), lambda: pk.Store(path, readonly=True)]


def test_a_missing_file_is_not_created_to_be_read(path):
    for folder in (False, True):
        if folder:
            path.parent.mkdir()
        with pytest.raises(ValueError, match=r"there is no store .*: run a sweep first, or") as error:
            pk.Store(path, readonly=True)
        assert str(path) in str(error.value)
        assert ANOTHER in str(error.value)
        assert path.parent.exists() == folder
        assert not path.exists()


def test_a_readonly_store_cannot_be_written(path):
    pk.Store(path).put("a", {"is": "a"})
    store = pk.Store(path, readonly=True)
    for call in (lambda: store.put("a", {}), lambda: store.delete(["a"])):
        with pytest.raises(ValueError, match="was opened readonly=True: open it without"):
            call()
    assert pk.Store(path).get(["a"]) == {"a": {"is": "a"}}


def test_a_deleted_store_begins_anew(path):
    store = pk.Store(path)
    store.put("a", {"is": "a"})
    reader = pk.Store(path, readonly=True)
    shutil.rmtree(path.parent)
    with pytest.raises(ValueError, match="there is no store"):
        reader.get(["a"])
    store.put("b", {"is": "b"})
    assert store.get(["a", "b"]) == reader.get(["a", "b"]) == {"b": {"is": "b"}}


def test_a_folder_in_the_place_of_the_file_is_refused(path):
    path.mkdir(parents=True)
    for call in opened(path):
        with pytest.raises(ValueError, match=f"is a folder; {ANOTHER}") as error:
            call()
        assert str(path) in str(error.value)


def test_a_pipe_in_the_place_of_the_file_does_not_hang(path):
    path.parent.mkdir()
    os.mkfifo(path)
    for call in opened(path):
        with pytest.raises(ValueError, match="is no ordinary file"):
            call()


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=f"cannot create the folder of the store .*; {ANOTHER}"):
        pk.Store(tmp_path / "file" / "results.sqlite")
    with pytest.raises(ValueError, match="there is no store"):
        pk.Store(tmp_path / "file" / "results.sqlite", readonly=True)


@pytest.mark.parametrize("garbage", [b"no", b"the shopping list of last week\n" * 200, bytes(8192)])
def test_a_file_that_is_no_database_is_refused_and_left_as_it_is(path, garbage):
    path.parent.mkdir()
    path.write_bytes(garbage)
    for call in opened(path):
        with pytest.raises(
            ValueError, match=r"is no SQLite database .* It is left as it is, or name"
        ) as error:
            call()
        assert str(path) in str(error.value)
    assert path.read_bytes() == garbage


def test_an_empty_file_is_an_empty_store(path):
    path.parent.mkdir()
    path.touch()
    assert pk.Store(path, readonly=True).get(["a"]) == {}
    assert path.stat().st_size == 0
    pk.Store(path).put("a", {"is": "a"})
    assert pk.Store(path, readonly=True).get(["a"]) == {"a": {"is": "a"}}


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9])
def test_a_store_cut_short_is_damaged(path, kept):
    fill(path)
    os.truncate(path, int(path.stat().st_size * kept))
    for call in opened(path):
        with pytest.raises(
            ValueError, match=r"is damaged .* Put a copy in its place, or move it away"
        ) as error:
            call().table()
        assert str(path) in str(error.value)


@pytest.mark.parametrize("new", [b"9", b"\xff", b"}"])
def test_a_changed_byte_is_found_and_the_other_rows_are_read(path, new):
    fill(path)
    content = bytearray(path.read_bytes())
    place = content.index(b'{"perplexity": 1042')
    content[place + len(b'{"perplexity": ')] = new[0]
    path.write_bytes(content)
    for call in opened(path):
        for read in (lambda store: store.get(["key 42"]), lambda store: store.table()):
            with pytest.raises(ValueError, match="is damaged") as error:
                read(call())
            assert str(path) in str(error.value)
        assert call().get(["key 41", "key 43"]) == {key: ROWS[key] for key in ("key 41", "key 43")}


@pytest.mark.parametrize(
    "column", ["key = 'other'", "finished = '2030'", "failed = 1", "row = NULL", "checksum = 0"]
)
def test_every_part_of_a_row_is_checked(path, column):
    fill(path)
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA writable_schema = 1")
        connection.execute("UPDATE sqlite_master SET sql = replace(sql, 'row TEXT NOT NULL', 'row TEXT')")
    connection.close()
    with sqlite3.connect(path) as connection:
        connection.execute(f"UPDATE rows SET {column} WHERE key = 'key 7'")
    connection.close()
    with pytest.raises(ValueError, match="is damaged"):
        pk.Store(path).table(failed=None)


def test_overwritten_pages_are_damaged(path):
    fill(path)
    with path.open("r+b") as file:
        file.seek(8192)
        file.write(b"\xa5" * (path.stat().st_size - 8192))
    for call in opened(path):
        with pytest.raises(ValueError, match="is damaged"):
            call().get(ROWS)


FULL = """
import resource, sys
from perpkit.experiments.store import Store
store = Store(sys.argv[1])
store.put("a", {"is": "a"})
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
try:
    store.put("b", {"is": "b" * 500_000})
except ValueError as error:
    print(error)
assert store.get(["a", "b"]) == {"a": {"is": "a"}}
store.put("c", {"is": "c"})
resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
store.put("b", {"is": "b"})
assert store.get("abc"[n] for n in range(3)) == {key: {"is": key} for key in "abc"}
"""


def test_a_file_that_may_not_grow_is_a_sentence_and_the_rows_before_are_kept(path):
    done = subprocess.run([sys.executable, "-c", FULL, str(path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert f"{str(path)!r} cannot be written" in done.stdout
    assert "Free some disk space" in done.stdout


def test_a_full_disk_is_a_sentence_and_the_rows_before_are_kept(path, monkeypatch):
    store = pk.Store(path)
    store.put("a", {"is": "a"})
    connect = sqlite3.connect

    def connect_to_full_disk(*where, **how):
        connection = connect(*where, **how)
        connection.execute("PRAGMA max_page_count = 6")
        return connection

    with monkeypatch.context() as full:
        full.setattr(database.sqlite3, "connect", connect_to_full_disk)
        with pytest.raises(ValueError, match=r"disk is full\)\. Free some disk space") as error:
            store.put("b", {"is": "b" * 50_000})
        assert str(path) in str(error.value)
    assert store.get(["a", "b"]) == {"a": {"is": "a"}}


@pytest.fixture
def forbidden():
    """A folder with a store that an ordinary person may read, if the folder is then closed to her."""
    folder = Path(tempfile.mkdtemp())
    pk.Store(folder / "results.sqlite").put("a", {"is": "a"})
    yield folder
    folder.chmod(0o755)
    shutil.rmtree(folder)


def ordinary_person(folder, code):
    """What the code prints when run by someone who is not the administrator."""
    code = f"""
import os, pandas
from pathlib import Path
from perpkit.experiments.store import Store
if os.geteuid() == 0:
    os.setuid(65534)
path = Path({str(folder / "results.sqlite")!r})
try:
{textwrap.indent(textwrap.dedent(code), "    ")}
except ValueError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("mode", [0o555, 0o777])
def test_a_file_one_may_not_write_is_refused_at_once_and_can_be_read(forbidden, mode):
    (forbidden / "results.sqlite").chmod(0o444)
    forbidden.chmod(mode)
    said = ordinary_person(forbidden, "Store(path)")
    assert "may not be written" in said or "cannot be opened" in said
    assert "Allow yourself to" in said
    assert ANOTHER in said
    assert (
        ordinary_person(forbidden, "print(Store(path, readonly=True).get(['a']))") == "{'a': {'is': 'a'}}\n"
    )


def test_a_folder_one_may_not_write_is_refused_at_once_and_can_be_read(forbidden):
    (forbidden / "results.sqlite").chmod(0o666)
    forbidden.chmod(0o555)
    said = ordinary_person(forbidden, "Store(path)")
    assert "Allow yourself to" in said
    assert "the file and its folder, or name another file" in said
    code = "print(Store(path, readonly=True).table().values[:, [0, 2]].tolist())"
    assert ordinary_person(forbidden, code) == "[['a', 'a']]\n"


def test_a_file_one_may_not_read_is_a_sentence(forbidden):
    (forbidden / "results.sqlite").chmod(0)
    forbidden.chmod(0o755)
    said = ordinary_person(forbidden, "Store(path, readonly=True)")
    assert "cannot be read" in said
    assert "Allow yourself to read it" in said


def test_a_store_is_read_where_one_may_not_write_while_another_writes(forbidden):
    forbidden.chmod(0o755)
    open_log = sqlite3.connect(forbidden / "results.sqlite")
    open_log.execute("SELECT * FROM rows").fetchall()
    pk.Store(forbidden / "results.sqlite").put("b", {"is": "b"})
    forbidden.chmod(0o555)
    assert (forbidden / "results.sqlite-wal").stat().st_size
    code = "print(Store(path, readonly=True).get(['a', 'b']))"
    assert ordinary_person(forbidden, code) == "{'a': {'is': 'a'}, 'b': {'is': 'b'}}\n"
    open_log.close()


def test_a_log_that_cannot_be_read_is_not_passed_over(forbidden):
    path = forbidden / "results.sqlite"
    open_log = sqlite3.connect(path)
    open_log.execute("SELECT * FROM rows").fetchall()
    pk.Store(path).put("b", {"is": "b"})
    log = (forbidden / "results.sqlite-wal").read_bytes()
    open_log.close()
    path.with_name("results.sqlite-wal").write_bytes(log)  # as if copied, without the third file
    forbidden.chmod(0o555)
    said = ordinary_person(forbidden, "print(Store(path, readonly=True).get(['a', 'b']))")
    assert "copy it with a -wal file beside it to a new folder" in said
