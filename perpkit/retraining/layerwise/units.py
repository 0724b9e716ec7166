"""The units of a reconstruction: a matrix, the attention or MLP part of a block, a block, a window of blocks.

A unit's forward pass is that of its block, ended as soon as the unit's output is there: so any architecture
will do, whatever its blocks hand from one part to the next.
"""

import re
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from ...pruning.calibration import Part
from ...pruning.layers import Matrix

UNITS = "'matrix', 'submodule', 'block' and 'window:n', n blocks together"


@dataclass
class Unit:
    """A piece of a model with an output: that of the module `output` or, when None, of the streamed part.

    `matrices` are those that are reconstructed, `modules` the names of all that belongs to it.
    """

    name: str
    matrices: list[Matrix]
    modules: list[str]
    output: str | None = None

    def forward(self, model: nn.Module, part: Part, i: int) -> torch.Tensor:
        """The unit's output in this model, which `part` is streamed from, for batch i of the data."""
        if self.output is None:
            return part.forward(i)
        return output_of(part, i, model.get_submodule(self.output))


def parse_unit(unit: str) -> tuple[str, int]:
    """The kind of a unit and how many blocks it spans.

    Raises ValueError for one that is none.

    >>> parse_unit("submodule"), parse_unit("window:3")
    (('submodule', 1), ('window', 3))
    """
    if unit in ("matrix", "submodule", "block"):
        return unit, 1
    if found := re.fullmatch(r"window:([1-9]\d*)", str(unit)):
        return "window", int(found[1])
    raise ValueError(f"unknown unit {unit!r}; the units are {UNITS}")


def groups(block: str, matrices: Iterable[Matrix]) -> dict[str, list[Matrix]]:
    """The matrices of a block by the child of the block that holds them, the attention or the MLP.

    Layers that are children themselves, as OPT's `fc1` and `fc2`, make up one part together.

    >>> import perpkit as pk
    >>> from perpkit.pruning.layers import prunable_matrices
    >>> model, _ = pk.load_model("tiny-opt", device="cpu")
    >>> matrices = prunable_matrices(model).values()
    >>> list(groups("model.decoder.layers.1", matrices))
    ['model.decoder.layers.1.self_attn', 'model.decoder.layers.1.fc1+fc2']
    """
    inside = [matrix for matrix in matrices if matrix.name.startswith(f"{block}.")]
    found: dict[str, list[Matrix]] = {}
    direct = []
    for matrix in inside:
        child, _, rest = matrix.parameter[len(block) + 1 :].partition(".")
        if "." in rest or matrix.expert is not None:
            found.setdefault(f"{block}.{child}", []).append(matrix)
        else:
            direct.append(matrix)
    if direct:
        found[f"{block}." + "+".join(m.parameter.split(".")[-2] for m in direct)] = direct
    return found


def submodules(part: Part, block: nn.Module, matrices: list[Matrix]) -> list[Unit]:
    """The attention and the MLP part of a block with those of these matrices in it, in the order of use.

    The output of a part is what its module returns, without the residual unless the module adds it; layers
    that lie in the block itself are a part from what enters the first to what leaves the last.

    Raises ValueError when a child of the block is never called, so that it has no output.
    """
    done: list[str] = []
    with ExitStack() as hooks:
        for key, child in block.named_children():
            hook = child.register_forward_hook(lambda *_, name=f"{part.name}.{key}": done.append(name))
            hooks.callback(hook.remove)
        with torch.no_grad():
            part.forward(0)
    found = []
    for name, its in groups(part.name, matrices).items():
        modules = [f"{part.name}.{key}" for key in name[len(part.name) + 1 :].split("+")]
        if missing := set(modules) - set(done):
            raise ValueError(
                f"the block {part.name!r} does not call {min(missing)!r} as a whole; take unit='block'"
            )
        last = max(modules, key=done.index)
        found.append((done.index(last), Unit(name, its, modules, last)))
    return [unit for _, unit in sorted(found, key=lambda pair: pair[0])]


def levels(part: Part, matrices: list[Matrix]) -> list[list[Matrix]]:
    """Matrices grouped by the input that they share, such as queries, keys and values, in the order of use.

    The first matrices of all experts of a mixture come together, and so do the second.
    """
    owners: dict[nn.Module, list[Matrix]] = {}
    for matrix in matrices:
        owners.setdefault(matrix.module, []).append(matrix)
    found: list[list[Matrix]] = []
    read: list[tuple[torch.Tensor, int, list[Matrix]]] = []

    def seen(module: nn.Module, arguments: tuple) -> None:
        its = owners.pop(module, None)
        if its is None:
            return
        x = arguments[0]
        if its[0].expert is not None:
            found.append([matrix for matrix in its if "down_proj" not in matrix.parameter])
            found.append([matrix for matrix in its if "down_proj" in matrix.parameter])
            return
        for tensor, version, others in read:
            # Each convolution has patches of its own.
            if tensor is x and version == x._version and not isinstance(module, _ConvNd):
                others.extend(its)
                return
        found.append(its)
        read.append((x, x._version, its))

    with ExitStack() as hooks:
        for module in owners:
            hooks.callback(module.register_forward_pre_hook(seen).remove)
        if part.batches:
            with torch.no_grad():
                part.forward(0)
    # What no data has reached stands at the end.
    return [its for its in found if its] + list(owners.values())


class _There(Exception):
    """The forward pass has come as far as it is needed."""


def output_of(part: Part, i: int, module: nn.Module) -> torch.Tensor:
    """What a module of a part returns for batch i of the calibration data; nothing after it is computed."""

    def there(module, arguments, output):
        raise _There(output)

    hook = module.register_forward_hook(there)
    try:
        part.forward(i)
    except _There as stopped:
        output = stopped.args[0]
        return output[0] if isinstance(output, tuple) else output
    finally:
        hook.remove()
    raise ValueError(f"batch {i} of the calibration data does not reach the {type(module).__name__}")


def inputs_of(part: Part, i: int, module: nn.Module) -> tuple[torch.Tensor, ...] | None:
    """What enters a module of a part for batch i of the calibration data; None when it is not reached."""

    def there(module, arguments):
        raise _There(arguments)

    hook = module.register_forward_pre_hook(there)
    try:
        with torch.no_grad():
            part.forward(i)
    except _There as stopped:
        return stopped.args[0]
    finally:
        hook.remove()
    return None


@contextmanager
def exchanged(pairs: list[tuple[nn.Parameter, torch.Tensor]]) -> Iterator[None]:
    """Inside, each parameter has the values of the tensor beside it, which itself is not touched.

    >>> layer, other = nn.Linear(1, 1), torch.tensor([[2.0]])
    >>> with exchanged([(layer.weight, other)]):
    ...     layer.weight.tolist()
    [[2.0]]
    """
    before = [(parameter, parameter.data) for parameter, _ in pairs]
    try:
        for parameter, values in pairs:
            parameter.data = values.detach().to(parameter)
        yield
    finally:
        for parameter, data in before:
            parameter.data = data
