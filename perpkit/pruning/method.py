"""How the weights of one matrix are chosen: a criterion with its comparison group, pattern and parameters."""

import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import pairwise
from typing import Any

import torch

from . import criteria
from .frank_wolfe import sparsefw
from .inputs import Inputs
from .layers import Matrix
from .selection import select
from .sparsegpt import sparsegpt

FUNCTIONS: dict[str, Callable] = {
    "magnitude": criteria.magnitude,
    "random": criteria.random,
    "wanda": criteria.wanda,
    "ria": criteria.ria,
    "sparsegpt": sparsegpt,
    "sparsefw": sparsefw,
}
CRITERIA = tuple(FUNCTIONS)
CALIBRATED = ("wanda", "ria", "sparsegpt", "sparsefw")
NEEDS_GRAM = ("sparsegpt", "sparsefw")
GROUPS = ("row", "layer", "global")
# The group that each criterion's source compares in.
DEFAULT_GROUPS = {"magnitude": "layer", "random": "layer", "sparsegpt": "layer"}
# What a function takes that its caller does not choose.
_GIVEN = {"weight", "norms", "gram", "generator", "sparsity", "pattern", "group", "kept", "name"}


@dataclass(frozen=True)
class Method:
    """One way of pruning a matrix, its arguments understood. `order` numbers the matrices for the noise."""

    criterion: str
    group: str
    allocation: str
    pattern: tuple[int, int] | None
    seed: int
    order: Mapping[str, int]
    parameters: Mapping[str, Any]

    @classmethod
    def checked(
        cls, criterion: str, group: str | None, allocation: str | None, pattern, seed: int, names, parameters
    ) -> "Method":
        """The method of these arguments of `prune`.

        Raises ValueError for an unknown criterion, group or parameter, and for those that do not go together.
        """
        if criterion not in CRITERIA:
            near = get_close_matches(str(criterion), CRITERIA, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ";"
            raise ValueError(f"unknown criterion {criterion!r}{hint} the criteria are {', '.join(CRITERIA)}")
        if group not in (None, *GROUPS):
            raise ValueError(f"unknown comparison group {group!r}; the groups are {', '.join(GROUPS)}")
        valid = [name for name in inspect.signature(FUNCTIONS[criterion]).parameters if name not in _GIVEN]
        if unknown := set(parameters) - set(valid):
            takes = f"takes {', '.join(valid)}" if valid else "takes no further parameters"
            raise ValueError(f"prune has no parameter {min(unknown)!r}, and {criterion} {takes}")
        if group == "global" and allocation not in (None, "global"):
            raise ValueError(
                f"group='global' is an allocation of its own; {allocation!r} does not go with it"
            )
        if "global" in (group, allocation):
            if criterion in NEEDS_GRAM:
                raise ValueError(
                    f"{criterion} compares the weights of one layer: choose group='row' or 'layer'"
                )
            if group == "row" or pattern is not None:
                other = "a pattern" if pattern is not None else "group='row'"
                raise ValueError(f"a global threshold and {other} do not go together")
            group, allocation = "layer", "global"
        group = group or DEFAULT_GROUPS.get(criterion, "row")
        order = {name: number for number, name in enumerate(names)}
        return cls(criterion, group, allocation or "uniform", pattern, seed, order, dict(parameters))

    def scores(self, matrix: Matrix, inputs: Inputs | None, kept: torch.Tensor | None) -> torch.Tensor:
        """The score of every weight `[out, in]`; what was pruned before scores lowest of all."""
        weight = matrix.view(matrix.weight())
        if self.criterion == "random":
            # Each matrix has noise of its own, whichever others are scored, and how often.
            noise = torch.Generator().manual_seed((self.seed + 1_000_003 * self.order[matrix.name]) % 2**63)
            scores = criteria.random(weight, noise)
        elif self.criterion == "magnitude" or inputs is None or not inputs.tokens:
            scores = criteria.magnitude(weight)
        else:
            scores = FUNCTIONS[self.criterion](weight, inputs.norms(len(weight)), **self.parameters)
        return scores if kept is None else scores.masked_fill(~kept.to(scores.device), -torch.inf)

    def pruned(
        self, matrix: Matrix, inputs: Inputs | None, kept: torch.Tensor | None, sparsity: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The matrix `[out, in]` with its pruned weights zero, and its mask; the model is not changed.

        Warns when the criterion is calibrated and no calibration data reached the matrix.

        Raises ValueError for weights or scores that are NaN.
        """
        weight = matrix.view(matrix.weight())
        if sparsity == 0:
            # Also of SparseGPT, which would otherwise clear the columns of dead inputs.
            mask = torch.ones_like(weight, dtype=torch.bool) if kept is None else kept
            return torch.where(mask, weight, 0), mask
        unseen = inputs is not None and not inputs.tokens
        if unseen:
            warnings.warn(
                f"no calibration data reached {matrix.name!r}: it is pruned by magnitude", stacklevel=2
            )
        if self.criterion in NEEDS_GRAM and inputs is not None and not unseen:
            return self._with_gram(matrix.name, weight, inputs, kept, sparsity)
        scores = self.scores(matrix, inputs, kept)
        mask = select(scores, sparsity, group=self.group, pattern=self.pattern)
        # A group that had lost more than its share before keeps all its zeros.
        mask = mask if kept is None else mask & kept
        return torch.where(mask, weight, 0), mask

    def _with_gram(self, name: str, weight, inputs: Inputs, kept, sparsity: float):
        assert inputs.gram is not None
        options = {"pattern": self.pattern, "group": self.group, **self.parameters}
        found = []
        # The rows of each group of a grouped convolution have inputs of their own.
        rows = weight.chunk(len(inputs.gram))
        before = [None] * len(rows) if kept is None else kept.chunk(len(rows))
        shares = [sparsity] * len(rows)
        if self.group == "layer" and len(rows) > 1:
            # Rounded over all groups so far, so that the layer loses exactly its share.
            ends = [round(sparsity * weight.numel() * i / len(rows)) for i in range(len(rows) + 1)]
            shares = [(end - start) / rows[0].numel() for start, end in pairwise(ends)]
        for part, gram, held, share in zip(rows, inputs.gram, before, shares, strict=True):
            if self.criterion == "sparsegpt":
                found.append(sparsegpt(part, gram, sparsity=share, kept=held, name=name, **options))
            else:
                mask = sparsefw(part, gram, sparsity=share, kept=held, **options)
                found.append((torch.where(mask, part, 0), mask))
        weights, masks = zip(*found, strict=True)
        return torch.cat(weights), torch.cat(masks)


def output_error(before: torch.Tensor, after: torch.Tensor, inputs: Inputs | None) -> float:
    """The relative squared error of a matrix's output, `tr(D G Dᵀ) / tr(W G Wᵀ)` with `D = W − Ŵ`.

    Without a Gram matrix `G` is the diagonal of the squared norms of the inputs, without inputs the identity.

    >>> output_error(torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 4.0]]), None)
    0.36
    """

    def energy(matrix: torch.Tensor) -> float:
        if inputs is None or inputs.squares is None:
            return float(matrix.double().square().sum())
        rows = matrix.to(inputs.squares.dtype).unflatten(0, (len(inputs.squares), -1))
        if inputs.gram is None:
            return float((rows.square() * inputs.squares[:, None]).sum())
        return float(((rows @ inputs.gram) * rows).sum())

    whole = energy(before)
    return energy(before - after) / whole if whole else 0.0
