"""What a soup costs beyond the retraining of its candidates, and what a second worker saves.

The embedded classifier on its 8,000 pictures, candidates of one epoch, one thread each. The references are
the bare retrainings, and the same soup on one worker.
"""

import copy
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch
from _bars import Bars
from _timing import medians

import perpkit as pk

SPARSITY = 0.9
BATCH = 64
STEPS = 125
SETTINGS: dict[str, Any] = {
    "subset": "full",
    "lr": 0.03,
    "optimizer": "sgd",
    "batch": BATCH,
    "augment": pk.crop_and_flip,
    "progress": False,
}


def cost(bars: Bars, dense, images: pk.Images, m: int) -> None:
    """Pruning, m retrainings, their files, the average and its batch statistics, against m retrainings."""
    parent = copy.deepcopy(dense)
    masks = pk.prune(parent, "magnitude", sparsity=SPARSITY, group="global", progress=False)

    def retrainings() -> None:
        for seed in range(m):
            pk.retrain(copy.deepcopy(parent), images.train, masks=masks, seed=seed, steps=STEPS, **SETTINGS)

    works: dict[str, Callable[[], object]] = {
        "soup": lambda: soup(dense, images, m, STEPS),
        "bare": retrainings,
    }
    taken = medians(works, "cpu", turns=2)
    bars.at_most(
        f"a soup of {m}, against {m} retrainings of an epoch", taken["soup"], taken["bare"], 1.05, "s"
    )


def soup(dense, images: pk.Images, m: int, steps: int, executor=None) -> None:
    pk.sms(
        dense,
        "magnitude",
        images.train,
        sparsity=SPARSITY,
        m=m,
        cycles=1,
        pruning={"group": "global"},
        executor=executor,
        steps=steps,
        **SETTINGS,
    )


def _one_thread() -> None:
    torch.set_num_threads(1)


def workers(bars: Bars, dense, images: pk.Images) -> None:
    """Soups of four on one worker process and on two."""
    seconds = {}
    for count in (1, 2):
        with ProcessPoolExecutor(count, get_context("spawn"), _one_thread) as executor:
            soup(dense, images, 2 * count, 2, executor)
            started = time.perf_counter()
            soup(dense, images, 4, STEPS, executor)
            seconds[count] = time.perf_counter() - started
    bars.at_least("a soup of 4: one worker's seconds, against two", seconds[1], seconds[2], 1.6, "s")


def main() -> None:
    torch.set_num_threads(1)
    bars = Bars()
    dense = pk.load_classifier("shapes-resnet", device="cpu")
    images = pk.load_images("shapes", progress=False)
    cost(bars, dense, images, 3)
    workers(bars, dense, images)
    bars.finish()


if __name__ == "__main__":
    main()
