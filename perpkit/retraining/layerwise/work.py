"""The work of a reconstruction, one streamed part of the model after the other."""

import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pandas as pd
import torch
from torch import nn

from ...pruning.calibration import Part
from ...pruning.inputs import expert_rows, input_rows
from ...pruning.layers import Matrix, block_name
from ...pruning.masks import Masks
from .descent import Descent, Forward, relative_error
from .optimum import Moments, optimum
from .units import Unit, exchanged, inputs_of, levels, submodules


@dataclass(frozen=True)
class Reconstructed:
    """One unit is reconstructed: what `on_unit` is told.

    `before`, `after` and `optimum` are relative squared errors of its output, `optimum` NaN where the unit is
    no single matrix. `done` of `total` units are reconstructed.
    """

    unit: str
    before: float
    after: float
    optimum: float
    seconds: float
    done: int
    total: int


@dataclass
class Layerwise:
    """One call of `reconstruct`, after its arguments are understood."""

    model: nn.Module
    dense: nn.Module
    masks: Masks
    kind: str
    solver: str
    descent: Descent
    ridge: float
    total: int
    on_unit: Callable[[Reconstructed], None] | None = None
    cancelled: Callable[[], bool] | None = None
    rows: list[tuple[str, float, float, float]] = field(default_factory=list)
    stopped: bool = False

    def table(self) -> pd.DataFrame:
        """The errors of the units done so far."""
        return pd.DataFrame(self.rows, columns=["unit", "before", "after", "optimum"])

    def done(self, part: Part, twin: Part | None, matrices: list[Matrix]) -> Iterator[None]:
        """Reconstruct the matrices of a part, and pause after every unit.

        `twin` is the same part of the dense model, on the inputs of the dense model; None for propagated
        targets.
        """
        if self.kind == "matrix":
            for level in levels(part, matrices):
                yield from self._level(part, twin, level)
            return
        units = (
            submodules(part, self.model.get_submodule(part.name), matrices)
            if self.kind == "submodule"
            else [Unit(part.name, matrices, list(dict.fromkeys(map(block_name, part.matrices))))]
        )
        for unit in units:
            if unit.matrices and not self._stop():
                yield from self._trained(part, twin, unit)

    def _stop(self) -> bool:
        self.stopped = self.stopped or (self.cancelled is not None and self.cancelled())
        return self.stopped

    def _trained(self, part: Part, twin: Part | None, unit: Unit) -> Iterator[None]:
        started = time.perf_counter()
        batches = range(part.batches)
        if twin is None:
            with exchanged(self._pairs(unit)):
                targets = [unit.forward(self.model, part, i) for i in batches]
        else:
            device = unit.matrices[0].weight().device
            targets = [unit.forward(self.dense, twin, i).to(device) for i in batches]
        _require_finite(unit.name, targets)

        def forward(i: int) -> torch.Tensor:
            return unit.forward(self.model, part, i)

        before = relative_error(forward, targets)
        after = self._descended(
            unit.name, unit.matrices, forward, targets, before, lambda: relative_error(forward, targets)
        )
        if after is not None:
            self._note(unit.name, before, after, math.nan, started)
            yield

    def _pairs(self, unit: Unit) -> list[tuple[nn.Parameter, torch.Tensor]]:
        return [
            (parameter, self.dense.get_submodule(name).get_parameter(key))
            for name in unit.modules
            for key, parameter in self.model.get_submodule(name).named_parameters()
        ]

    def _level(self, part: Part, twin: Part | None, level: list[Matrix]) -> Iterator[None]:
        """Reconstruct matrices that read the same input."""
        if self._stop():
            return
        moments = self._moments(part, twin, level)
        for matrix in level:
            if self._stop():
                return
            started = time.perf_counter()
            its = moments[matrix.name]
            if not its.tokens:
                warnings.warn(f"no calibration data reached {matrix.name!r}: it stays as it is", stacklevel=2)
                self._note(matrix.name, math.nan, math.nan, math.nan, started)
                yield
                continue
            dense = matrix.view(self._dense(matrix)).to(matrix.weight())
            energy = its.target(dense)

            def error(weight: torch.Tensor, its=its, dense=dense, energy=energy) -> float:
                return float(its.errors(weight, dense).sum()) / energy if energy else 0.0

            def now(matrix=matrix, error=error) -> float:
                return error(matrix.view(matrix.weight()))

            before = now()
            best = self._best(matrix, dense, its, 0.0)
            least = min(error(best), before)
            if self.solver == "exact":
                new = best if not self.ridge else self._best(matrix, dense, its, self.ridge)
                after: float | None = self._assigned(matrix, new, before, now)
            else:
                forward, targets = self._alone(part, twin, matrix)
                after = self._descended(matrix.name, [matrix], forward, targets, before, now)
            if after is None:
                return
            self._note(matrix.name, before, after, least, started)
            yield

    def _best(self, matrix: Matrix, dense: torch.Tensor, moments: Moments, ridge: float) -> torch.Tensor:
        mask = matrix.view(self.masks[matrix.parameter].to(dense.device))
        return optimum(matrix.view(matrix.weight()), dense, mask, moments, ridge=ridge)

    def _dense(self, matrix: Matrix) -> torch.Tensor:
        return self.dense.get_parameter(matrix.parameter).detach()

    def _moments(self, part: Part, twin: Part | None, level: list[Matrix]) -> dict[str, Moments]:
        first, module = level[0], level[0].module
        other = self.dense.get_submodule(first.parameter.rpartition(".")[0])
        several = level if first.expert is not None else level[:1]
        found = {matrix.name: Moments() for matrix in several}
        for i in range(part.batches):
            mine = inputs_of(part, i, module)
            theirs = inputs_of(twin, i, other) if twin is not None else None
            if mine is None:
                continue
            for matrix in several:
                # The dense expert answers for the tokens that the pruned model sends here.
                rows = _rows(module, matrix, mine[0], mine[1:])
                wanted = _rows(other, matrix, theirs[0], mine[1:]) if theirs is not None else None
                found[matrix.name].add(rows, wanted)
        for name, moments in found.items():
            _require_finite(name, [m for m in (moments.gram, moments.drift) if m is not None])
        return {matrix.name: found.get(matrix.name, found[first.name]) for matrix in level}

    def _alone(self, part: Part, twin: Part | None, matrix: Matrix) -> tuple[Forward, list[torch.Tensor]]:
        """The forward pass of one layer on its own inputs, and its targets."""
        module, weight = matrix.module, matrix.weight()
        other = self.dense.get_submodule(matrix.parameter.rpartition(".")[0])
        batches = range(part.batches)
        inputs = [found[0] for i in batches if (found := inputs_of(part, i, module))]
        wanted = inputs
        if twin is not None:
            wanted = [found[0].to(weight) for i in batches if (found := inputs_of(twin, i, other))]
        with exchanged([(weight, self._dense(matrix))]):
            targets = [module(x) for x in wanted]
        return lambda i: module(inputs[i]), targets

    def _assigned(self, matrix: Matrix, new: torch.Tensor, before: float, now: Callable[[], float]) -> float:
        with _put_back([matrix]) as put_back:
            matrix.assign(matrix.weight(), new)
            after = now()
            if not after <= before:
                # Weights in 16 bits may be at the optimum already, up to their rounding.
                put_back()
                return before
        return after

    def _descended(
        self,
        name: str,
        matrices: list[Matrix],
        forward: Forward,
        targets: list[torch.Tensor],
        before: float,
        error: Callable[[], float],
    ) -> float | None:
        """Train by gradients and return the error after; None when cancelled, with all as it was."""
        if before == 0:
            return 0.0
        with _put_back(matrices) as put_back:
            if not self.descent.run(self.model, matrices, self.masks, forward, targets, self._stop):
                put_back()
                return None
            after = error()
            if after <= before:
                return after
            put_back()
        warnings.warn(
            f"{name!r} got worse, from an error of {before:.3g} to {after:.3g}, and is as it was; try "
            f"lr={self.descent.lr / 10:g}",
            stacklevel=2,
        )
        return before

    def _note(self, unit: str, before: float, after: float, optimum: float, started: float) -> None:
        self.rows.append((unit, before, after, optimum))
        if self.on_unit is not None:
            seconds = time.perf_counter() - started
            self.on_unit(Reconstructed(unit, before, after, optimum, seconds, len(self.rows), self.total))


@contextmanager
def _put_back(matrices: list[Matrix]) -> Iterator[Callable[[], None]]:
    """What brings back the matrices as they were; an exception does it too."""
    before = [(matrix, matrix.part(matrix.weight()).clone()) for matrix in matrices]

    def put_back() -> None:
        for matrix, values in before:
            matrix.part(matrix.weight()).copy_(values)

    try:
        yield put_back
    except BaseException:
        put_back()
        raise


def _rows(module: nn.Module, matrix: Matrix, x: torch.Tensor, routing: tuple) -> torch.Tensor:
    """The rows that meet a matrix when `x` enters its module; a mixture is told the routing as well."""
    if matrix.expert is None:
        return input_rows(module, x)
    chosen = routing[0].flatten(0, -2).to(x.device)
    return expert_rows(module, matrix.expert, x.flatten(0, -2), chosen)["down_proj" in matrix.parameter]


def _require_finite(name: str, tensors: list[torch.Tensor]) -> None:
    if not all(bool(tensor.isfinite().all()) for tensor in tensors):
        raise ValueError(f"an activation that enters or leaves {name!r} is NaN or infinite")
