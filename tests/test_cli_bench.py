"""`perpkit bench`: what it prints, the file that it goes on with, and what it refuses."""

import json

import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from perpkit.cli import main
from perpkit.experiments.scale.files import COLUMNS, read_rows
from perpkit.experiments.scale.shapes import SHAPES
from perpkit.pruning.prune import prune

GIVEN = ("--model", "opt-125m", "--length", 8, "--samples", 2, "--steps", 1, "--device", "cpu")


@pytest.fixture(autouse=True)
def tiny_shape(monkeypatch):
    """Models that are made in a moment."""
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 99}
    opt = {**small, "ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 2048}
    monkeypatch.setitem(SHAPES, "opt-125m", ("opt", opt))
    monkeypatch.setitem(SHAPES, "opt-2.7b", ("opt", opt))


def call(*arguments):
    return CliRunner().invoke(main, ["bench", *map(str, arguments)])


def test_a_line_for_each_row_and_the_file(tmp_path):
    out = tmp_path / "new" / "rows.csv"
    given = ["--model", "opt-2.7b", "--random-weights", *GIVEN[2:], "--no-checkpointing", "--out", out]
    done = call(*given, "--methods", "biases+norms,perp,mask_lora,full")
    assert done.exit_code == 0, done.output
    first, full, few, perp, lora = done.stdout.splitlines()
    assert first.startswith("opt-2.7b, random weights, bfloat16, ")
    assert first.endswith(" GB of memory")
    assert full.startswith("full")
    assert "1.00 × full" in full
    assert few.endswith("(published 2.17)")
    assert perp.endswith("(published 1.83)")
    assert lora.startswith("mask_lora")
    assert lora.endswith(" × full")
    assert len(out.read_text().splitlines()) == 5


def test_scripts_get_a_document_in_which_counts_are_whole():
    done = call(*GIVEN, "--what", "train,prune,reconstruct", "--methods", "biases,wanda,sparsegpt", "--json")
    rows = json.loads(done.stdout)["rows"]
    assert [(row["what"], row["method"]) for row in rows] == [
        *[("train", "biases")] * 2,
        *(("prune", name) for name in ("wanda", "sparsegpt")),
        *(("reconstruct", name) for name in ("matrix", "submodule", "block")),
    ]
    assert [(row["batch"], row["samples"]) for row in rows] == [(2, None)] * 2 + [(None, 2)] * 5
    assert {type(row["device_memory"]) for row in rows} == {int}
    assert all(list(row) == list(COLUMNS) for row in rows)


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_second_run_goes_on_with_what_the_file_lacks(tmp_path, suffix):
    out = tmp_path / f"rows.{suffix}"
    assert call(*GIVEN, "--methods", "full", "--out", out).exit_code == 0
    before = read_rows(out)
    assert len(before) == 2
    done = call(*GIVEN, "--what", "train,prune", "--methods", "full,biases,wanda", "--out", out, "--json")
    assert done.exit_code == 0, done.output
    assert "has 2 rows, which are not measured again" in done.stderr
    after = read_rows(out)
    assert list(after.values())[:2] == list(before.values())
    rows = json.loads(done.stdout)["rows"]
    assert sorted(map(str, after.values())) == sorted(map(str, rows))
    assert [row["method"] for row in rows] == ["full", "biases"] * 2 + ["wanda"]
    assert rows[1]["ratio"] == rows[1]["tokens_per_second"] / rows[0]["tokens_per_second"]


def test_a_row_that_cannot_be_had_is_tried_again(monkeypatch, tmp_path):
    def short(pruned, criterion, **given):
        if criterion == "wanda":
            torch.empty(2**60)
        return prune(pruned, criterion, **given)

    out = tmp_path / "rows.csv"
    given = [*GIVEN, "--what", "prune", "--methods", "magnitude,wanda", "--out", out]
    with monkeypatch.context() as patched:
        patched.setattr("perpkit.experiments.scale.pruning.prune", short)
        done = call(*given)
    assert done.exit_code == 3
    assert done.stdout.splitlines()[2].split() == ["prune:", "wanda", "out", "of", "memory"]
    done = call(*given)
    assert done.exit_code == 0
    assert "has 1 row, which is not measured again" in done.stderr
    assert [row["error"] for row in read_rows(out).values()] == [None, None]


def test_a_file_that_cannot_be_used_is_refused_before_anything_is_measured(monkeypatch, tmp_path):
    measure = "perpkit.experiments.scale.throughput.measure"
    monkeypatch.setattr(measure, lambda *given: pytest.fail("measured"))
    (tmp_path / "file").write_text("")
    done = call(*GIVEN, "--out", tmp_path / "file" / "rows.csv")
    assert done.exit_code == 1
    assert "cannot write" in done.stderr
    (tmp_path / "folder.csv").mkdir()
    done = call(*GIVEN, "--out", tmp_path / "folder.csv")
    assert done.exit_code == 1
    assert "cannot read" in done.stderr
    other = tmp_path / "other.csv"
    for text in ("", "a,b\n1,2\n", ",".join(COLUMNS) + "\n" + "x," * (len(COLUMNS) - 1) + "\n"):
        other.write_text(text)
        done = call(*GIVEN, "--out", other)
        assert done.exit_code == 1
        assert "holds no rows of this version of perpkit bench, name another file" in done.stderr
        assert other.read_text() == text
    pd.DataFrame({"a": [1]}).to_parquet(tmp_path / "other.parquet")
    done = call(*GIVEN, "--out", tmp_path / "other.parquet")
    assert "holds no rows of this version" in done.stderr


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--model", "opt-3b"], "unknown shape 'opt-3b'"),
        (["--model", "opt-125m", "--what", "fly"], "--what is 'fly'; of train, prune, reconstruct"),
        (["--model", "opt-125m", "--methods", "bias"], "--methods is 'bias'; of full, biases"),
        (["--model", "opt-125m", "--methods", "wanda"], "--methods is 'wanda'; of full, biases"),
        (["--model", "opt-125m", "--dtype", "int8"], "unknown dtype 'int8'"),
        (["--model", "opt-125m", "--device", "tpu"], "unknown device 'tpu'"),
        (["--model", "opt-125m", "--layers", 13], "layers is 13; opt-125m has 2"),
        (["--model", "opt-125m", "--length", 2049, "--what", "prune"], "length is 2049; opt-125m has 2048"),
        (["--model", "opt-125m", "--length", 0], "length is 0; opt-125m has 2048 positions"),
        (["--model", "opt-125m", "--samples", 0, "--what", "prune"], "samples is 0; it must be at least 1"),
        (["--model", "opt-125m", "--batch", 0], "batch is 0; it must be at least 1"),
    ],
)
def test_bad_input_is_refused_in_words(given, said):
    done = call(*given)
    assert done.exit_code == 1
    assert said in done.stderr
