"""Pruning criteria: scores of weights, the lowest of which are pruned. Pure functions."""

import torch


def magnitude(weight: torch.Tensor) -> torch.Tensor:
    """Score `|W[i, j]|` (Han et al. 2015), in the weight's shape.

    >>> magnitude(torch.tensor([[-2.0, 1.0]]))
    tensor([[2., 1.]])
    """
    return weight.abs()


def random(weight: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Score by uniform noise in `[0, 1)`, in the weight's shape: the baseline that looks at nothing.

    The noise is drawn on the generator's device, so a seed prunes the same weights everywhere.

    >>> random(torch.zeros(2, 3), torch.Generator().manual_seed(0)).shape
    torch.Size([2, 3])
    """
    noise = torch.rand(weight.shape, generator=generator, device=generator.device)
    return noise.to(weight.device)


def wanda(weight: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
    """Score `|W[i, j]| · ‖X[:, j]‖₂` (Wanda, equation 1), `[out, in]` for a weight `[out, in]`.

    `norms` holds the length of each input over the calibration tokens, `[in]`, or `[out, in]` where rows have
    inputs of their own (grouped convolutions).

    Raises ValueError for norms of another shape.

    >>> wanda(torch.tensor([[-2.0, 1.0]]), torch.tensor([1.0, 5.0]))
    tensor([[2., 5.]])
    """
    return weight.abs() * _checked(norms, weight)


def ria(weight: torch.Tensor, norms: torch.Tensor, power: float = 0.5) -> torch.Tensor:
    """Score `(|W[i, j]|/Σ_j|W[i, j]| + |W[i, j]|/Σ_i|W[i, j]|) · ‖X[:, j]‖₂^a` (RIA, Zhang et al. 2024).

    Shapes are those of `wanda`; `power` is a. A row or a column of zeros scores zero.

    Raises ValueError for norms of another shape.

    >>> ria(torch.tensor([[3.0, 1.0], [0.0, 1.0]]), torch.tensor([1.0, 4.0]))
    tensor([[1.7500, 1.5000],
            [0.0000, 3.0000]])
    """
    # Sums of half precision would be rounded to eight bits.
    absolute = weight.abs().to(torch.promote_types(weight.dtype, torch.float32))
    importance = sum(absolute / _not_zero(absolute.sum(dim, keepdim=True)) for dim in (0, 1))
    return importance * _checked(norms, weight) ** power


def _not_zero(sums: torch.Tensor) -> torch.Tensor:
    return torch.where(sums == 0, 1.0, sums)


def _checked(norms: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    if norms.shape not in (weight.shape, weight.shape[1:]):
        raise ValueError(
            f"the norms have shape {tuple(norms.shape)}; a weight {tuple(weight.shape)} needs one for each "
            f"input, {tuple(weight.shape[1:])}, or one for each weight"
        )
    return norms
