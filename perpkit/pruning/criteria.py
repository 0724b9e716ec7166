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
