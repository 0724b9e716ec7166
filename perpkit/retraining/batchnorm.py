"""Batch normalisation: which statistics a retraining moves, and re-estimating them in one pass."""

import math
from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .loop.evaluating import evaluating


def batchnorms(model: nn.Module) -> dict[str, _BatchNorm]:
    """The batch normalisations that hold running statistics, by name.

    >>> list(batchnorms(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))))
    ['1']
    """
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }


def frozen_batchnorms(model: nn.Module, parts: Iterable[str], trained: Iterable[str]) -> list[_BatchNorm]:
    """The batch normalisations whose statistics a subset leaves alone, so that they stay in evaluation mode.

    Statistics move with the parameters beside them, and in `norms`, `full` and every subset of PERP v1.

    >>> model = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2))
    >>> frozen_batchnorms(model, ["head"], ["1.weight", "1.bias"]) == [model[0]]
    True
    >>> frozen_batchnorms(model, ["biases"], ["0.bias", "1.bias"])
    []
    """
    if any(part in ("norms", "full") or part.startswith("perp_v1:") for part in parts):
        return []
    moved = {name.rpartition(".")[0] for name in trained}
    return [module for name, module in batchnorms(model).items() if name not in moved]


@torch.no_grad()
def recalibrate_batchnorm(model: nn.Module, inputs: torch.Tensor, *, batch: int = 256) -> None:
    """Re-estimate the statistics of every batch normalisation in place, in one pass without gradients.

    `inputs` is `[n, ...]`; it is read in nearly equal batches of at most `batch`, each normalised by its own
    statistics as in training. The new running statistics are the exact mean and unbiased variance of what
    reaches the layer over all inputs together, not an average over batches (BN-Recalibrate: PERP v1, 3.1).

    Floating-point inputs come in the dtype of the model.

    Raises ValueError for a model without batch normalisation, no inputs, a batch below 1, and one value for a
    channel, which has no variance; the model is then unchanged.

    >>> model = nn.Sequential(nn.BatchNorm1d(1))
    >>> recalibrate_batchnorm(model, torch.tensor([[1.0], [2.0], [6.0], [7.0]]), batch=2)
    >>> model[0].running_mean, round(float(model[0].running_var), 4)
    (tensor([4.]), 8.6667)
    """
    layers = batchnorms(model)
    if not layers:
        raise ValueError(f"a {type(model).__name__} has no batch normalisation to recalibrate")
    if not isinstance(inputs, torch.Tensor):
        raise ValueError(
            f"the inputs are a {type(inputs).__name__}; give a tensor [n, ...], such as images.train[0]"
        )
    if len(inputs) == 0 or batch < 1:
        raise ValueError(f"{len(inputs)} inputs in batches of {batch}: want at least one in each")
    gathered = {name: _Moments() for name in layers}
    hooks = [
        module.register_forward_pre_hook(lambda _, args, moments=gathered[name]: moments.add(args[0]))
        for name, module in layers.items()
    ]
    parameter = next(model.parameters())
    try:
        with evaluating(model):
            for module in layers.values():
                # In training mode without tracking it normalises by the batch and leaves its buffers alone.
                module.train()
                module.track_running_stats = False
            # Equal batches: a last one of a single input could not be normalised.
            for some in inputs.tensor_split(math.ceil(len(inputs) / batch)):
                model(some.to(parameter) if some.is_floating_point() else some.to(parameter.device))
    finally:
        for hook in hooks:
            hook.remove()
        for module in layers.values():
            module.track_running_stats = True
    for name, module in layers.items():
        gathered[name].write(module)


class _Moments:
    """Count, mean and sum of squared deviations of each channel, merged batch by batch in float64."""

    def __init__(self) -> None:
        self.count, self.batches = 0, 0
        self.mean = self.deviation = torch.zeros(())

    def add(self, values: torch.Tensor) -> None:
        # Read where they lie, in their own precision: sums of one picture's channel at a time lose nothing
        # that counts, and only these many are in float64.
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        channels = values.reshape(*values.shape[:2], -1)
        count = channels.shape[0] * channels.shape[2]
        mean = channels.sum(2).double().sum(0) / count
        norms = torch.linalg.vector_norm(channels - mean.to(values.dtype)[:, None], dim=2)
        deviation = norms.double().square().sum(0)
        if self.batches == 0:
            self.mean, self.deviation = torch.zeros_like(mean), torch.zeros_like(mean)
        total = self.count + count
        apart = mean - self.mean
        self.deviation = self.deviation + deviation + apart.square() * (self.count * count / total)
        self.mean = self.mean + apart * (count / total)
        self.count, self.batches = total, self.batches + 1

    def write(self, module: _BatchNorm) -> None:
        if self.count < 2:  # a layer that the model never calls
            return
        assert module.running_mean is not None
        assert module.running_var is not None
        module.running_mean.copy_(self.mean)
        module.running_var.copy_(self.deviation / (self.count - 1))
        if module.num_batches_tracked is not None:
            module.num_batches_tracked.fill_(self.batches)
