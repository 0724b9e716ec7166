"""Measure one-shot pruning, retraining and soups of a ResNet-20, on CIFAR-10 and on the embedded shapes.

    python tools/measure_vision.py FOLDER

FOLDER holds cifar10/: train_8000.npz, test_4000.npz and resnet20_jpeg_ft2ep.pt. Global magnitude pruning to
50 … 95 %, then each method for one epoch; and to 90 % in three cycles of one epoch, by sparse model soups and
their baselines. The rate of a method at a sparsity is the one with the highest validation accuracy with seed
0; the test pictures are used for nothing else. The rows go to data/results/vision_retraining.csv and
vision_soups.csv; those that the files hold already are not measured again.
"""

import argparse
import copy
import itertools
import time
from collections.abc import Iterable
from concurrent.futures import Executor, ProcessPoolExecutor
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pandas as pd
import torch

import perpkit as pk

SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.95)
SEEDS = (0, 1, 2)
RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
RANK = 2
# What is trained; PERP has linear probing's parameters and adapters beside.
METHODS = {
    "none": None,
    "bn_recalibrate": "perp_v1:bn_recalibrate",
    "bn_parameters": "perp_v1:norms",
    "linear_probing": "perp_v1:linear_probing",
    "perp": "perp_v1:linear_probing+lora",
    "full": "full",
}
TRAINED = ("bn_parameters", "linear_probing", "perp", "full")
SOUPS = {"cifar10": (3,), "shapes": (3, 5)}
SOUP_SEEDS = (0, 1)
SOUP_SPARSITY, CYCLES = 0.9, 3
BATCH = 64
SETTINGS: dict[str, Any] = {
    "optimizer": "sgd",
    "momentum": 0.9,
    "weight_decay": 5e-4,
    "batch": BATCH,
    "augment": pk.crop_and_flip,
    "progress": False,
}


@lru_cache(maxsize=1)
def loaded(name: str, folder: Path) -> tuple:
    """A dense network and its pictures."""
    real = name == "cifar10"
    network = folder / "cifar10/resnet20_jpeg_ft2ep.pt" if real else "shapes-resnet"
    return (
        pk.load_classifier(network, device="cpu"),
        pk.load_images(folder / "cifar10" if real else "shapes", progress=False),
    )


def steps(images: pk.Images) -> int:
    """The steps of an epoch."""
    return len(images.train[0]) // BATCH


def treated(dense, images: pk.Images, method: str, sparsity: float, seed: int, lr: float) -> tuple:
    """A pruned network after a method, the share of the parameters that was trained, and the seconds."""
    model = copy.deepcopy(dense)
    masks = pk.prune(model, "magnitude", sparsity=sparsity, group="global", progress=False)
    started, subset = time.perf_counter(), METHODS[method]
    if method == "perp":
        pk.attach(model, masks, "mask_lora", rank=RANK, alpha=2.0 * RANK, seed=seed)
    share = pk.trainable_share(model, subset) if subset else 0.0
    if method == "bn_recalibrate":
        pk.recalibrate_batchnorm(model, images.train[0], batch=BATCH)
    elif subset:
        told = {"subset": subset, "lr": lr, "steps": steps(images), "seed": seed, **SETTINGS}
        pk.retrain(model, images.train, masks=masks, **told)
    if method == "perp":
        pk.merge(model)
    seconds = time.perf_counter() - started
    masks.check(model)
    return model, share, seconds


def searched(name: str, folder: Path, method: str, sparsity: float, lr: float) -> float:
    """Validation accuracy, zero where the method diverges."""
    torch.set_num_threads(1)
    dense, images = loaded(name, folder)
    try:
        return pk.accuracy(treated(dense, images, method, sparsity, 0, lr)[0], images.validation)
    except ValueError as error:
        if "Try lr=" not in str(error):
            raise
        return 0.0


def retrained(name: str, folder: Path, method: str, sparsity: float, seed: int, lr: float) -> list[dict]:
    """The row of one retraining."""
    torch.set_num_threads(1)
    dense, images = loaded(name, folder)
    model, share, seconds = treated(dense, images, method, sparsity, seed, lr)
    row = {"images": name, "method": method, "sparsity": sparsity, "seed": seed, "lr": lr}
    found = {"trainable_share": share, "seconds": seconds, "accuracy": pk.accuracy(model, images.test)}
    return [row | found]


def soups(name: str, folder: Path, m: int, seed: int, lr: float) -> list[dict]:
    """A row for the soup of m and for each of its baselines, which all go on from the same dense network."""
    torch.set_num_threads(1)
    dense, images = loaded(name, folder)
    soup = pk.sms(
        dense,
        "magnitude",
        images.train,
        sparsity=SOUP_SPARSITY,
        m=m,
        cycles=CYCLES,
        pruning={"group": "global"},
        score=lambda model: pk.accuracy(model, images.validation),
        evaluate=lambda model: pk.accuracy(model, images.test),
        baselines=["imp", "imp_m", "best", "mean", "ensemble"],
        seed=100 * seed,
        subset="full",
        steps=steps(images),
        lr=lr,
        **SETTINGS,
    )
    soup.masks.check(soup.model)
    table = soup.comparison.rename(columns={"score": "accuracy"})
    return table.assign(images=name, m=m, seed=seed, lr=lr).to_dict("records")


class Table:
    """Rows in a file, kept as they come: what was measured before somebody stops it is not lost."""

    def __init__(self, path: Path):
        self.path = path
        self.rows: list[dict] = pd.read_csv(path).to_dict("records") if path.exists() else []

    def has(self, **cell: object) -> bool:
        return any(all(row[name] == value for name, value in cell.items()) for row in self.rows)

    def add(self, rows: list[dict]) -> None:
        self.rows += rows
        self.path.parent.mkdir(parents=True, exist_ok=True)
        pd.DataFrame(self.rows).to_csv(self.path, index=False, float_format="%.5g")
        print(pd.DataFrame(rows).to_string(index=False, header=False), flush=True)


class Rates:
    """The best rate of each method at each sparsity, searched once; zero for methods that have none."""

    def __init__(self, pool: Executor, folder: Path, table: Table):
        self.pool, self.folder = pool, folder
        self.known = {
            (row["images"], row["method"], row["sparsity"]): row["lr"] for row in table.rows if "lr" in row
        }

    def of(self, name: str, cells: Iterable[tuple[str, float]]) -> dict[tuple[str, float], float]:
        cells = list(cells)
        missing = [cell for cell in cells if cell[0] in TRAINED and (name, *cell) not in self.known]
        tries = list(itertools.product(missing, RATES))
        futures = [self.pool.submit(searched, name, self.folder, *cell, lr) for cell, lr in tries]
        reached = dict(zip(tries, (future.result() for future in futures), strict=True))
        for cell in missing:
            self.known[name, *cell] = max(RATES, key=lambda lr, cell=cell: reached[cell, lr])  # type: ignore[misc]
            found = ", ".join(f"{lr:g}: {reached[cell, lr]:.2%}" for lr in RATES)
            print(f"{name} {cell}, validation accuracy by rate: {found}", flush=True)
        return {cell: self.known.get((name, *cell), 0.0) for cell in cells}


def measure_retraining(name: str, table: Table, rates: Rates) -> None:
    if not table.has(images=name, method="dense"):
        dense, images = loaded(name, rates.folder)
        print(f"{name}: {images.protocol}", flush=True)
        table.add([{"images": name, "method": "dense", "accuracy": pk.accuracy(dense, images.test)}])
    found = rates.of(name, itertools.product(METHODS, SPARSITIES))
    futures = [
        rates.pool.submit(retrained, name, rates.folder, method, sparsity, seed, lr)
        for (method, sparsity), lr in found.items()
        for seed in (SEEDS if method in TRAINED else SEEDS[:1])
        if not table.has(images=name, method=method, sparsity=sparsity, seed=seed)
    ]
    for future in futures:
        table.add(future.result())


def measure_soups(name: str, table: Table, rates: Rates) -> None:
    lr = rates.of(name, [("full", SOUP_SPARSITY)])["full", SOUP_SPARSITY]
    futures = [
        rates.pool.submit(soups, name, rates.folder, m, seed, lr)
        for seed in SOUP_SEEDS
        for m in SOUPS[name]
        if not table.has(images=name, m=m, seed=seed)
    ]
    for future in futures:
        table.add(future.result())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, default=Path("data/results"))
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    retraining, souped = (
        Table(options.out / f"{name}.csv") for name in ("vision_retraining", "vision_soups")
    )
    with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
        rates = Rates(pool, options.folder, retraining)
        measure_retraining("cifar10", retraining, rates)
        measure_soups("cifar10", souped, rates)
        measure_soups("shapes", souped, rates)
        measure_retraining("shapes", retraining, rates)
    print_tables(retraining, souped)


def print_tables(retraining: Table, souped: Table) -> None:
    """Means, standard deviations, and the soups' lead over each baseline with its standard error."""
    table = pd.DataFrame(retraining.rows)
    cells = table.groupby(["images", "method", "sparsity"], sort=False)["accuracy"].agg(["mean", "std"])
    for what in ("mean", "std"):
        print(what, (100 * cells[what].unstack("sparsity")).round(2).to_string(), sep="\n")
    reached = pd.DataFrame(souped.rows).pivot(
        index=["images", "m", "seed"], columns="method", values="accuracy"
    )
    print((100 * reached.groupby(["images", "m"]).mean()).round(2).to_string())
    # Differences within a seed, whose pruned networks and batches are the same as far as the methods are.
    lead = 100 * -reached.drop(columns="sms").sub(reached["sms"], axis=0)
    for what in ("mean", "sem"):
        print(f"lead of sms, {what}", lead.groupby(["images", "m"]).agg(what).round(2).to_string(), sep="\n")


if __name__ == "__main__":
    main()
