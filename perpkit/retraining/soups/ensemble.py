"""The output ensemble: what the candidates of a soup predict together."""

import math
from collections.abc import Sequence

import torch
from torch import nn


class Ensemble(nn.Module):
    """Models whose predicted probabilities are averaged; it gives the logarithm of the mean as logits.

    `softmax` of what it returns is the mean of the members' softmax, over classes or over the next token. It
    is called as its members are and returns what they do, a tensor `[..., classes]` or an output of
    transformers with these `logits` and nothing else, so what evaluates a model evaluates it as well. The
    logits are float32 at least. The members are the models themselves, not copies.

    Raises ValueError without models.

    >>> models = [nn.Linear(1, 2, bias=False) for _ in range(2)]
    >>> for model, row in zip(models, ([0.0, 100.0], [0.0, 0.0])):
    ...     _ = model.weight.data.copy_(torch.tensor([row]).T)
    >>> Ensemble(models)(torch.ones(1, 1)).softmax(-1)
    tensor([[0.2500, 0.7500]], grad_fn=<SoftmaxBackward0>)
    """

    def __init__(self, models: Sequence[nn.Module]):
        super().__init__()
        if not len(models):
            raise ValueError("an ensemble of no models predicts nothing; give at least one")
        self.members = nn.ModuleList(models)
        if (config := getattr(models[0], "config", None)) is not None:
            # Evaluations read the vocabulary and the context from it.
            self.config = config

    def forward(self, *inputs, **named):
        """The logarithm of the members' mean probabilities, as logits."""
        total: torch.Tensor | None = None
        for member in self.members:
            output = member(*inputs, **named)
            logits = output if isinstance(output, torch.Tensor) else output.logits
            mine = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
            total = mine if total is None else torch.logaddexp(total, mine)
        assert total is not None
        logits = total - math.log(len(self.members))
        return logits if isinstance(output, torch.Tensor) else type(output)(logits=logits)
