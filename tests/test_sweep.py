"""Sweeps: every row once, in order, kept whatever happens."""

import multiprocessing
import warnings
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor

import pandas as pd
import pytest
import torch

import perpkit as pk
from perpkit.experiments import sweep as sweeping
from perpkit.experiments.sweep import Cancelled, run

SHORT = {"length": 16, "steps": 2, "batch": 2}
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

    monkeypatch.setattr(sweeping, "run", cheap)
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


# --- interruptions --------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
def test_an_interrupted_sweep_keeps_its_rows_and_goes_on_from_there(store, ran, monkeypatch, error):
    grid = pk.Grid(sparsity=[0.1, 0.2, 0.3, 0.4])
    cheap = sweeping.run

    def fails_at_the_third(experiment, cancelled=None):
        if len(ran) == 2:
            raise error
        return cheap(experiment, cancelled)

    with monkeypatch.context() as failing:
        failing.setattr(sweeping, "run", fails_at_the_third)
        with pytest.raises(type(error)):
            sweep(grid, store)
    kept = store.get(e.key() for e in grid)
    assert sorted(row["sparsity"] for row in kept.values()) == [0.1, 0.2]
    results = sweep(grid, store)
    assert ran == [0.1, 0.2, 0.3, 0.4]
    assert list(results.sparsity) == [0.1, 0.2, 0.3, 0.4]


def test_cancel_takes_effect_within_one_training_step(store, monkeypatch):
    done = []
    retrain = sweeping.retrain
    monkeypatch.setattr(
        sweeping,
        "retrain",
        lambda *args, **kwargs: retrain(*args, **kwargs, on_step=lambda step, loss: done.append(step)),
    )
    grid = pk.Grid(retrain="biases", length=16, steps=50, batch=2)
    with pytest.raises(Cancelled):
        sweep(grid, store, cancelled=lambda: len(done) >= 3)
    assert done == [1, 2, 3]
    assert store.get(e.key() for e in grid) == {}


def test_cancel_during_the_evaluation_keeps_no_row(store, monkeypatch):
    evaluating = []
    perplexity = sweeping.perplexity

    def watched(*args, **kwargs):
        evaluating.append(True)
        return perplexity(*args, **kwargs)

    run(pk.Experiment(length=16))  # the dense model is measured before
    monkeypatch.setattr(sweeping, "perplexity", watched)
    grid = pk.Grid(length=16)
    with pytest.raises(Cancelled):
        sweep(grid, store, cancelled=lambda: bool(evaluating))
    assert store.get(e.key() for e in grid) == {}


def test_a_cancelled_sweep_keeps_the_rows_before(store, ran, monkeypatch):
    cheap = sweeping.run

    def obedient(experiment, cancelled):
        if cancelled():
            raise Cancelled
        return cheap(experiment)

    monkeypatch.setattr(sweeping, "run", obedient)
    grid = pk.Grid(sparsity=[0.1, 0.2, 0.3, 0.4])
    with pytest.raises(Cancelled):
        sweep(grid, store, cancelled=lambda: len(ran) == 2)
    assert len(store.get(e.key() for e in grid)) == 2


class LastFirst(ThreadPoolExecutor):
    """An executor that has finished the last experiment and not yet begun the others."""

    def __init__(self, ready: int):
        super().__init__(1)
        self.ready, self.futures = ready, []

    def submit(self, function, experiment):
        future = Future()
        self.futures.append(future)
        if len(self.futures) == self.ready:
            future.set_result(function(experiment))
        return future


def test_cancelling_on_an_executor_keeps_what_is_finished_and_withdraws_the_rest(store, ran):
    grid = pk.Grid(sparsity=[0.1, 0.2, 0.3])
    executor = LastFirst(3)
    with pytest.raises(Cancelled):
        sweep(grid, store, executor=executor, cancelled=lambda: True)
    assert [row["sparsity"] for row in store.get(e.key() for e in grid).values()] == [0.3]
    assert [future.cancelled() for future in executor.futures] == [True, True, False]


def test_a_failure_on_an_executor_withdraws_the_rest(store, monkeypatch):
    def fails(experiment, cancelled=None):
        raise ValueError("the third wheel")

    monkeypatch.setattr(sweeping, "run", fails)
    executor = ThreadPoolExecutor(1)
    with executor, pytest.raises(ValueError, match="the third wheel"):
        sweep(pk.Grid(sparsity=[0.1, 0.2, 0.3]), store, executor=executor)


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
    assert [*experiments[0].asdict()] == list(real.columns)[:10]
    for name in ("model", "criterion", "sparsity", "retrain", "steps", "batch", "lr", "seed"):
        assert list(real[name]) == [getattr(e, name) for e in experiments]
    assert real.protocol.unique().tolist() == ["storyworld (seed 0), test split, 160 windows of 16 tokens"]
    assert real.dense_perplexity.nunique() == real.floor.nunique() == 1
    assert (real.floor < real.dense_perplexity).all()
    assert (real.seconds > 0).all()


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
    pd.testing.assert_frame_equal(results.drop(columns="seconds"), real.drop(columns="seconds"))


def test_the_dense_model_is_the_same_after_every_row(real, store):
    real_files = pk.Experiment(length=16).files()
    dense, _, measured = sweeping._dense("tiny-opt", "storyworld", 16, real_files)
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    sweep(pk.Grid(retrain=["full", "head"], **SHORT), store)
    for name, tensor in dense.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert measured == real.dense_perplexity[0]


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
    same = real.columns.difference([*columns, "seconds"], sort=False)
    pd.testing.assert_frame_equal(results[same], real[same])


def test_weights_that_change_on_disk_are_loaded_again(tmp_path, store):
    folder = tmp_path / "model"
    model, tokenizer = pk.load_model("tiny-opt", device="cpu")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    grid = pk.Grid(model=str(folder), sparsity=0.0, length=16)
    before = pk.sweep(grid, store=store, progress=False)
    pk.prune(model, "magnitude", sparsity=0.7)
    model.save_pretrained(folder)
    after = pk.sweep(grid, store=store, progress=False)
    assert after.perplexity[0] > 2 * before.perplexity[0]
