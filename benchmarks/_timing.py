"""Times that can be compared: pieces of work that take turns, and the median of each."""

import statistics
import time
from collections.abc import Callable, Mapping

import torch


def medians(works: Mapping[str, Callable[[], object]], device: str, turns: int) -> dict[str, float]:
    """Seconds of each piece of work: medians over turns in which each runs once, the first to warm up.

    On a CPU the process's own time is counted, so that other programs disturb less.
    """
    clock = time.process_time if device == "cpu" else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(turns + 1):
        for name, work in works.items():
            _synchronize(device)
            started = clock()
            work()
            _synchronize(device)
            if turn:
                times[name].append(clock() - started)
    return {name: statistics.median(taken) for name, taken in times.items()}


def _synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()
