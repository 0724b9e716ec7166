"""Sweeps: every row once, in order, and what it holds."""

import multiprocessing
import warnings
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import pandas as pd
import pytest
import torch

import perpkit as pk
from perpkit.experiments import run as running
from perpkit.experiments.experiment import RESULT_FORMAT
from perpkit.experiments.run import run

SHORT = {"length": 16, "steps": 2, "batch": 2}
COST = ["seconds", "seconds_prune", "seconds_retrain", "seconds_measure", "tokens_per_second", "peak_memory"]
REAL = {"sparsity": [0.6, 0.3], "retrain": ["none", "biases", "full"], **SHORT}


@pytest.fixture
def store(tmp_path):
    return pk.Store(tmp_path / "results.sqlite")


def made_row(experiment) -> dict:
    return {**experiment.asdict(), "perplexity": 2 + experiment.sparsity + experiment.seed}


@pytest.fixture
def ran(monkeypatch):
    """Runs cost nothing and are listed by sparsity."""
    listed = []

    def cheap(experiment, cancelled=None):
        listed.append(experiment.sparsity)
        return made_row(experiment)

    monkeypatch.setattr(running, "run", cheap)
    return listed


def sweep(grid, store, **options) -> pd.DataFrame:
    return pk.sweep(grid, store=store, progress=False, **options)


# --- which rows are run ---------------------------------------------------------------------------


def test_rows_come_in_the_order_of_the_grid_whatever_was_there_before(store, ran):
    sweep(pk.Grid(sparsity=[0.4, 0.2]), store)
    results = sweep(pk.Grid(sparsity=[0.3, 0.2, 0.5, 0.4]), store)
    assert list(results.sparsity) == [0.3, 0.2, 0.5, 0.4]
    assert list(results.perplexity) == pytest.approx([2.3, 2.2, 2.5, 2.4])


def test_finished_rows_are_not_run_again(store, ran):
    first = sweep(pk.Grid(sparsity=[0.4, 0.2]), store)
    assert ran == [0.4, 0.2]
    again = sweep(pk.Grid(sparsity=[0.4, 0.2]), store)
    assert ran == [0.4, 0.2]
    pd.testing.assert_frame_equal(first, again)
    sweep(pk.Grid(sparsity=[0.2, 0.3, 0.4]), store)
    assert ran == [0.4, 0.2, 0.3]


def test_a_store_may_be_named_by_its_path_or_by_the_environment(tmp_path, ran):
    sweep(pk.Grid(), tmp_path / "one.sqlite")
    sweep(pk.Grid(), str(tmp_path / "one.sqlite"))
    assert len(ran) == 1
    sweep(pk.Grid(), None)
    sweep(pk.Grid(), None)
    assert len(ran) == 2


def test_an_experiment_listed_twice_is_run_once_and_returned_twice(store, ran):
    results = sweep([pk.Experiment(sparsity=0.4), pk.Experiment(sparsity=0.4)], store)
    assert ran == [0.4]
    assert list(results.sparsity) == [0.4, 0.4]


def test_on_row_is_told_of_each_new_row_after_it_is_kept(store, ran):
    told = []

    def on_row(row):
        assert row in store.get(e.key() for e in grid).values()
        told.append(row["sparsity"])

    sweep(pk.Grid(sparsity=[0.2]), store)
    grid = pk.Grid(sparsity=[0.5, 0.2, 0.3])
    sweep(grid, store, on_row=on_row)
    assert told == [0.5, 0.3]


def test_the_bar_starts_at_the_rows_that_are_there(store, ran, capsys):
    sweep(pk.Grid(sparsity=[0.2]), store)
    pk.sweep(pk.Grid(sparsity=[0.2, 0.3, 0.4]), store=store)
    bar = capsys.readouterr().err
    assert "1/3" in bar
    assert "3/3" in bar
    sweep(pk.Grid(sparsity=[0.5]), store)
    assert capsys.readouterr().err == ""


def test_the_bar_names_the_row_that_takes_long(store, monkeypatch, capsys):
    monkeypatch.setattr("perpkit.experiments.progress.SECONDS_BETWEEN_NEWS", 0)
    grid = pk.Grid(sparsity=[0.3], retrain="biases", steps=2) + pk.Grid(criterion="wanda", pattern="2:4")
    pk.sweep(grid, store=store)
    bar = capsys.readouterr().err
    for place, row in (("0/2", "now: magnitude 30 %, biases, seed 0"), ("1/2", "now: wanda 2:4, seed 0")):
        assert row in bar
        assert place in bar.partition(row)[0].rpartition("\r")[2]
    # Nothing is in work any more.
    assert "now: " not in bar.rpartition("2/2")[2]


def test_an_executor_gets_only_the_missing_rows_and_the_order_is_the_grid_s(store, ran):
    sweep(pk.Grid(sparsity=[0.2]), store)
    told = []
    with ThreadPoolExecutor(3) as executor:
        results = sweep(
            pk.Grid(sparsity=[0.5, 0.2, 0.3, 0.4]),
            store,
            executor=executor,
            on_row=lambda row: told.append(row),
        )
    assert sorted(ran) == [0.2, 0.3, 0.4, 0.5]
    assert sorted(row["sparsity"] for row in told) == [0.3, 0.4, 0.5]
    assert list(results.sparsity) == [0.5, 0.2, 0.3, 0.4]


# --- real rows ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A small grid really run, here, one row after the other."""
    return sweep(pk.Grid(**REAL), tmp_path_factory.mktemp("store") / "results.sqlite")


def test_a_row_holds_the_inputs_and_what_was_measured(real):
    experiments = list(pk.Grid(**REAL))
    assert [*experiments[0].asdict()] == list(real.columns)[:25]
    for name in ("model", "criterion", "sparsity", "retrain", "steps", "batch", "lr", "seed"):
        assert list(real[name]) == [getattr(e, name) for e in experiments]
    assert real.protocol.unique().tolist() == ["storyworld (seed 0), test split, 160 windows of 16 tokens"]
    assert real.dense_perplexity.nunique() == real.floor.nunique() == 1
    assert (real.floor < real.dense_perplexity).all()
    assert (real.seconds > 0).all()
    assert (real.seconds == real.seconds_prune + real.seconds_retrain).all()
    trained = real.retrain != "none"
    assert (real.seconds_retrain > 0).tolist() == trained.tolist()
    tokens = real.steps * real.batch * 16
    assert (real.tokens_per_second * real.seconds_retrain)[trained].tolist() == pytest.approx(
        tokens[trained].tolist()
    )
    assert real.tokens_per_second[~trained].isna().all()
    assert (real.peak_memory > 1e6).all()
    assert real.reached_sparsity.tolist() == pytest.approx(real.sparsity.tolist(), abs=1e-4)
    assert real.error.isna().all()


def test_whoever_changes_the_columns_of_a_row_raises_the_result_format(real):
    columns = [*pk.Experiment().asdict()]
    measured = (
        "perplexity dense_perplexity floor reached_sparsity trainable_share checkpointing seconds "
        "seconds_prune seconds_retrain seconds_measure tokens_per_second peak_memory device protocol error"
    ).split()
    assert (RESULT_FORMAT, len(columns), list(real.columns)) == (5, 25, columns + measured)


def test_a_row_is_what_the_calls_of_a_notebook_give(real):
    model, tokenizer = pk.load_model("tiny-opt")
    text = pk.load_text("storyworld", tokenizer, length=16)
    assert real.floor[0] == text.floor
    assert real.dense_perplexity[0] == pytest.approx(pk.perplexity(model, text.test), rel=1e-6)
    row = real[(real.sparsity == 0.6) & (real.retrain == "biases")].iloc[0]
    masks = pk.prune(model, "magnitude", sparsity=0.6)
    pruned = real[(real.sparsity == 0.6) & (real.retrain == "none")].iloc[0]
    assert pruned.perplexity == pytest.approx(pk.perplexity(model, text.test), rel=1e-6)
    assert pruned.trainable_share == 0
    assert row.trainable_share == pk.trainable_share(model, "biases")
    pk.retrain(
        model, text.train, masks=masks, subset="biases", steps=2, lr=row.lr, batch=2, seed=0, progress=False
    )
    assert row.perplexity == pytest.approx(pk.perplexity(model, text.test), rel=1e-6)
    assert row.perplexity != pytest.approx(pruned.perplexity, rel=1e-6)


def test_threads_give_the_same_rows(real, store):
    with ThreadPoolExecutor(2) as executor:
        results = sweep(pk.Grid(**REAL), store, executor=executor)
    pd.testing.assert_frame_equal(results.drop(columns=COST), real.drop(columns=COST))


def test_the_dense_model_is_the_same_after_every_row(real, store):
    dense = running._loaded(pk.Experiment(length=16), None)
    before = {name: tensor.clone() for name, tensor in dense.model.state_dict().items()}
    sweep(pk.Grid(retrain=["full", "head"], **SHORT), store)
    for name, tensor in dense.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert dense is running._loaded(pk.Experiment(length=16), None)


def test_a_seed_gives_its_row_and_another_seed_another(store, generators_unchanged):
    first = run(pk.Experiment(retrain="biases", seed=1, **SHORT))
    again = run(pk.Experiment(retrain="biases", seed=1, **SHORT))
    other = run(pk.Experiment(retrain="biases", seed=2, **SHORT))
    assert first["perplexity"] == again["perplexity"] != other["perplexity"]


def test_the_head_is_counted_as_a_matrix_of_its_own(store):
    row = run(pk.Experiment(retrain="head", **SHORT))
    model, _ = pk.load_model("tiny-opt")
    pk.untie_head(model)
    assert row["trainable_share"] == pk.trainable_share(model, "head")


@pytest.mark.slow
def test_worker_processes_give_the_same_rows(real, store):
    with warnings.catch_warnings(), ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as executor:
        results = sweep(pk.Grid(**REAL), store, executor=executor)
    columns = ["perplexity", "dense_perplexity", "floor"]
    # Another number of threads may add in another order.
    pd.testing.assert_frame_equal(results[columns], real[columns], rtol=1e-4)
    same = real.columns.difference([*columns, *COST, "device"], sort=False)
    pd.testing.assert_frame_equal(results[same], real[same])


def test_weights_that_change_on_disk_are_loaded_again(tmp_path, store):
    folder = tmp_path / "model"
    model, tokenizer = pk.load_model("tiny-opt", device="cpu")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    grid = pk.Grid(model=str(folder), sparsity=0.0, length=16)
    before = pk.sweep(grid, store=store, progress=False)
    with torch.no_grad():
        model.model.decoder.layers[0].fc1.weight.neg_()
    model.save_pretrained(folder)
    after = pk.sweep(grid, store=store, progress=False)
    assert after.perplexity[0] > 2 * before.perplexity[0]


def test_calibrated_criteria_see_the_calibration_text(store):
    results = pk.sweep(
        pk.Grid(criterion=["magnitude", "wanda", "sparsegpt"], sparsity=0.5), store=store, progress=False
    )
    reached = results.set_index("criterion")["perplexity"]
    assert reached["sparsegpt"] < reached["wanda"] < reached["magnitude"]
