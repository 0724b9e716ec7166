"""Reconstruction: unit by unit, the kept weights learn to do what the dense model did there."""

from collections.abc import Callable
from contextlib import closing
from itertools import repeat

import pandas as pd
import torch
from torch import nn
from tqdm.auto import tqdm

from ...pruning.calibration import stream
from ...pruning.layers import Matrix, decoder_blocks, is_language_model, prunable_matrices
from ...pruning.masks import Masks
from ...pruning.undo import Undo
from ...sources.text import check_windows
from ..adapters.modules import adapted_modules
from ..loop.settings import check_whole
from .descent import Descent
from .optimum import check_ridge
from .units import groups, parse_unit
from .work import Layerwise, Reconstructed

__all__ = ["Reconstructed", "reconstruct"]

SOLVERS = ("exact", "gradients")
TARGETS = ("dense", "propagated")


@torch.no_grad()
def reconstruct(
    model: nn.Module,
    dense: nn.Module,
    masks: Masks,
    calibration: torch.Tensor,
    *,
    unit: str = "submodule",
    target: str = "dense",
    trainable: str = "full",
    solver: str | None = None,
    steps: int = 200,
    lr: float = 1e-3,
    rank: int = 16,
    alpha: float = 32.0,
    start: str | None = None,
    ridge: float = 0.0,
    batch: int = 8,
    length: int = 2048,
    seed: int = 0,
    offload: bool = False,
    progress: bool = True,
    on_unit: Callable[[Reconstructed], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> pd.DataFrame:
    """Reconstruct a pruned model's kept weights unit by unit, in place, and return the errors of every unit.

    Each unit's masked matrices minimise `‖f(X) − f̂(X̂)‖²` over the calibration data (methods, section 6),
    whatever criterion has chosen the masks. `X̂` is what the pruned and so far reconstructed model hands to
    the unit. The target is what the dense unit `f` makes of its own inputs, `"dense"`, so that later units
    mend what earlier ones have missed; or of `X̂` too, `"propagated"` (PERP). `calibration` are token windows
    `[n, length]`, of which the first `length` tokens are read, or inputs `[n, …]` of any other model, `batch`
    at a time.

    - `unit` is a `"matrix"`; a `"submodule"`, the attention or the MLP part of a block; a `"block"`; or
      `"window:n"`, n blocks together. Other than language models have only matrices.
    - `trainable` is `"full"`, the kept weights; or a kind of adapter, `"mask_lora"`, `"lora_prune"` or
      `"scale_lora"`, of `rank`, `alpha` and `start` (`attach`), merged at the end of its unit.
    - `solver` is `"exact"` for a matrix (its default), the optimum of `optimum` with its `ridge`; or
      `"gradients"`, `steps` of Adam at `lr` (`Descent`).
    - Resident are one unit's outputs, one block boundary's activations and one unit's optimiser state; with
      `offload` both models stay on the CPU and one block at a time moves to the GPU.

    The table has the columns unit, before, after and optimum: relative squared errors of the unit's output
    on the calibration data. A matrix's output is `XWᵀ`, without bias, and optimum the least possible error;
    elsewhere optimum is NaN. A unit that gets worse is put back as it was, with a warning.

    `on_unit(Reconstructed(...))` is called after every unit. When `cancelled()`, asked before each unit and
    step, says True, the units done so far are returned and the rest is as it was; Ctrl-C does the same and
    leaves the table in the exception's `table`. The dense model is never changed.

    Raises ValueError, leaving the model as it was, for unknown names, settings out of range, masks or a
    dense model that do not fit, calibration that does not fit, and a NaN or infinite activation.

    >>> import copy
    >>> import perpkit as pk
    >>> dense, tokenizer = pk.load_model("tiny-opt", device="cpu")
    >>> text = pk.load_text("storyworld", tokenizer, windows={"train": 8, "calibration": 8})
    >>> model = copy.deepcopy(dense)
    >>> masks = pk.prune(model, "magnitude", sparsity=0.6)
    >>> table = reconstruct(model, dense, masks, text.calibration, unit="matrix", progress=False)
    >>> len(table), bool((table["after"] < 0.8 * table["before"]).all())
    (18, True)
    """
    kind, window = parse_unit(unit)
    if solver is None:
        solver = "exact" if kind == "matrix" and trainable == "full" else "gradients"
    _check_names(kind, target, solver, trainable)
    check_ridge(ridge)
    descent = Descent(trainable, steps, lr, rank, alpha, start, seed)
    _check_pair(model, dense, masks)
    calibration = _checked(model, calibration, length, batch)
    matrices = {n: m for n, m in prunable_matrices(model).items() if m.parameter in masks}
    if not matrices:
        raise ValueError("there is nothing to reconstruct: the masks are of no prunable matrix of this model")
    _check_unit(model, kind, solver, matrices)

    total = _count(model, kind, window, matrices)
    work = Layerwise(model, dense, masks, kind, solver, descent, ridge, total, on_unit, cancelled)
    parts, twins = (
        stream(each, calibration, batch=batch, offload=offload, window=window) for each in (model, dense)
    )
    bar = tqdm(total=total, desc="reconstruct", unit=kind, disable=not progress, leave=False)
    with bar, closing(parts), closing(twins), Undo(matrices.values()) as undo:
        try:
            for part, twin in zip(parts, twins if target == "dense" else repeat(None), strict=False):
                inside = [matrix for name, matrix in part.matrices.items() if name in matrices]
                for matrix in inside:
                    undo.remember(matrix)
                for _ in work.done(part, twin, inside):
                    bar.update()
                if work.stopped:
                    break
        except KeyboardInterrupt as stopped:
            stopped.table = work.table()  # type: ignore[attr-defined]
            stopped.add_note(
                f"{len(work.rows)} of {total} units are reconstructed; the exception's table has their errors"
            )
            raise
        except Exception:
            undo.restore()
            raise
    masks.check(model)
    return work.table()


def _check_names(kind: str, target: str, solver: str, trainable: str) -> None:
    if target not in TARGETS:
        raise ValueError(f"unknown target {target!r}; the targets are {' and '.join(TARGETS)}")
    if solver not in SOLVERS:
        raise ValueError(f"unknown solver {solver!r}; the solvers are {' and '.join(SOLVERS)}")
    if solver == "exact" and (kind != "matrix" or trainable != "full"):
        raise ValueError(
            f"solver='exact' finds all kept weights of a matrix; unit={kind!r} with trainable={trainable!r} "
            "needs solver='gradients'"
        )


def _check_pair(model: nn.Module, dense: nn.Module, masks: Masks) -> None:
    if adapted_modules(model) or adapted_modules(dense):
        raise ValueError("there are adapters on the model; merge(model) before reconstructing it")
    masks.check(model)
    theirs = dict(dense.named_parameters())
    # A head may be tied in one and not in the other; it takes no part.
    inside = f"{decoder_blocks(model)[0]}." if is_language_model(model) else ""
    for name, parameter in model.named_parameters():
        if not name.startswith(inside):
            continue
        if name not in theirs or theirs[name].shape != parameter.shape:
            raise ValueError(f"dense is another model: it has no {name!r} of shape {tuple(parameter.shape)}")
        if theirs[name].data_ptr() == parameter.data_ptr():
            raise ValueError(
                "dense shares its weights with the model: give a copy that was made before pruning, "
                "copy.deepcopy(model)"
            )


def _checked(model: nn.Module, calibration: torch.Tensor, length: int, batch: int) -> torch.Tensor:
    check_whole(length=length, batch=batch)
    if length < 2 or batch < 1:
        raise ValueError(f"length={length}, batch={batch}: want length >= 2 and batch >= 1")
    if not isinstance(calibration, torch.Tensor):
        kind = type(calibration).__name__
        raise ValueError(f"calibration is a {kind}; want a tensor, such as text.calibration")
    if calibration.ndim < 2 or not len(calibration):
        shape = tuple(calibration.shape)
        raise ValueError(f"calibration has the shape {shape}; want at least one row, [n, …]")
    if is_language_model(model):
        if calibration.is_floating_point():
            raise ValueError(
                f"calibration is {calibration.dtype}; want token windows, which are whole numbers"
            )
        calibration = calibration[:, :length]
        check_windows(model, calibration)
    return calibration


def _check_unit(model: nn.Module, kind: str, solver: str, matrices: dict[str, Matrix]) -> None:
    if kind != "matrix" and not is_language_model(model):
        raise ValueError(f"a {type(model).__name__} has no decoder blocks: reconstruct it with unit='matrix'")
    fused = [name for name, matrix in matrices.items() if matrix.expert is not None]
    if kind == "matrix" and solver == "gradients" and fused:
        raise ValueError(
            f"{fused[0]!r} is one expert of a fused mixture and cannot be trained alone by gradients; take "
            "solver='exact' with trainable='full', or unit='submodule'"
        )


def _count(model: nn.Module, kind: str, window: int, matrices: dict[str, Matrix]) -> int:
    if kind == "matrix":
        return len(matrices)
    prefix, blocks = decoder_blocks(model)
    if kind == "submodule":
        return sum(len(groups(f"{prefix}.{i}", matrices.values())) for i in range(len(blocks)))
    starts = range(0, len(blocks), window)
    spans = [tuple(f"{prefix}.{i}." for i in range(start, start + window)) for start in starts]
    return sum(any(name.startswith(span) for name in matrices) for span in spans)
