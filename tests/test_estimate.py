"""What a grid costs before it runs: counted rows, and times that follow from what is known."""

import pytest

import perpkit as pk
from perpkit.experiments import estimate as estimating
from perpkit.experiments.estimate import Estimate

SHORT = {"length": 16, "batch": 2}


@pytest.fixture
def store(tmp_path):
    return pk.Store(tmp_path / "results.sqlite")


def test_rows_are_counted_by_what_the_store_holds(store):
    grid = pk.Grid(sparsity=[0.1, 0.2, 0.3, 0.4], length=16)
    pk.sweep(pk.Grid(sparsity=[0.1, 0.2], length=16), store=store, progress=False)
    failed = list(grid)[2]
    store.put(failed.key(), {**failed.asdict(), "error": "ValueError: no"})
    found = grid.estimate(store)
    assert (found.rows, found.finished, found.failed, found.left) == (4, 2, 1, 1)
    assert 0 < found.seconds < 60


def test_rows_like_it_in_the_store_tell_the_time(store, monkeypatch):
    monkeypatch.setattr(estimating, "run", None)  # nothing is tried
    known = pk.Grid(retrain="biases", steps=10, **SHORT)
    row = pk.sweep(known, store=store, progress=False).iloc[0]
    key = next(iter(known)).key()
    times = {"seconds": 7.0, "seconds_retrain": 5.0, "seconds_measure": 3.0}
    store.put(key, {**row.to_dict(), "rank": None, **{n: None for n in row.index[row.isna()]}, **times})
    # Two pruned models of 2 s; four rows measured in 3 s; half a second a step.
    grid = pk.Grid(retrain="biases", steps=100, sparsity=[0.6, 0.7], seed=range(2), **SHORT)
    assert grid.estimate(store).seconds == pytest.approx(2 * 2 + 4 * (3 + 100 * 0.5))


def test_what_is_not_known_is_tried_with_few_steps_and_not_kept(store, monkeypatch):
    tried = []
    run = estimating.run
    monkeypatch.setattr(estimating, "run", lambda e: tried.append(e) or run(e))
    grid = pk.Grid(retrain=["none", "biases"], steps=1000, sparsity=[0.6, 0.7], seed=range(2), **SHORT)
    found = grid.estimate(store)
    assert [(e.retrain, e.steps) for e in tried] == [("none", 0), ("biases", 1), ("biases", 4)]
    assert store.table(failed=None).empty
    assert found.seconds > 1


def test_the_first_step_of_all_does_not_tell_how_long_others_take(store, monkeypatch):
    """It loads and prepares what later ones find."""
    times = iter([50.0, 2.0])

    def slow_at_first(experiment):
        spent = next(times)
        told = {"seconds": 3 + spent, "seconds_retrain": spent, "seconds_measure": 1.0}
        return {**told, "steps": experiment.steps}

    monkeypatch.setattr(estimating, "run", slow_at_first)
    grid = pk.Grid(retrain="biases", steps=100, **SHORT)
    assert grid.estimate(store).seconds == pytest.approx(3 + 1 + 100 * 2 / 4)


def test_a_text_that_is_not_there_is_refused_before_anything_is_tried(store, monkeypatch):
    monkeypatch.setattr(estimating, "run", None)
    with pytest.raises(ValueError, match=r"unknown text 'storyword'; did you mean 'storyworld'"):
        pk.Grid(text="storyword").estimate(store)


def test_other_settings_are_another_kind(store, monkeypatch):
    pk.sweep(pk.Grid(retrain="biases", steps=2, **SHORT), store=store, progress=False)
    tried = []
    run = estimating.run
    monkeypatch.setattr(estimating, "run", lambda e: tried.append(e) or run(e))
    pk.Grid(retrain="norms", steps=2, **SHORT).estimate(store)
    pk.Grid(retrain="biases", steps=2, **{**SHORT, "batch": 4}).estimate(store)
    pk.Grid(retrain="biases", steps=3, **SHORT).estimate(store)
    assert [(e.retrain, e.batch) for e in tried] == [("norms", 2), ("norms", 2), ("biases", 4), ("biases", 4)]


def test_a_finished_grid_costs_nothing(store, monkeypatch):
    grid = pk.Grid(length=16)
    pk.sweep(grid, store=store, progress=False)
    monkeypatch.setattr(estimating, "run", None)
    assert grid.estimate(store) == Estimate(1, 1, 0, 0, 0.0)
    assert str(grid.estimate(store)) == "1 row: 1 finished, 0 left"


@pytest.mark.parametrize(("seconds", "words"), [(42, "42 s"), (90, "1.5 min"), (9000, "2.5 h")])
def test_times_are_spoken(seconds, words):
    assert str(Estimate(9, 2, 1, 6, seconds)) == f"9 rows: 2 finished, 1 failed, 6 left, about {words}"


def test_a_model_that_cannot_be_loaded_is_an_error(store):
    with pytest.raises(ValueError, match="there is no folder"):
        pk.Grid(model="./nowhere").estimate(store)


def test_rows_of_an_older_format_neither_stop_nor_spoil_the_estimate(store, monkeypatch):
    known = next(iter(pk.Grid(retrain="biases", steps=10, **SHORT)))
    row = pk.sweep([known], store=store, progress=False).iloc[0]
    told = {**row.to_dict(), **{n: None for n in row.index[row.isna()]}}
    told |= {"seconds": 7.0, "seconds_retrain": 5.0, "seconds_measure": 3.0}
    store.put(known.key(), told)
    store.put("no steps", {**told, "steps": None})
    store.put("no seconds", {name: told[name] for name in told if not name.startswith("seconds_")})
    monkeypatch.setattr(estimating, "run", None)  # nothing is tried
    grid = pk.Grid(retrain="biases", steps=20, **SHORT)
    assert grid.estimate(store).seconds == pytest.approx(2 + 3 + 20 * 0.5)


def test_rows_that_fail_when_tried_do_not_stop_the_estimate(store):
    grid = pk.Grid(retrain=["biases", "perp_v1:bn_recalibrate"], lr=0.1, steps=5, **SHORT)
    found = grid.estimate(store)
    assert found.left == 2
    assert found.seconds > 0
    with pytest.raises(ValueError, match="there is no folder"):
        pk.Grid(model="./nowhere").estimate(store)
