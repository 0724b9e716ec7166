"""Seconds of pruning and of reconstruction, on a model of random weights."""

from collections.abc import Iterator
from typing import Any

import torch

from ...evaluation.cost import Cost, device_name
from ...pruning.masks import Masks
from ...pruning.prune import CALIBRATED, prune
from ...retraining.layerwise.reconstruct import reconstruct
from ...sources.models import check_device
from .weights import fill, random_model

CRITERIA = ("magnitude", "wanda", "ria", "sparsegpt")
UNITS = ("matrix", "submodule", "block")


def pruning_seconds(
    model: str,
    criteria: tuple[str, ...] = CRITERIA,
    *,
    samples: int = 128,
    length: int = 2048,
    layers: int | None = None,
    dtype: str = "bfloat16",
    device: str | None = None,
) -> Iterator[dict]:
    """Measure pruning a random model to 50 % by each criterion: a row with its seconds and peak memory.

    Calibrated on `samples` windows of `length` random tokens; the weights are new for each criterion.

    >>> rows = pruning_seconds("opt-125m", ("wanda",), samples=1, length=8, layers=1, device="cpu")
    >>> next(rows)["seconds"] > 0
    True
    """
    place = check_device(device)
    row: dict[str, Any] = {"model": model, "layers": layers, "samples": samples, "length": length}
    row |= {"dtype": dtype, "device": device_name(place)}
    pruned: Any = random_model(model, layers=layers, dtype=dtype, device=place)
    tokens = _tokens(pruned, samples, length)
    for criterion in criteria:
        fill(pruned)
        given = tokens if criterion in CALIBRATED else None
        with Cost(place) as cost, cost.phase("prune"):
            masks = prune(pruned, criterion, sparsity=0.5, calibration=given, progress=False)
        masks.check(pruned)
        # Not there while the next criterion is measured.
        del masks
        yield {**row, "what": f"prune: {criterion}", "seconds": cost.seconds["prune"], **_peak(cost)}


def reconstruction_seconds(
    model: str,
    units: tuple[str, ...] = UNITS,
    *,
    samples: int = 128,
    length: int = 2048,
    dtype: str = "bfloat16",
    device: str | None = None,
) -> Iterator[dict]:
    """Measure reconstructing one block of a random model, pruned to 50 %, by each unit: a row for each.

    A model of one block is measured, dense and pruned: every other block costs the same.

    >>> rows = reconstruction_seconds("opt-125m", ("matrix",), samples=1, length=8, device="cpu")
    >>> next(rows)["what"]
    'reconstruct a block: matrix'
    """
    place = check_device(device)
    row: dict[str, Any] = {"model": model, "layers": 1, "samples": samples, "length": length}
    row |= {"dtype": dtype, "device": device_name(place)}
    dense: Any = random_model(model, layers=1, dtype=dtype, device=place)
    tokens = _tokens(dense, samples, length)
    for unit in units:
        pruned: Any = random_model(model, layers=1, dtype=dtype, device=place)
        masks: Masks = prune(pruned, "magnitude", sparsity=0.5, progress=False)
        with Cost(place) as cost, cost.phase("reconstruct"):
            reconstruct(pruned, dense, masks, tokens, unit=unit, progress=False)
        masks.check(pruned)
        seconds = cost.seconds["reconstruct"]
        yield {**row, "what": f"reconstruct a block: {unit}", "seconds": seconds, **_peak(cost)}


def _tokens(model: Any, samples: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.config.vocab_size, (samples, length), generator=generator)


def _peak(cost: Cost) -> dict:
    return {"peak_memory": cost.peak_memory}
