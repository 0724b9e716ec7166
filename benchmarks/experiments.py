"""What the machinery of sweeps costs, what sharing saves, and whether a sweep survives being killed.

Bars in seconds are promises to a person at a laptop with two cores, so their references are those seconds.
The other references are the same rows computed here, side by side.
"""

import copy
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pandas as pd
import torch
from _bars import Bars

import perpkit as pk
from perpkit.experiments import run as running

MACHINERY_ROWS = 60
CACHED_ROWS = 1000
KILLS = 20
# What a sweep that is killed at random has to get through: rows of about a second.
KILLED_GRID = {
    "sparsity": [0.3, 0.4, 0.5, 0.6, 0.7],
    "retrain": ["none", "biases", "norms"],
    "seed": range(4),
    "steps": 40,
    "length": 64,
}


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def sweep(grid, store: Path, executor: Executor | None = None) -> pd.DataFrame:
    return pk.sweep(grid, store=store, executor=executor, progress=False)


def machinery(bars: Bars, folder: Path) -> None:
    """A sweep of cheap rows, against the bare calls."""
    grid = pk.Grid(sparsity=[i / (MACHINERY_ROWS + 1) for i in range(1, MACHINERY_ROWS + 1)], length=16)
    model, tokenizer = pk.load_model("tiny-opt")
    text = pk.load_text("storyworld", tokenizer, length=16)

    def bare() -> None:
        for experiment in grid:
            pruned = copy.deepcopy(model)
            pk.prune(pruned, "magnitude", sparsity=experiment.sparsity, progress=False)
            pk.perplexity(pruned, text.test)

    sweep(pk.Grid(sparsity=0.5, length=16), folder / "warm.sqlite")
    bare()
    turns = [(seconds(lambda i=i: sweep(grid, folder / f"{i}.sqlite")), seconds(bare)) for i in range(3)]  # type: ignore[misc]
    overhead = statistics.median(swept - direct for swept, direct in turns) / MACHINERY_ROWS
    bars.at_most("machinery of a sweep, beyond the work of a row", 1e3 * overhead, 20, 1, "ms")


def cached(bars: Bars, folder: Path) -> None:
    """A sweep whose rows are all there."""
    row: dict = sweep(pk.Grid(length=16), folder / "one.sqlite").to_dict("records")[0]
    store = pk.Store(folder / "cached.sqlite")
    axes = {"sparsity": [i / CACHED_ROWS for i in range(CACHED_ROWS // 2)], "length": [16, 32]}
    for experiment in pk.Grid(**axes):
        store.put(experiment.key(), row | experiment.asdict())
    taken = statistics.median(seconds(lambda: sweep(pk.Grid(**axes), store.path)) for _ in range(3))
    bars.at_most(f"a sweep of {CACHED_ROWS} cached rows", taken, 1.0, 1, "s")


def imports(bars: Bars) -> None:
    command = "import sys, perpkit; sys.exit('transformers' in sys.modules or 'torch' in sys.modules)"
    taken = statistics.median(
        seconds(lambda: subprocess.run([sys.executable, "-c", command], check=True)) for _ in range(3)
    )
    bars.at_most("import perpkit, without torch or transformers", taken, 2.0, 1, "s")


def sharing(bars: Bars, folder: Path) -> None:
    """Four retrainings, five sparsities, three seeds: one sweep, against a process for each row."""
    grid = pk.Grid(
        sparsity=[0.3, 0.4, 0.5, 0.6, 0.7], retrain=["none", "biases", "norms", "full"], seed=range(3)
    )
    running.forget()
    together = seconds(lambda: sweep(grid, folder / "together.sqlite"))
    in_one = 0.0
    # A third of the rows, taken alone, stand for all.
    some = list(grid)[::3]
    processes = 0.0
    for number, experiment in enumerate(some):
        running.forget()
        in_one += seconds(lambda e=experiment, n=number: sweep([e], folder / f"alone{n}.sqlite"))  # type: ignore[misc]
        inputs, store = experiment.asdict(), str(folder / f"process{number}.sqlite")
        words = (
            "import torch, perpkit as pk; torch.set_num_threads(1)\n"
            f"pk.sweep([pk.Experiment(**{inputs!r})], store={store!r}, progress=False)"
        )
        command = [sys.executable, "-c", words]
        processes += seconds(lambda command=command: subprocess.run(command, check=True))  # type: ignore[misc]
    processes, in_one = (len(grid) / len(some) * taken for taken in (processes, in_one))
    bars.at_most(f"{len(grid)} rows in one sweep, against a process each", together, processes, 0.6, "s")
    print(f"  (in one process that forgets between rows: {in_one:.0f} s, ratio {together / in_one:.2f})")


def _one_thread() -> None:
    torch.set_num_threads(1)


def workers(bars: Bars, folder: Path) -> None:
    """Rows each second of two worker processes, against one."""
    rates = {}
    for count in (1, 2):
        with ProcessPoolExecutor(count, get_context("spawn"), _one_thread) as executor:
            warm = pk.Grid(sparsity=[0.1 + 0.01 * i for i in range(4 * count)])
            sweep(warm, folder / f"warm{count}.sqlite", executor)
            grid = pk.Grid(sparsity=[0.3, 0.5, 0.7], retrain=["biases", "norms"], seed=range(4))
            rates[count] = len(grid) / seconds(lambda: sweep(grid, folder / f"{count}.sqlite", executor))  # noqa: B023
    bars.at_least("rows each second of two worker processes, against one", rates[2], rates[1], 1.6, "/s")


def _kept(store: Path) -> int:
    return len(pk.Store(store, readonly=True).table(failed=None)) if store.exists() else 0


def killed(bars: Bars, folder: Path) -> None:
    """A sweep killed again and again, against an undisturbed one."""
    grid = pk.Grid(**KILLED_GRID)
    axes = [
        word
        for axis, values in KILLED_GRID.items()
        for word in (
            f"--{axis}",
            ",".join(map(str, values)) if isinstance(values, list | range) else str(values),
        )
    ]
    store = folder / "killed.sqlite"
    command = [sys.executable, "-m", "perpkit", "sweep", *axes, "--workers", "2", "--store"]
    chance, kept, kills = random.Random(0), [], 0
    while kills < KILLS:
        process = subprocess.Popen(
            [*command, str(store)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        # At any time: while it starts, or when it has come to a new row, some rows later.
        if chance.random() < 0.25:
            time.sleep(chance.uniform(0, 6))
        else:
            there, until = _kept(store), time.monotonic() + 60
            while _kept(store) == there and process.poll() is None and time.monotonic() < until:
                time.sleep(0.05)
            time.sleep(chance.uniform(0, 0.5))
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.wait()
        kept.append(_kept(store))
        if kept[-1] == len(grid):
            break
    print(f"  ({kills} kills; rows there after each: {kept})")
    subprocess.run([*command, str(store)], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    undisturbed = folder / "undisturbed.sqlite"
    subprocess.run(
        [*command, str(undisturbed)], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    after, before = (pk.Store(path).table(failed=None).set_index("key") for path in (store, undisturbed))
    same = before.perplexity.eq(after.perplexity.reindex(before.index)).sum()
    bars.at_least("random kills of the sweeping process", kills, KILLS, 1)
    bars.at_least("rows after them, each once, as undisturbed", int(same), len(grid), 1)
    bars.at_most("rows after them, in all", len(after), len(grid), 1)


def main() -> None:
    torch.set_num_threads(1)
    bars = Bars()
    for measure in (machinery, cached, sharing, workers, killed):
        with tempfile.TemporaryDirectory() as folder:
            measure(bars, Path(folder))
    imports(bars)
    bars.finish()


if __name__ == "__main__":
    main()
