"""How long the first steps take and how telling the embedded model is.

The time bars are promises to a person at a laptop with two cores, so their references are those seconds.
"""

import copy
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from _bars import Bars

import perpkit as pk
from perpkit.experiments.experiment import recommended_lr


def seconds(work: Callable[[], object], repeats: int = 3) -> float:
    """Median time of some repetitions after one to warm up."""
    work()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def run(*command: str) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def main() -> None:
    bars = Bars()
    bars.at_most("import perpkit", seconds(lambda: run("-c", "import perpkit")), 2.0, 1, "s")

    torch.set_num_threads(1)
    model, tokenizer = pk.load_model("tiny-opt", device="cpu")
    text = pk.load_text("storyworld", tokenizer)
    tokens = f"{text.test.numel()} tokens"
    bars.at_most(f"perplexity over {tokens}", seconds(lambda: pk.perplexity(model, text.test)), 0.5, 1, "s")
    for subset in ("biases", "full"):
        copied = copy.deepcopy(model)
        masks = pk.prune(copied, "magnitude", sparsity=0.5)
        lr = recommended_lr("tiny-opt", subset)
        retrain = partial(pk.retrain, copied, text.train, masks=masks, subset=subset, lr=lr, progress=False)
        measured = seconds(retrain, repeats=1)
        bars.at_most(f"retraining {subset}, 100 steps of 8 x 128 tokens", measured, 5.0, 1, "s")

    with tempfile.TemporaryDirectory() as folder:
        bars.at_most("perpkit demo", run("-m", "perpkit", "demo", "--out", folder), 240.0, 1, "s")
        results = pd.read_csv(Path(folder) / "perplexity_by_sparsity.csv")
    mean = results.groupby(["retrain", "sparsity"])["perplexity"].mean()
    dense = results.dense_perplexity[0]
    gap = math.log(mean["none", 0.5] / dense)
    for subset, share in (("biases+norms", 0.70), ("full", 0.85)):
        closed = math.log(mean["none", 0.5] / mean[subset, 0.5])
        bars.at_least(f"log-perplexity gap at 50 % closed by {subset}", closed, gap, share)
    bars.at_least("perplexity at 70 % without retraining, against dense", mean["none", 0.7], dense, 5)
    bars.finish()


if __name__ == "__main__":
    main()
