"""Seconds of pruning and of reconstruction, on a model of random weights."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from ...evaluation.cost import Cost
from ...pruning.prune import CALIBRATED, prune
from ...retraining.layerwise.reconstruct import reconstruct
from ...sources.models import check_device
from .rows import Rows, is_known, new_row, tried
from .shapes import check_length
from .weights import fill, random_model

CRITERIA = ("magnitude", "wanda", "ria", "sparsegpt", "sparsefw")
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
    known: Rows | None = None,
) -> Iterator[dict]:
    """Measure pruning a random model to 50 % by each criterion: a row with its seconds and peak memory.

    Calibrated on `samples` windows of `length` random tokens; the weights are new for each criterion. A row
    that cannot be had says so in its `error`; one of the `known` rows is not measured again.

    Raises ValueError for an unknown shape or device, and for fewer than one sample or token or more tokens
    than the model has positions.

    >>> rows = pruning_seconds("opt-125m", ("wanda",), samples=1, length=8, layers=1, device="cpu")
    >>> next(rows)["seconds"] > 0
    True
    """
    place, row = _start("prune", model, layers, samples, length, dtype, device)
    if place.startswith("cuda"):
        # Kernels are loaded at their first use.
        small: Any = random_model(model, layers=1, dtype=dtype, device=place)
        for criterion in criteria:
            if not is_known({**row, "method": criterion}, known):
                tried(row, place, partial(_pruned, small, criterion, _tokens(small, 1, length), place))
        del small
    pruned: Any = None
    for criterion in criteria:

        def measured(criterion: str = criterion) -> dict:
            nonlocal pruned
            if pruned is None:
                pruned = random_model(model, layers=layers, dtype=dtype, device=place)
            else:
                fill(pruned)
            return _pruned(pruned, criterion, _tokens(pruned, samples, length), place)

        yield tried({**row, "method": criterion}, place, measured, known)


def reconstruction_seconds(
    model: str,
    units: tuple[str, ...] = UNITS,
    *,
    samples: int = 128,
    length: int = 2048,
    dtype: str = "bfloat16",
    device: str | None = None,
    known: Rows | None = None,
) -> Iterator[dict]:
    """Measure reconstructing one block of a random model, pruned to 50 %, by each unit: a row for each.

    A model of one block is measured, dense and pruned: every other block costs the same. A row that cannot
    be had says so in its `error`; one of the `known` rows is not measured again.

    Raises ValueError for an unknown shape or device, and for fewer than one sample or token or more tokens
    than the model has positions.

    >>> rows = reconstruction_seconds("opt-125m", ("matrix",), samples=1, length=8, device="cpu")
    >>> next(rows)["method"]
    'matrix'
    """
    place, row = _start("reconstruct", model, 1, samples, length, dtype, device)
    for unit in units:

        def measured(unit: str = unit) -> dict:
            dense: Any = random_model(model, layers=1, dtype=dtype, device=place)
            pruned: Any = random_model(model, layers=1, dtype=dtype, device=place)
            masks = prune(pruned, "magnitude", sparsity=0.5, progress=False)
            tokens = _tokens(dense, samples, length)
            with Cost(place) as cost, cost.phase("reconstruct"):
                reconstruct(pruned, dense, masks, tokens, unit=unit, progress=False)
            masks.check(pruned)
            return {"seconds": cost.seconds["reconstruct"], "peak_memory": cost.peak_memory}

        yield tried({**row, "method": unit}, place, measured, known)


def _start(
    what: str, model: str, layers: int | None, samples: int, length: int, dtype: str, device: str | None
) -> tuple[str, dict[str, Any]]:
    """The device, and what is the same in all rows, once it is checked."""
    check_length(model, length)
    if samples < 1:
        raise ValueError(f"samples is {samples}; it must be at least 1")
    place = check_device(device)
    asked: dict[str, Any] = {"model": model, "layers": layers, "samples": samples, "length": length}
    return place, new_row(place, what=what, dtype=dtype, **asked)


def _pruned(model: Any, criterion: str, tokens: torch.Tensor, place: str) -> dict[str, Any]:
    given = tokens if criterion in CALIBRATED else None
    with Cost(place) as cost, cost.phase("prune"):
        masks = prune(model, criterion, sparsity=0.5, calibration=given, progress=False)
    masks.check(model)
    return {"seconds": cost.seconds["prune"], "peak_memory": cost.peak_memory}


def _tokens(model: Any, samples: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.config.vocab_size, (samples, length), generator=generator)
