"""Exercises about iterative pruning: how far a cycle goes, where its rate starts, which statistics hold."""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from ...pruning.masks import Masks
from ...retraining.batchnorm import recalibrate_batchnorm
from ...retraining.schedules import allr_start
from .verdict import Wrong, call, check, close, number


@check("every cycle keeps the same share of what the one before has left")
def check_cycle_sparsity(my_sparsity: Callable[[int, int, float], float]) -> None:
    """Check `my_sparsity(cycle, cycles, sparsity)`: the sparsity after `cycle` (from 1) of `cycles`.

    Each cycle keeps the same share of the weights that are left, and the last one reaches `sparsity`.

    >>> check_cycle_sparsity(lambda cycle, cycles, sparsity: sparsity * cycle / cycles)
    ✗ not yet: after cycle 1 of 3 to 90% you say 30.0%; equal shares of what is left make 53.6%
    """
    for sparsity, cycles in [(0.9, 3), (0.75, 2), (0.5, 1), (0.98, 5)]:
        for cycle in range(1, cycles + 1):
            got = number("the sparsity", call(my_sparsity, cycle, cycles, sparsity))
            want = 1 - (1 - sparsity) ** (cycle / cycles)
            # Whoever computes in float32 is right, too.
            if abs(got - want) > 1e-6:
                start = f"after cycle {cycle} of {cycles} to {sparsity:.0%} you say {got:.1%}"
                want_said = "the last cycle must reach the target"
                if cycle < cycles:
                    want_said = f"equal shares of what is left make {want:.1%}"
                raise Wrong(f"{start}; {want_said}")


@check("the rate starts by how much was cut away, and within its limits")
def check_allr_start(my_start: Callable[[torch.Tensor, torch.Tensor, float], float]) -> None:
    """Check `my_start(dense, pruned, share)`: the factor of the largest rate with which ALLR starts.

    `dense` and `pruned` are one weight tensor before and after pruning, of which `s` is the share of zeros in
    `pruned`; the factor is `‖dense − pruned‖ / (‖dense‖ √s)`, at least `share` and at most 1.

    >>> check_allr_start(lambda dense, pruned, share: ((dense - pruned).norm() / dense.norm()).item())
    ✗ not yet: for [2.0, 1.0, 2.0, 4.0] pruned to [0.0, 0.0, 2.0, 4.0] you start at 0.447; want 0.632: the \
share of the norm is to be compared with the share of the weights
    """
    dense = torch.tensor([[2.0, 1.0, 2.0, 4.0]])
    for pruned, share, hint in [
        (
            torch.tensor([[0.0, 0.0, 2.0, 4.0]]),
            0.1,
            "the share of the norm is to be compared with the share of the weights",
        ),
        (torch.tensor([[2.0, 0.0, 2.0, 4.0]]), 0.9, "share is the least"),
        (torch.tensor([[2.0, 1.0, 2.0, 0.0]]), 0.1, "1 is the most"),
    ]:
        layer = nn.Linear(4, 1, bias=False)
        with torch.no_grad():
            layer.weight.copy_(pruned)
        want = allr_start(layer, Masks({"weight": pruned != 0}), {"weight": dense}, share=share)
        got = number("the factor", call(my_start, dense, pruned, share))
        if abs(got - want) > 1e-4:
            case = f"{dense[0].tolist()} pruned to {pruned[0].tolist()}"
            raise Wrong(f"for {case} you start at {got:.3f}; want {want:.3f}: {hint}")


Statistics = Callable[[Sequence[torch.Tensor]], tuple[torch.Tensor, torch.Tensor]]


@check("the mean and the variance of all values, however they come in batches")
def check_statistics(my_statistics: Statistics) -> None:
    """Check `my_statistics(batches)`: each channel's mean and unbiased variance over all batches together.

    `batches` are tensors `[n, channels, height, width]`, of different n; returned are two tensors
    `[channels]`.

    >>> def averaged(batches):
    ...     means = torch.stack([x.mean((0, 2, 3)) for x in batches])
    ...     return means.mean(0), torch.stack([x.var((0, 2, 3)) for x in batches]).mean(0)
    >>> check_statistics(averaged)
    ✗ not yet: the mean has -0.21269 at (0,); want -0.65017. Batches differ in size: do not average averages
    """
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(n, 2, 3, 3, generator=generator) - float(n == 8) for n in (8, 2, 1)]
    _statistics(my_statistics, batches, ". Batches differ in size: do not average averages")
    apart = [torch.randn(5, 2, 3, 3, generator=generator) + shift for shift in (0.0, 9.0)]
    _statistics(my_statistics, apart, ". What batches differ by is a part of the variance")


def _statistics(answer: Statistics, batches: list[torch.Tensor], hint: str) -> None:
    layer = nn.BatchNorm2d(2)
    recalibrate_batchnorm(layer, torch.cat(batches))
    got = call(answer, batches)
    if not isinstance(got, (tuple, list)) or len(got) != 2:
        raise Wrong("your function returns something else than two tensors, the mean and the variance")
    for what, found, want in zip(
        ("the mean", "the variance"), got, (layer.running_mean, layer.running_var), strict=True
    ):
        assert want is not None
        if what == "the variance" and _is_biased(found, batches):
            raise Wrong("the variance divides by the count; the unbiased one divides by one less")
        try:
            close(what, found, want, 1e-4)
        except Wrong as wrong:
            raise Wrong(f"{wrong}{hint}") from None


def _is_biased(found: object, batches: list[torch.Tensor]) -> bool:
    biased = torch.cat(batches).var((0, 2, 3), unbiased=False)
    if not torch.is_tensor(found) or found.shape != biased.shape:
        return False
    return torch.allclose(found.to(biased), biased, rtol=1e-4)
