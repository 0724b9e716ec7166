"""Which matrices an adapter is attached to."""

from collections.abc import Iterable

from torch import nn

from ...pruning.layers import Matrix, prunable_matrices
from ...pruning.masks import Masks
from .modules import adapted_modules


def chosen_matrices(
    model: nn.Module, masks: Masks | None, targets: Iterable[str] | None
) -> dict[str, list[Matrix]]:
    """The matrices to adapt by the parameter they lie in; None means every masked or else prunable matrix.

    Raises ValueError for a target that no prunable matrix is called by, and for None when there are adapters.

    >>> model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    >>> list(chosen_matrices(model, None, ["1"]))
    ['1.weight']
    """
    adapted = adapted_modules(model)
    if adapted and targets is None:
        raise ValueError(f"{min(adapted)!r} already has adapters; merge(model) first, or name other targets")
    everything = matrices_by_parameter(model)
    if targets is None:
        names = list(everything) if masks is None else list(masks)
        return {name: everything[name] for name in names if name in everything}
    if isinstance(targets, str):
        targets = [targets]
    found: set[str] = set()
    for target in targets:
        hits = {name for name in everything if any(_ends(part, target) for part in _names(name))}
        if not hits:
            ends = sorted({_names(name)[-1].rpartition(".")[2] for name in everything})
            raise ValueError(
                f"no prunable layer is called {target!r} or ends in it; the layers end in {', '.join(ends)}"
            )
        found |= hits
    return {name: matrices for name, matrices in everything.items() if name in found}


def matrices_by_parameter(model: nn.Module) -> dict[str, list[Matrix]]:
    """The prunable matrices by the parameter they lie in; a fused mixture's experts share one.

    >>> list(matrices_by_parameter(nn.Linear(3, 2)))
    ['weight']
    """
    grouped: dict[str, list[Matrix]] = {}
    for matrix in prunable_matrices(model).values():
        grouped.setdefault(matrix.parameter, []).append(matrix)
    return grouped


def _names(parameter: str) -> list[str]:
    """What a parameter can be targeted by: its own name and its module's."""
    module, _, key = parameter.rpartition(".")
    return [parameter, module] if key == "weight" else [module, parameter]


def _ends(name: str, target: str) -> bool:
    return bool(target) and (name == target or name.endswith("." + target))
