"""Gradual freezing and unfreezing of a model's layers while it is retrained (PERP v1, section 3.4)."""

import contextlib
from collections.abc import Callable, Sequence

import pandas as pd
from torch import nn

from ..pruning.layers import is_language_model, prunable_matrices
from .loop.settings import check_whole
from .subsets import subset_parameters

GRADUAL = ("freeze", "unfreeze")


def gradual_layers(
    layers: Sequence[str], stage: int, stages: int, *, gradual: str, reverse: bool = False
) -> list[str]:
    """The layers that train in a stage, counted from 0, of a gradual freezing or unfreezing.

    By stage e the first `⌊(e + 1) / stages · n⌋` of n layers are frozen, or unfrozen, from the input on, or
    with `reverse` as many from the output back.

    >>> [gradual_layers("abcd", stage, 4, gradual="freeze") for stage in range(4)]
    [['b', 'c', 'd'], ['c', 'd'], ['d'], []]
    >>> [gradual_layers("abcd", stage, 4, gradual="unfreeze", reverse=True) for stage in range(4)]
    [['d'], ['c', 'd'], ['b', 'c', 'd'], ['a', 'b', 'c', 'd']]
    """
    count = (stage + 1) * len(layers) // stages
    first = len(layers) - count if reverse else count
    touched = (layers[first:], layers[:first]) if reverse else (layers[:first], layers[first:])
    return list(touched[gradual == "freeze"])


def freezable_layers(model: nn.Module) -> list[str]:
    """The weights that gradual freezing turns on and off, in the order of the model.

    These are the prunable matrices without the classifier: it, biases and normalisations always train.

    >>> from perpkit.sources.resnet import CifarResNet
    >>> len(freezable_layers(CifarResNet(20)))
    19
    """
    names = dict.fromkeys(matrix.parameter for matrix in prunable_matrices(model).values())
    if not is_language_model(model):
        with contextlib.suppress(ValueError):
            for name in subset_parameters(model, "head"):
                names.pop(name, None)
    return list(names)


def gradual_plan(
    model: nn.Module, gradual: str, *, reverse: bool = False, stages: int = 5, subset: str = "full"
) -> pd.DataFrame:
    """What trains in each stage of a cycle: a row a stage with its layers and the share of parameters.

    `gradual` is `"freeze"`, which freezes one more part of the layers in each stage, from the first on until
    none of them trains; or `"unfreeze"`, which begins with one part and ends with all. It goes from the input
    to the output, or with `reverse` from the output to the input. The columns are stage, layers and
    trainable_share; the mean of the last is the aggregated share of table 3 (PERP v1), whose stages are the
    five epochs of a cycle.

    Raises ValueError for an unknown `gradual`, stages below 1, a subset without layers to freeze, and a stage
    that would train nothing.

    >>> from perpkit.sources.resnet import CifarResNet
    >>> plan = gradual_plan(CifarResNet(20), "unfreeze", reverse=True)
    >>> plan["layers"].tolist(), plan["trainable_share"].round(3).tolist()
    ([3, 7, 11, 15, 19], [0.418, 0.793, 0.93, 0.973, 1.0])
    """
    if gradual not in GRADUAL:
        raise ValueError(f"gradual is {gradual!r}; want 'freeze' or 'unfreeze'")
    check_whole(stages=stages)
    if stages < 1:
        raise ValueError(f"stages is {stages}; it must be at least 1")
    trained = subset_parameters(model, subset)
    layers = [name for name in freezable_layers(model) if name in trained]
    if not layers:
        raise ValueError(f"the subset {subset!r} trains no layers that could be frozen; take 'full'")
    total = sum(parameter.numel() for parameter in model.parameters())
    always = sum(parameter.numel() for name, parameter in trained.items() if name not in layers)
    rows = []
    for stage in range(stages):
        active = gradual_layers(layers, stage, stages, gradual=gradual, reverse=reverse)
        if not active and not always:
            raise ValueError(
                f"stage {stage + 1} of {stages} would train nothing: {subset!r} has only layers here; want "
                "'unfreeze' in no more stages than layers"
            )
        rows.append((stage, len(active), (always + sum(trained[name].numel() for name in active)) / total))
    return pd.DataFrame(rows, columns=["stage", "layers", "trainable_share"])


class Freezer:
    """Turns layers on and off while `retrain` runs, which asks `stop` and then `cancelled` before every step.

    A layer without gradients is left out by the optimiser, and its gradient is not computed.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    >>> freezer = Freezer(model, "full", steps=4, stages=2, gradual="freeze")
    >>> _ = freezer.cancelled(None)()
    >>> [parameter.requires_grad for parameter in model.parameters()][::2]
    [False, True, True]
    """

    def __init__(
        self,
        model: nn.Module,
        subset: str,
        steps: int,
        stages: int,
        gradual: str,
        reverse: bool = False,
    ):
        self.steps, self.stages, self.gradual, self.reverse = steps, stages, gradual, reverse
        trained = subset_parameters(model, subset)
        self.layers = {name: trained[name] for name in freezable_layers(model) if name in trained}
        self.step = 0

    def stage(self, step: int) -> int:
        """The stage that a step, counted from 0, belongs to."""
        return step * self.stages // self.steps

    def stop(self, inner: Callable[[Sequence[float]], bool] | None) -> Callable[[Sequence[float]], bool]:
        """An early stop for `retrain` that notes the step, also when it goes on from a checkpoint."""

        def stop(losses: Sequence[float]) -> bool:
            self.step = len(losses)
            return inner is not None and inner(losses)

        return stop

    def cancelled(self, inner: Callable[[], bool] | None) -> Callable[[], bool]:
        """A `cancelled` for `retrain` that lets the layers of this step train, and no others."""

        def cancelled() -> bool:
            active = gradual_layers(
                list(self.layers),
                self.stage(self.step),
                self.stages,
                gradual=self.gradual,
                reverse=self.reverse,
            )
            for name, parameter in self.layers.items():
                parameter.requires_grad_(name in active)
            return inner is not None and inner()

        return cancelled
