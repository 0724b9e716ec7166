"""Measure every way to retrain or reconstruct a pruned model, embedded and real.

    python tools/measure_retraining.py FOLDER

FOLDER holds models/stories260K (a Llama trained on TinyStories, without biases) and
tinystories/stories_1000.jsonl. Magnitude pruning to 30 … 70 %, then each method: 100 steps of 8 windows, or
reconstruction on the calibration windows. Each method's rate is the one that reaches the lowest perplexity
on the calibration windows at 60 % with seed 0; perplexity is measured on test windows used for nothing else.
The rows go to data/results/retraining_methods.csv; those that the file holds already are not measured again.
"""

import argparse
import copy
import itertools
import time
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path

import pandas as pd
import torch

import perpkit as pk

SPARSITIES = (0.3, 0.4, 0.5, 0.6, 0.7)
SEEDS = (0, 1, 2)
SEARCHED_AT = 0.6
RANK = 4
SUBSETS = ("biases", "norms", "biases+norms", "head", "full")
ADAPTERS = ("lora_prune", "scale_lora", "scale_lora (symmetry broken)", "mask_lora", "biases+norms+mask_lora")
# Unit and what is trained; one matrix is solved exactly and needs no rate.
RECONSTRUCTIONS = {
    "reconstruct matrix": ("matrix", "full"),
    "reconstruct submodule": ("submodule", "full"),
    "reconstruct submodule by mask_lora": ("submodule", "mask_lora"),
    "reconstruct block": ("block", "full"),
}
RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
METHODS = ("none", *SUBSETS, *ADAPTERS, *RECONSTRUCTIONS)


@lru_cache(maxsize=1)
def loaded(name: str, folder: Path) -> tuple:
    """A dense model and its text."""
    real = name == "stories260K"
    dense, tokenizer = pk.load_model(folder / "models" / name if real else name, device="cpu")
    source = folder / "tinystories/stories_1000.jsonl" if real else "storyworld"
    return dense, pk.load_text(source, tokenizer, length=256 if real else None)


def treated(dense, text: pk.Text, method: str, sparsity: float, seed: int, lr: float) -> tuple:
    """A pruned model after a method, the share of the parameters that was trained, and the seconds."""
    model = copy.deepcopy(dense)
    masks = pk.prune(model, "magnitude", sparsity=sparsity)
    started, share = time.perf_counter(), 0.0
    if method in RECONSTRUCTIONS:
        unit, trainable = RECONSTRUCTIONS[method]
        given: dict = {
            "trainable": trainable,
            "rank": RANK,
            "alpha": 2.0 * RANK,
            "seed": seed,
            "progress": False,
        }
        pk.reconstruct(model, dense, masks, text.calibration, unit=unit, lr=lr or 1e-3, **given)
    elif method != "none":
        subset = method
        if kind := next((kind for kind in ("lora_prune", "scale_lora", "mask_lora") if kind in method), None):
            start = "symmetry_breaking" if "broken" in method else None
            pk.attach(model, masks, kind, rank=RANK, alpha=2.0 * RANK, start=start, seed=seed)
            subset = method.replace("mask_lora", "lora") if "+" in method else "lora"
        if "head" in method:
            pk.untie_head(model)
        share = pk.trainable_share(model, subset)
        pk.retrain(model, text.train, masks=masks, subset=subset, lr=lr, steps=100, seed=seed, progress=False)
        if kind:
            pk.merge(model)
    seconds = time.perf_counter() - started
    masks.check(model)
    return model, share, seconds


def searched(name: str, folder: Path, method: str, lr: float) -> float:
    """Perplexity on the calibration windows, infinite where the method diverges."""
    torch.set_num_threads(1)
    dense, text = loaded(name, folder)
    try:
        return pk.perplexity(treated(dense, text, method, SEARCHED_AT, 0, lr)[0], text.calibration)
    except ValueError as error:
        if "Try lr=" not in str(error):
            raise
        return float("inf")


def measured(name: str, folder: Path, method: str, sparsity: float, seed: int, lr: float) -> dict:
    """One row of the table."""
    torch.set_num_threads(1)
    dense, text = loaded(name, folder)
    model, share, seconds = treated(dense, text, method, sparsity, seed, lr)
    return {
        "model": name,
        "method": method,
        "sparsity": sparsity,
        "seed": seed,
        "lr": lr,
        "trainable_share": share,
        "seconds": seconds,
        "perplexity": pk.perplexity(model, text.test),
    }


def rates(pool, name: str, folder: Path, methods: list[str]) -> dict[str, float]:
    """The best rate of each method; zero for those that have none."""
    free = [method for method in methods if method not in ("none", "reconstruct matrix")]
    tries = list(itertools.product(free, RATES))
    futures = [pool.submit(searched, name, folder, method, lr) for method, lr in tries]
    reached = dict(zip(tries, (future.result() for future in futures), strict=True))
    found = dict.fromkeys(methods, 0.0)
    for method in free:
        found[method] = min(RATES, key=lambda lr, method=method: reached[method, lr])  # type: ignore[misc]
        print(f"{name} {method}: lr {found[method]:g}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, default=Path("data/results/retraining_methods.csv"))
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    rows: list[dict] = pd.read_csv(options.out).to_dict("records") if options.out.exists() else []
    with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
        for name in ("tiny-opt", "stories260K"):
            dense, text = loaded(name, options.folder)
            held = {
                (row["method"], row["sparsity"], row["seed"]): row["lr"]
                for row in rows
                if row["model"] == name
            }
            known = {method: lr for (method, *_), lr in held.items()}
            if "dense" not in known:
                rows.append({"model": name, "method": "dense", "perplexity": pk.perplexity(dense, text.test)})
            print(f"{name}: {text.protocol}", flush=True)
            methods = [m for m in METHODS if name == "tiny-opt" or "biases" not in m]
            found = known | rates(pool, name, options.folder, [m for m in methods if m not in known])
            futures = [
                pool.submit(measured, name, options.folder, method, sparsity, seed, found[method])
                for method in methods
                for sparsity in SPARSITIES
                for seed in (SEEDS if found[method] else SEEDS[:1])
                if (method, sparsity, seed) not in held
            ]
            for future in futures:
                rows.append(future.result())
                # Kept as they come: what was measured before somebody stops it is not lost.
                pd.DataFrame(rows).to_csv(options.out, index=False, float_format="%.5g")
                row = rows[-1]
                print(f"{name} {row['method']} {row['sparsity']:.0%} {row['perplexity']:.3f}", flush=True)
    table = pd.DataFrame(rows)
    cells = table.groupby(["model", "method", "sparsity"], sort=False)["perplexity"].agg(["mean", "std"])
    print(cells["mean"].unstack("sparsity").round(2).to_string())


if __name__ == "__main__":
    main()
