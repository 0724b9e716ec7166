"""What `prune` refuses, in words that say what to do, and what an earlier pruning has left."""

from collections.abc import Mapping

import torch

from ..sources.text import Text, check_windows
from .layers import Matrix, is_language_model
from .masks import Masks

# A layer with a larger share of zeros was pruned before; fewer are what 16 bits round to zero.
FEW_ZEROS = 0.01


def checked_calibration(model, criterion: str, calibration, length: int, batch: int) -> torch.Tensor:
    """The calibration data that a criterion will see, token windows cut to `length`."""
    if calibration is None:
        raise ValueError(f"{criterion} looks at activations: give calibration=, such as text.calibration")
    if length < 2 or batch < 1:
        raise ValueError(f"length={length}, batch={batch}: want length >= 2 and batch >= 1")
    language = is_language_model(model)
    if isinstance(calibration, torch.Tensor):
        if calibration.ndim < 2 or not len(calibration):
            want = "token windows, [n, length]" if language else "at least one input, [n, …]"
            raise ValueError(f"calibration has the shape {tuple(calibration.shape)}; want {want}")
        if language and (calibration.is_floating_point() or calibration.dtype == torch.bool):
            raise ValueError(
                f"calibration is {calibration.dtype}; want token windows, which are whole numbers"
            )
        if not language and calibration.is_floating_point() and not calibration.isfinite().all():
            raise ValueError("a value of the calibration data is NaN or infinite")
    elif not language or not isinstance(calibration, Text):
        kind = type(calibration).__name__
        raise ValueError(f"calibration is a {kind}; want a tensor, such as text.calibration")
    if language:
        calibration = calibration[:, :length] if isinstance(calibration, torch.Tensor) else calibration
        check_windows(model, calibration)
    return calibration


def check_weights(matrices: Mapping[str, Matrix]) -> None:
    """Raise ValueError naming a matrix with a NaN."""
    for name, matrix in matrices.items():
        if matrix.view(matrix.weight()).isnan().any():
            raise ValueError(f"cannot prune {name!r}: some of its weights are NaN, so the model is broken")


def kept_before(matrix: Matrix, masks: Masks | None) -> torch.Tensor | None:
    """What an earlier pruning has kept of a matrix; None where it has pruned nothing."""
    weight = matrix.view(matrix.weight())
    if masks is not None:
        before = masks.get(matrix.parameter)
        if before is None or before.shape != matrix.weight().shape:
            return None
        kept = matrix.view(before.to(weight.device))
        return None if kept.all() else kept
    zeros = weight == 0
    return ~zeros if zeros.sum() > FEW_ZEROS * zeros.numel() else None


def check_not_below(matrix: Matrix, kept: torch.Tensor | None, sparsity: float) -> None:
    """Raise ValueError when a matrix has lost more weights before than the sparsity takes."""
    if kept is not None and (lost := kept.numel() - int(kept.sum())) > round(sparsity * kept.numel()):
        raise ValueError(
            f"{matrix.name!r} is pruned already: {lost / kept.numel():.2%} of its weights are zero, and a "
            f"sparsity of {sparsity:.2%} would bring some back. Prune to more, start from the dense model, "
            "or give masks=Masks({}) if these zeros are weights like any other"
        )
