"""The store's table and its export: all rows, those asked for, and files that are whole."""

import math

import numpy as np
import pandas as pd
import pytest

import perpkit as pk


@pytest.fixture
def store(tmp_path):
    store = pk.Store(tmp_path / "results.sqlite")
    store.put("a", {"criterion": "wanda", "sparsity": 0.5, "pattern": None, "perplexity": 2.0, "error": None})
    store.put(
        "b",
        {"criterion": "wanda", "sparsity": 0.7, "pattern": "2:4", "perplexity": math.nan, "ladder": [1, 2]},
    )
    store.put(
        "c", {"criterion": "magnitude", "sparsity": 0.5, "error": "ValueError: no", "traceback": "line 1"}
    )
    store.put("d", {"criterion": "magnitude", "sparsity": 1, "perplexity": math.inf, "new": 1})
    return store


def keys(table):
    return table.key.tolist()


def test_failed_chooses_the_rows_and_the_traceback(store):
    assert keys(store.table()) == ["a", "b", "d"]
    assert keys(store.table(failed=True)) == ["c"]
    assert keys(store.table(failed=None)) == ["a", "b", "c", "d"]
    assert "traceback" not in store.table()
    assert store.table(failed=True).traceback.tolist() == ["line 1"]
    assert store.table(failed=None).traceback.dropna().tolist() == ["line 1"]


def test_a_traceback_of_a_finished_row_is_not_shown(store):
    store.put("e", {"error": None, "traceback": None})
    assert "traceback" not in store.table()
    assert "traceback" in store.table(failed=None)


def test_the_columns_are_the_stores_own_then_the_rows_as_they_came(store):
    own = ["key", "finished", "criterion", "sparsity", "pattern", "perplexity", "error"]
    assert list(store.table()) == [*own, "ladder", "new"]
    assert store.table().perplexity.tolist() == pytest.approx([2.0, math.nan, math.inf], nan_ok=True)
    assert store.table().new.isna().tolist() == [True, True, False]


@pytest.mark.parametrize(
    ("where", "found"),
    [
        ({"criterion": "wanda"}, "ab"),
        ({"criterion": ["wanda", "magnitude"]}, "abd"),
        ({"criterion": "wanda", "sparsity": 0.7}, "b"),
        ({"sparsity": (0.5, 0.7)}, "ab"),
        ({"sparsity": np.array([0.7, 1.0])}, "bd"),
        ({"sparsity": np.float64(0.7)}, "b"),
        ({"sparsity": {0.5}}, "a"),
        ({"sparsity": range(3)}, "d"),
        ({"sparsity": "0.5"}, ""),
        ({"sparsity": []}, ""),
        ({"pattern": None}, "ad"),
        ({"pattern": [None, "2:4"]}, "abd"),
        ({"perplexity": math.nan}, "b"),
        ({"perplexity": math.inf}, "d"),
        ({"ladder": [(1, 2)]}, "b"),
        ({"key": ["a", "d"]}, "ad"),
        ({"traceback": "line 1"}, ""),
        ({}, "abd"),
    ],
)
def test_where_takes_the_rows_with_one_of_the_values(store, where, found):
    table = store.table(where)
    assert keys(table) == list(found)
    assert list(table) == list(store.table())
    assert table.index.tolist() == list(range(len(found)))


def test_where_also_chooses_failed_rows(store):
    assert keys(store.table({"sparsity": 0.5}, failed=None)) == ["a", "c"]
    assert keys(store.table({"sparsity": 0.5}, failed=True)) == ["c"]


def test_an_unknown_column_is_refused_with_those_there_are(store):
    with pytest.raises(
        ValueError, match="no column 'sparsty'; it has criterion, error, finished, key, ladder, new,"
    ):
        store.table({"criterion": "wanda", "sparsty": 0.5})


def test_an_empty_store_is_an_empty_table(tmp_path):
    table = pk.Store(tmp_path / "empty.sqlite").table({"sparsity": 0.5})
    assert (len(table), list(table)) == (0, ["key", "finished"])


def test_csv_holds_the_finished_rows(store, tmp_path):
    store.export(tmp_path / "deep" / "rows.csv")
    read = pd.read_csv(tmp_path / "deep" / "rows.csv")
    assert list(read) == list(store.table())
    assert keys(read) == ["a", "b", "d"]
    assert read.perplexity.tolist() == pytest.approx([2.0, math.nan, math.inf], nan_ok=True)


def test_parquet_holds_the_table_it_is_given(store, tmp_path):
    table = store.table({"criterion": "magnitude"}, failed=None)[["key", "sparsity", "perplexity", "error"]]
    store.export(str(tmp_path / "rows.PARQUET"), table)
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "rows.PARQUET"), table)


@pytest.mark.parametrize("name", ["rows.xlsx", "rows", "csv", ".csv"])
def test_another_suffix_is_refused(store, tmp_path, name):
    with pytest.raises(ValueError, match=r"name a file that ends in \.csv or \.parquet") as error:
        store.export(tmp_path / name)
    assert name in str(error.value)
    assert not (tmp_path / name).exists()


class Broken(pd.DataFrame):
    """A table whose disk fills up half way."""

    def to_csv(self, file, **options):
        file.write(b"key,fini")
        raise OSError(28, "No space left on device")


def test_a_failed_export_leaves_the_old_file_and_nothing_beside_it(store, tmp_path):
    target = tmp_path / "out" / "rows.csv"
    store.export(target)
    before = target.read_bytes()
    with pytest.raises(ValueError, match=r"cannot write .*rows.csv.*No space left"):
        store.export(target, Broken())
    assert target.read_bytes() == before
    assert [file.name for file in target.parent.iterdir()] == ["rows.csv"]


def test_the_old_file_is_there_until_the_new_one_is_whole(store, tmp_path):
    target = tmp_path / "rows.csv"
    store.export(target)
    before, seen = target.read_bytes(), []

    class Slow(pd.DataFrame):
        def to_csv(self, file, **options):
            super().to_csv(file, **options)
            seen.append(target.read_bytes())

    with target.open("rb") as old:  # a reader who has begun goes on with the old one
        store.export(target, Slow({"only": [1]}))
        assert seen == [before]
        assert old.read() == before
    assert target.read_text() == "only\n1\n"


def test_a_table_that_parquet_cannot_hold_is_a_sentence(store, tmp_path):
    with pytest.raises(ValueError, match=r"\.parquet cannot hold this table, export to \.csv"):
        store.export(tmp_path / "rows.parquet", pd.DataFrame({"lr": [0.1, "auto"]}))
    assert not list(tmp_path.glob("*rows*"))


def test_a_folder_in_the_place_of_an_export_is_a_sentence(store, tmp_path):
    (tmp_path / "rows.csv").mkdir()
    (tmp_path / "file").touch()
    for target in (tmp_path / "rows.csv", tmp_path / "file" / "rows.csv"):
        with pytest.raises(ValueError, match="cannot write"):
            store.export(target)
    assert not list(tmp_path.glob(".rows*"))
