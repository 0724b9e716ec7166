"""The demonstration on a small grid: its files, its table and its sentence."""

import pandas as pd
import pytest

import perpkit as pk
from perpkit import demo
from perpkit.experiments import run as running

SPARSITIES = [0.5, 0.7]
RETRAININGS = ["none", "biases+norms", "full"]


def made_row(experiment) -> dict:
    trained = experiment.retrain != "none"
    return {
        **experiment.asdict(),
        "perplexity": (3 if trained else 30) * experiment.sparsity
        + experiment.seed
        + (experiment.retrain == "full"),
        "dense_perplexity": 2.0,
        "floor": 1.5,
        "trainable_share": {"none": 0.0, "biases+norms": 0.0123, "full": 1.0}[experiment.retrain],
        "seconds": 1.0,
        "protocol": "a story, 3 windows of 4 tokens",
    }


@pytest.fixture
def ran(monkeypatch):
    """A small grid whose runs cost nothing, and no notebook."""
    listed = []

    def run(experiment, cancelled=None):
        listed.append(experiment)
        return made_row(experiment)

    monkeypatch.setattr(running, "run", run)
    monkeypatch.setattr(
        demo, "demo_grid", lambda: pk.Grid(sparsity=SPARSITIES, retrain=RETRAININGS, steps=2, seed=range(3))
    )
    monkeypatch.setattr(demo, "_execute_notebook", lambda out, store: None)
    return listed


@pytest.fixture
def printed(ran, tmp_path, capsys) -> str:
    demo.run_demo(tmp_path / "out", None)
    return capsys.readouterr().out


def test_the_figure_is_written_in_every_format_and_named(printed, tmp_path):
    for suffix, start in {"pdf": b"%PDF", "png": b"\x89PNG", "svg": b"<?xml"}.items():
        file = tmp_path / "out" / f"perplexity_by_sparsity.{suffix}"
        assert file.read_bytes().startswith(start)
        assert str(file) in printed


def test_the_table_holds_the_numbers_of_the_figure(printed, tmp_path):
    table = pd.read_csv(tmp_path / "out" / "perplexity_by_sparsity.csv", comment="#")
    assert str(tmp_path / "out" / "perplexity_by_sparsity.csv") in printed
    assert set(table.retrain) == set(RETRAININGS)
    assert set(table.sparsity) == set(SPARSITIES)


def test_the_table_is_printed_with_mean_deviation_and_share(printed):
    lines = {line.split("  ")[0]: line.split() for line in printed.splitlines()}
    assert lines["none"][1:] == ["0.00%", "15.00", "21.00"]
    assert lines["biases+norms"][1:] == ["1.23%", "2.50", "±", "1.00", "3.10", "±", "1.00"]
    assert lines["full"][1:] == ["100.00%", "3.50", "±", "1.00", "4.10", "±", "1.00"]
    assert "dense model 2.00, best possible 1.50" in printed
    assert "Perplexity on a story, 3 windows of 4 tokens" in printed


def test_the_sentence_says_what_was_seen(printed):
    assert (
        "At 50 % sparsity perplexity goes from 2.00 to 15.00, and retraining 1.2% of the parameters (biases "
        "and normalisations) brings it back to 2.50; at 70 % it goes to 21.0, those few reach 3.10 and all "
        "the weights 4.10."
    ) in " ".join(printed.split())


@pytest.mark.parametrize("columns", [40, 80, 300])
def test_no_word_of_the_sentence_is_broken_by_the_terminal(ran, tmp_path, capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    demo.run_demo(tmp_path / "out", None)
    said = capsys.readouterr().out
    sentence = said[said.index("At 50 %") : said.index("Figure and table")].splitlines()
    assert max(map(len, sentence)) <= min(100, columns)


def test_the_next_demonstration_runs_nothing_again(ran, tmp_path, capsys):
    demo.run_demo(tmp_path / "out", None)
    first = capsys.readouterr().out
    assert len(ran) == 14
    demo.run_demo(tmp_path / "out", None)
    assert len(ran) == 14
    table = [line for line in first.splitlines() if "±" in line]
    again = capsys.readouterr().out.splitlines()
    assert table
    assert [line for line in again if "±" in line] == table


def test_the_notebook_gets_the_rows_of_the_demonstration(ran, tmp_path, monkeypatch, capsys):
    given = []

    def execute(out, store):
        given.append((out, store.path, len(store.get(e.key() for e in demo.demo_grid()))))
        return out / "00_start_here.ipynb"

    monkeypatch.setattr(demo, "_execute_notebook", execute)
    out = tmp_path / "out"
    demo.run_demo(out, None)
    assert given == [(out, out / "results.sqlite", 14)]
    said = capsys.readouterr().out
    assert str(out / "00_start_here.ipynb") in said
    assert str(out / "00_start_here.html") in said


def test_a_notebook_that_fails_is_told_with_what_there_is(tmp_path, monkeypatch):
    def execute(notebook, folder, store):
        raise ValueError("CellExecutionError: the dog ate it")

    monkeypatch.setattr(demo, "execute_notebook", execute)
    with pytest.raises(ValueError, match="the dog ate it") as error:
        demo._execute_notebook(tmp_path, pk.Store(tmp_path / "results.sqlite"))
    assert "00_start_here.ipynb could not be executed" in str(error.value)
    assert str(tmp_path) in str(error.value)


def test_the_whole_grid_holds_what_the_sentence_needs():
    experiments = list(demo.demo_grid())
    points = {(e.retrain, e.sparsity) for e in experiments}
    assert {(retrain, sparsity) for retrain in RETRAININGS for sparsity in SPARSITIES} <= points
    assert {e.seed for e in experiments if e.retrain != "none"} == {0, 1, 2}
