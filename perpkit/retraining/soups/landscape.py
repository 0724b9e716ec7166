"""Where models lie: distances and angles, and the loss along a segment and over a plane between them."""

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pandas as pd
import torch
from torch import nn

from ...pruning.layers import prunable_matrices
from ..batchnorm import batchnorms
from ..loop.settings import check_whole
from .average import check_alike, combine, put, tensors_of

Loss = Callable[[nn.Module], float]
Prepare = Callable[[nn.Module], None]

# Closer to the line through the others than this share of its distance, a third model spans no plane: an
# average in float32 lies that far from it by rounding alone.
FLAT = 1e-6


def distances(models: Sequence[nn.Module], parent: nn.Module | None = None) -> pd.DataFrame:
    """How far models lie from each other: a row a pair, `one` and `other` being their places in the list.

    `distance` is the L2 distance of their parameters. `angle`, in degrees, lies between their differences
    from the common `parent` when it is given, such as the pruned model that all were retrained from; else
    between the parameters themselves; `between` says which. It is NaN where one of the vectors is zero.
    Computed in float64, buffers left out.

    Raises ValueError for fewer than two models, and naming a tensor in which they or the parent differ.

    >>> models = [nn.Linear(2, 1, bias=False) for _ in range(2)]
    >>> for model, row in zip(models, ([3.0, 0.0], [0.0, 4.0])):
    ...     _ = model.weight.data.copy_(torch.tensor([row]))
    >>> distances(models).to_dict("records")
    [{'one': 0, 'other': 1, 'distance': 5.0, 'angle': 90.0, 'between': 'weights'}]
    """
    if len(models) < 2:
        raise ValueError(f"{len(models)} models have no distance; give at least two")
    _check_models([*models, *([] if parent is None else [parent])])
    between = "weights" if parent is None else "differences from the parent"
    rows = []
    for i, j in itertools.combinations(range(len(models)), 2):
        rows.append((i, j, _distance(models[i], models[j]), _angle(models[i], models[j], parent), between))
    return pd.DataFrame(rows, columns=["one", "other", "distance", "angle", "between"])


def segment(
    a: nn.Module, b: nn.Module, loss: Loss, points: int = 11, prepare: Prepare | None = None
) -> pd.DataFrame:
    """The loss along the segment `(1 − t) a + t b` at `points` equally spaced t from 0 to 1.

    Columns: `t`, `loss`, and `above`, by how much the loss lies above the straight line between those of the
    two ends; its largest value is the `barrier`. `prepare(model)` changes the model of every point in place
    before `loss(model)` sees it, such as by re-estimating batch normalisations: interpolated statistics are
    not those of the model in between. `a` and `b` stay as they are.

    Raises ValueError for fewer than two points and models of differing shapes.

    >>> a, b = (nn.Linear(1, 1, bias=False) for _ in range(2))
    >>> _ = a.weight.data.fill_(-1.0), b.weight.data.fill_(1.0)
    >>> segment(a, b, lambda model: 2 - model.weight.item() ** 2, points=3).values.tolist()
    [[0.0, 1.0, 0.0], [0.5, 2.0, 1.0], [1.0, 1.0, 0.0]]
    """
    _check_points(points)
    probe = _Probe([a, b], loss, prepare)
    t = np.arange(points) / (points - 1)
    losses = np.array([probe([1 - at, at]) for at in t])
    return pd.DataFrame({"t": t, "loss": losses, "above": losses - ((1 - t) * losses[0] + t * losses[-1])})


def barrier(table: pd.DataFrame) -> float:
    """The height of the barrier on a `segment`: how far the loss rises above the line between its ends.

    Zero where it never does (Frankle et al. 2020, linear mode connectivity).

    >>> barrier(pd.DataFrame({"above": [0.0, 0.25, 0.0]}))
    0.25
    """
    return max(0.0, float(table["above"].max()))


def plane(
    a: nn.Module,
    b: nn.Module,
    c: nn.Module,
    loss: Loss,
    points: int = 15,
    margin: float = 0.25,
    prepare: Prepare | None = None,
) -> pd.DataFrame:
    """The loss on a grid over the plane through three models, and at the three themselves.

    With u = b − a and v = c − a − ⟨c − a, u⟩/‖u‖² u, the point (x, y) is `a + x u/‖u‖ + y v/‖v‖`, in units of
    the L2 norm of the parameters (Garipov et al. 2018). The grid has `points` · `points` points over the
    rectangle around the three, enlarged by `margin` of its width and height on each side. Columns: `x`, `y`,
    `loss` and `model`, which is None on the grid; the last three rows are `"a"`, `"b"` and `"c"`.
    `prepare(model)` changes the model of every point before `loss(model)`, as in `segment`. Floating-point
    buffers follow the parameters' coefficients.

    Raises ValueError for fewer than two points, a negative margin, models of differing shapes, three that lie
    on one line, and a variance that comes out negative beyond them where nothing is prepared.

    >>> models = [nn.Linear(2, 1, bias=False) for _ in range(3)]
    >>> for model, row in zip(models, ([0.0, 0.0], [2.0, 0.0], [1.0, 4.0])):
    ...     _ = model.weight.data.copy_(torch.tensor([row]))
    >>> table = plane(*models, lambda model: model.weight.sum().item(), points=2, margin=0.0)
    >>> table[["x", "y", "loss"]].values.tolist()[:4]
    [[0.0, 0.0, 0.0], [2.0, 0.0, 2.0], [0.0, 4.0, 4.0], [2.0, 4.0, 6.0]]
    >>> table.tail(1).to_dict("records")
    [{'x': 1.0, 'y': 4.0, 'loss': 5.0, 'model': 'c'}]
    """
    _check_points(points)
    if not 0 <= margin < math.inf:
        raise ValueError(f"margin is {margin}; it is a share of the width and height, at least 0")
    probe = _Probe([a, b, c], loss, prepare)
    width, along, height = _triangle(a, b, c)
    corners = {"a": (0.0, 0.0), "b": (width, 0.0), "c": (along, height)}
    rows: list[tuple[float, float, float, str | None]] = []
    for y in _axis([0.0, height], points, margin):
        for x in _axis([0.0, width, along], points, margin):
            third = y / height
            second = (x - third * along) / width
            rows.append((x, y, probe([1 - second - third, second, third]), None))
    for i, (name, (x, y)) in enumerate(corners.items()):
        rows.append((x, y, probe([float(i == j) for j in range(3)]), name))
    return pd.DataFrame(rows, columns=["x", "y", "loss", "model"])


def naive_average_sparsity(models: Sequence[nn.Module]) -> pd.DataFrame:
    """What averaging does to the sparsity of models that were pruned on their own: a row a matrix.

    Columns: `layer`, `weights`, `models`, the mean sparsity of the models, and `average`, that of their
    average, both counted as exact zeros; the last row, `"all"`, is over all prunable matrices. Where m models
    of sparsity s prune independently, the average keeps a sparsity of about s^m; with one common mask, s.

    Raises ValueError for no models and models of differing shapes.

    >>> models = [nn.Linear(2, 1, bias=False) for _ in range(2)]
    >>> for model, row in zip(models, ([3.0, 0.0], [0.0, 4.0])):
    ...     _ = model.weight.data.copy_(torch.tensor([row]))
    >>> naive_average_sparsity(models).to_dict("records")[-1]
    {'layer': 'all', 'weights': 2, 'models': 0.5, 'average': 0.0}
    """
    _check_models(models)
    rows = []
    for together in zip(*(prunable_matrices(model).values() for model in models), strict=True):
        weights = [{"w": matrix.view(matrix.weight().detach())} for matrix in together]
        mean = combine(weights, [1.0] * len(weights))["w"]
        zeros = sum(int((each["w"] == 0).sum()) for each in weights) / len(weights)
        rows.append((together[0].name, mean.numel(), zeros, int((mean == 0).sum())))
    table = pd.DataFrame(rows, columns=["layer", "weights", "models", "average"])
    table.loc[len(table)] = ["all", *table[["weights", "models", "average"]].sum()]
    table["weights"] = table["weights"].astype(int)
    return table.assign(
        models=table["models"] / table["weights"], average=table["average"] / table["weights"]
    )


class _Probe:
    """The loss of affine combinations of models, all in one working copy."""

    def __init__(self, models: Sequence[nn.Module], loss: Loss, prepare: Prepare | None):
        _check_models(models)
        self.states = [tensors_of(model) for model in models]
        self.loss, self.prepare = loss, prepare
        self.model = copy.deepcopy(models[0])

    def __call__(self, coefficients: Sequence[float]) -> float:
        put(self.model, combine(self.states, coefficients))
        if self.prepare is not None:
            self.prepare(self.model)
        for name, layer in batchnorms(self.model).items():
            if layer.running_var is not None and layer.running_var.min() < 0:
                raise ValueError(
                    f"beyond the models the variance of the batch normalisation {name!r} is negative; give "
                    "prepare=lambda model: recalibrate_batchnorm(model, inputs)"
                )
        with torch.no_grad():
            return float(self.loss(self.model))


def _check_models(models: Sequence[nn.Module]) -> None:
    check_alike([tensors_of(model) for model in models])


def _check_points(points: int) -> None:
    check_whole(points=points)
    if points < 2:
        raise ValueError(f"points is {points}; there must be at least 2")


def _axis(places: Sequence[float], points: int, margin: float) -> list[float]:
    room = margin * (max(places) - min(places))
    return np.linspace(min(places) - room, max(places) + room, points).tolist()


def _triangle(a: nn.Module, b: nn.Module, c: nn.Module) -> tuple[float, float, float]:
    """‖b − a‖, and how far c lies along b − a and beside it."""
    width, side = _distance(a, b), _distance(a, c)
    along = sum(float(u @ v) for u, v in _pairs(b, c, a)) / width if width else 0.0
    beside = (
        sum(float((v - u * (along / width)).square().sum()) for u, v in _pairs(b, c, a)) if width else 0.0
    )
    if math.sqrt(beside) <= FLAT * side:
        raise ValueError("the three models lie on one line and span no plane; give three different ones")
    return width, along, math.sqrt(beside)


def _pairs(
    one: nn.Module, other: nn.Module, parent: nn.Module | None = None
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The parameters of two models as float64 vectors, or their differences from the parent's."""
    theirs, origin = dict(other.named_parameters()), dict(parent.named_parameters()) if parent else {}
    for name, parameter in one.named_parameters():
        vectors = [p.detach().double().flatten() for p in (parameter, theirs[name].to(parameter.device))]
        if parent is not None:
            start = origin[name].detach().to(vectors[0]).flatten()
            vectors = [vector - start for vector in vectors]
        yield vectors[0], vectors[1]


def _distance(one: nn.Module, other: nn.Module) -> float:
    return math.sqrt(sum(float((u - v).square().sum()) for u, v in _pairs(one, other)))


def _angle(one: nn.Module, other: nn.Module, parent: nn.Module | None) -> float:
    """The angle between two vectors in degrees, exact also where its cosine is nearly 1 (Kahan)."""
    squares = [(float(u.square().sum()), float(v.square().sum())) for u, v in _pairs(one, other, parent)]
    first, second = (math.sqrt(sum(column)) for column in zip(*squares, strict=True))
    if not first or not second:
        return math.nan
    apart = together = 0.0
    for u, v in _pairs(one, other, parent):
        u, v = u / first, v / second
        apart += float((u - v).square().sum())
        together += float((u + v).square().sum())
    return math.degrees(2 * math.atan2(math.sqrt(apart), math.sqrt(together)))
