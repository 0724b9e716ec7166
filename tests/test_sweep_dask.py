"""A sweep on a dask cluster of real processes, one of which is killed."""

import os
import signal
import time

import pandas as pd
import pytest

import perpkit as pk

pytestmark = [
    pytest.mark.slow,
    # dask's own, when a worker is killed.
    pytest.mark.filterwarnings("ignore"),
]

GRID = {"sparsity": [0.3, 0.6], "retrain": ["none", "biases", "norms"], "seed": range(2)}
SHORT = {"length": 16, "steps": 20, "batch": 2}


def _die(*_) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture
def client(tmp_path):
    """Two worker processes on this machine."""
    from distributed import Client, LocalCluster

    cluster = LocalCluster(
        n_workers=2,
        threads_per_worker=1,
        processes=True,
        dashboard_address=None,
        local_directory=tmp_path / "dask",
    )
    with cluster, Client(cluster) as client:
        client.run(_one_thread)
        yield client


def test_the_rows_of_a_killed_worker_are_computed_by_the_others_and_every_row_once(client, tmp_path):
    told, killed = [], []

    def on_row(row):
        told.append((row["sparsity"], row["retrain"], row["seed"]))
        if not killed:
            victim = next(iter(client.run(os.getpid).values()))
            os.kill(victim, signal.SIGKILL)
            killed.append(victim)

    store = pk.Store(tmp_path / "results.sqlite")
    grid = pk.Grid(**GRID, **SHORT)
    results = pk.sweep(grid, store=store, executor=client.get_executor(), on_row=on_row, progress=False)
    assert killed
    assert killed[0] not in client.run(os.getpid).values()
    assert sorted(told) == sorted((e.sparsity, e.retrain, e.seed) for e in grid)
    assert len(store.table()) == len(results) == len(grid)
    assert results.error.isna().all()
    # Another number of threads may add in another order.
    here = pk.sweep(grid, store=tmp_path / "here.sqlite", progress=False)
    pd.testing.assert_series_equal(results.perplexity, here.perplexity, rtol=1e-4)


def test_cancelling_stops_the_rows_in_work_on_a_cluster(client, tmp_path):
    store = pk.Store(tmp_path / "results.sqlite")
    told = []
    grid = pk.Grid(retrain=["none", "biases"], length=16, steps=100_000, batch=2)
    with pytest.raises(pk.Cancelled):
        pk.sweep(
            grid,
            store=store,
            executor=client.get_executor(),
            on_row=told.append,
            cancelled=lambda: bool(told),
            progress=False,
        )
    assert [row["retrain"] for row in told] == ["none"]
    assert len(store.table(failed=None)) == 1
    # The one in work has seen the sign within a step: the workers are free.
    deadline = time.monotonic() + 60
    while any(client.processing().values()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(client.processing().values())
    assert list(tmp_path.glob("*.stop-*")) == []
    # The scheduler forgets a row that is withdrawn, whether it goes on or not: ask every worker for work.
    asked = [client.submit(os.getpid, workers=worker, pure=False) for worker in client.run(os.getpid)]
    assert len({each.result(timeout=30) for each in asked}) == 2


def test_a_row_that_kills_its_workers_is_a_failed_row(client, tmp_path):
    class Killing:
        """The cluster's executor, on which the row at one sparsity kills whoever computes it."""

        def submit(self, function, experiment, *arguments):
            function = _die if experiment.sparsity == 0.6 else function
            return client.get_executor().submit(function, experiment, *arguments)

    store = pk.Store(tmp_path / "results.sqlite")
    with pytest.warns(UserWarning, match="1 of 2 rows failed, the first with KilledWorker"):
        results = pk.sweep(
            pk.Grid(sparsity=[0.3, 0.6], length=16), store=store, executor=Killing(), progress=False
        )
    assert results.error.isna().tolist() == [True, False]
    assert store.table(failed=True).sparsity.tolist() == [0.6]
