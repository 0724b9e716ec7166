"""What the papers' figures will cost: the time of their jobs and the memory of their models."""

import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from statistics import median

from tqdm.auto import tqdm

from ...evaluation.cost import device_name
from ...sources.embedded import EMBEDDED_MODELS, data_folder
from ...sources.models import best_device
from ..scale.weights import empty_model, retraining_bytes
from ..store import Store
from .jobs import Job, attempt
from .scales import Scale

# What a job calls the steps that can be cut short, and the fewest and a few more of them that are tried.
SHORTENED = ("steps", "epoch")
FEWEST, FEW = 1, 3


def job_seconds(left: Iterable[Job], store: Store, *, progress: bool = False) -> float:
    """About how long some jobs take here, one after the other.

    Jobs of the same function that were finished on this device say it, in proportion to their steps; where
    there is none, one of each function is tried with one step and with three.

    Raises ValueError when one that is tried fails, such as for pictures that cannot be had.
    """
    kinds: dict[str, list[Job]] = defaultdict(list)
    for job in left:
        kinds[job.name].append(job)
    known = _known(store) if kinds else {}
    total = 0.0
    new = [name for name in kinds if name not in known]
    for name in tqdm(new, desc="try", unit="kind", disable=not progress, leave=False, delay=1):
        known[name] = _tried(min(kinds[name], key=lambda job: job.steps or 1e9))
    for name, jobs in kinds.items():
        once, per_step = known[name]
        total += sum(once + per_step * job.steps for job in jobs)
    return total


def _known(store: Store) -> dict[str, tuple[float, float]]:
    """Seconds once and for each step, by function, of what this device has finished."""
    here = device_name(best_device())
    found: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for row in store.table().to_dict("records"):
        if row["device"] == here:
            found[row["function"]].append((int(row["steps"]), row["seconds"]))
    told = {}
    for name, pairs in found.items():
        steps = [each[0] for each in pairs]
        if max(steps) == min(steps):
            told[name] = (
                (0.0, median(s / n for n, s in pairs)) if min(steps) else (median(s for _, s in pairs), 0.0)
            )
            continue
        short = median(s for n, s in pairs if n == min(steps))
        long = median(s for n, s in pairs if n == max(steps))
        slope = max(0.0, (long - short) / (max(steps) - min(steps)))
        told[name] = max(0.0, short - slope * min(steps)), slope
    return told


def _tried(job: Job) -> tuple[float, float]:
    """The same of one job, really run in short versions; the first of them loads what all need."""
    axis = next((name for name in SHORTENED if job.settings.get(name)), None)
    if axis is None:
        _seconds(job)
        return _seconds(job), 0.0
    whole = int(job.settings[axis])
    short, longer = (replace(job, settings={**job.settings, axis: min(whole, n)}) for n in (FEWEST, FEW))
    _seconds(short)
    least, more = _seconds(short), _seconds(longer)
    each = job.steps / whole
    slope = max(0.0, more - least) / (each * max(1, min(whole, FEW) - FEWEST))
    return max(0.0, least - slope * each), slope


def _seconds(job: Job) -> float:
    started = time.perf_counter()
    if error := attempt(job)["error"]:
        raise ValueError(error)
    return time.perf_counter() - started


def least_memory(scale: Scale, models: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Bytes that retraining takes at least, few parameters and all of them, by model; without activations.

    A model whose size nobody knows here, one of the Hub that is not bundled as a shape, is left out.

    >>> from .scales import SCALES
    >>> few, full = least_memory(SCALES["paper"], ["facebook/opt-2.7b"])["facebook/opt-2.7b"]
    >>> round(few / 1e9, 1), round(full / 1e9, 1)
    (5.3, 58.3)
    """
    counts = {model: _parameters(model) for model in models}
    return {
        model: (
            retraining_bytes(count, scale.dtype, full=False),
            retraining_bytes(count, scale.dtype, full=True),
        )
        for model, count in counts.items()
        if count is not None
    }


def _parameters(model: str) -> int | None:
    from ..scale.shapes import SHAPES

    if (name := model.removeprefix("facebook/")) in SHAPES:
        return sum(parameter.numel() for parameter in empty_model(name).parameters())
    folder = data_folder("models", "tiny-opt") if model in EMBEDDED_MODELS else Path(model).expanduser()
    files = list(folder.glob("*.safetensors")) if folder.is_dir() else []
    return _counted(files) if files else None


def _counted(files: list[Path]) -> int:
    from safetensors import safe_open

    total = 0
    for file in files:
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - it is no dictionary
                size = 1
                for length in opened.get_slice(name).get_shape():
                    size *= length
                total += size
    return total
