"""The batch statistics of an average: not the average of its models', and so re-estimated."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..batchnorm import batchnorms, recalibrate_batchnorm
from ..loop.tasks import Data
from ..subsets import dotted
from .average import States
from .candidates import DEFAULTS

# Inputs that say a soup's batch statistics: more change nothing that is seen, and an average is to be cheap.
REESTIMATED = 2048


def reestimate(model: nn.Module, data: Data, retraining: Mapping[str, Any]) -> None:
    """Re-estimate a model's batch statistics in place, from inputs as its retraining has seen them.

    >>> model, inputs = nn.Sequential(nn.BatchNorm1d(1)), torch.tensor([[1.0], [2.0], [6.0], [7.0]])
    >>> reestimate(model, (inputs, torch.zeros(4)), {"batch": 4})
    >>> model[0].running_mean
    tensor([4.])
    """
    inputs = data if isinstance(data, torch.Tensor) else data[0]
    if len(inputs) > REESTIMATED:
        chosen = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))
        inputs = inputs[chosen[:REESTIMATED]]
    if (augment := retraining.get("augment")) is not None:
        # Without, the average would be normalised to other inputs than its weights have learnt.
        inputs = augment(inputs, torch.Generator().manual_seed(0))
    # In batches as in training, which also stay in the processor's cache; equal parts of at most three
    # inputs are never of a single one, which could not be normalised.
    recalibrate_batchnorm(model, inputs, batch=max(3, retraining.get("batch", DEFAULTS["batch"])))


def statistics_moved(model: nn.Module, states: Sequence[States]) -> bool:
    """Whether the retraining of a model, which gave these states, has moved batch statistics.

    Where it froze them, as for the head alone, the weights were trained to these and no others.

    >>> model = nn.Sequential(nn.BatchNorm1d(1))
    >>> statistics_moved(model, [model.state_dict()])
    False
    """
    return any(
        not torch.equal(state[dotted(prefix, name)], buffer.cpu())
        for prefix, layer in batchnorms(model).items()
        for name, buffer in layer.named_buffers()
        for state in states
    )
