"""What enters a matrix during forward passes: norms and Gram matrices of its inputs."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .layers import Matrix

# Tokens that a tensor core sums: as many leave an error like that of sums in float32.
SUMMED = 1024


@dataclass
class Inputs:
    """Sums over the calibration tokens that entered a matrix: tokens, squares `[groups, in]`, and the Gram
    matrices `XᵀX` `[groups, in, in]` when they were asked for. Only a grouped convolution has several groups.
    """

    tokens: int = 0
    squares: torch.Tensor | None = None
    gram: torch.Tensor | None = None

    def add(self, rows: torch.Tensor, with_gram: bool) -> None:
        """Count in more inputs `[groups, tokens, in]`, in float32 at least."""
        rows = rows.detach()
        squares = rows.to(torch.promote_types(rows.dtype, torch.float32)).square().sum(1)
        self.squares = squares if self.squares is None else self.squares.add_(squares)
        if with_gram:
            self.gram = added_gram(self.gram, rows)
        self.tokens += rows.shape[1]

    def norms(self, out: int) -> torch.Tensor:
        """The norm of every input `‖X[:, j]‖₂`, `[in]`, or `[out, in]` for a grouped convolution."""
        assert self.squares is not None
        norms = self.squares.sqrt()
        return norms[0] if len(norms) == 1 else norms.repeat_interleave(out // len(norms), 0)


def added_gram(total: torch.Tensor | None, rows: torch.Tensor) -> torch.Tensor:
    """`total + XᵀX` for inputs `[groups, tokens, in]`, `[groups, in, in]` in float32 at least; `total` may
    be written to.

    >>> added_gram(None, torch.tensor([[[1.0, 2.0]]])).tolist()
    [[[1.0, 2.0], [2.0, 4.0]]]
    """
    wide = torch.promote_types(rows.dtype, torch.float32)
    if rows.is_cuda and rows.dtype != wide and "dtype" in torch.ops.aten.baddbmm.overloads():
        # Products of 16-bit numbers are exact in float32, and tensor cores form them ten times as fast; but
        # they cut their sums off instead of rounding them, so that a long one would come out too small.
        for some in rows.split(SUMMED, dim=1):
            if total is None:
                total = torch.bmm(some.mT, some, out_dtype=wide)
            else:
                total = torch.baddbmm(total, some.mT, some, out_dtype=wide)
        assert total is not None
        return total
    rows = rows.to(wide)
    return rows.mT @ rows if total is None else total.baddbmm_(rows.mT, rows)


def input_rows(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The inputs that meet each row of a layer's matrix, `[groups, tokens, in]`.

    For a convolution these are its patches, in the order in which its weight is flattened.

    Raises ValueError for a three-dimensional convolution.

    >>> input_rows(nn.Conv2d(2, 4, 3, groups=2), torch.zeros(5, 2, 6, 6)).shape
    torch.Size([2, 80, 9])
    """
    if not isinstance(module, nn.Conv1d | nn.Conv2d):
        if isinstance(module, nn.Conv3d):
            raise ValueError("three-dimensional convolutions can be pruned by magnitude or at random only")
        return x.flatten(0, -2)[None]
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = F.pad(x, module._reversed_padding_repeated_twice, mode)
    if isinstance(module, nn.Conv1d):
        x = x.unsqueeze(2)
    size, stride, dilation = (
        tuple(each) if len(each) == 2 else (1, *each)
        for each in (module.kernel_size, module.stride, module.dilation)
    )
    patches = F.unfold(x, size, dilation=dilation, stride=stride)
    return patches.unflatten(1, (module.groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)


def expert_rows(module: Any, expert: int, hidden: torch.Tensor, chosen: torch.Tensor) -> list[torch.Tensor]:
    """The inputs of an expert's two matrices, `[1, tokens, in]` each, from the tokens routed to it."""
    rows = hidden[(chosen == expert).any(-1)]
    weight = module.get_parameter("gate_up_proj")[expert]
    transposed = getattr(module, "is_transposed", False)
    both = rows @ weight if transposed else F.linear(rows, weight)
    if getattr(module, "has_bias", False):
        both = both + module.get_parameter("gate_up_proj_bias")[expert]
    if hasattr(module, "_apply_gate"):
        inner = module._apply_gate(both)
    else:
        gate, up = both.chunk(2, dim=-1)
        inner = module.act_fn(gate) * up
    return [rows[None], inner[None]]


def _expert(matrix: Matrix) -> int:
    assert matrix.expert is not None
    return matrix.expert


@contextmanager
def recorded(matrices: dict[str, Matrix], *, gram: bool) -> Iterator[dict[str, Inputs]]:
    """Gather the inputs of these matrices from every forward pass inside, by the matrices' names.

    Matrices that read the same tensor (queries, keys and values) share one `Inputs`. A matrix that saw no
    token (an expert that nothing was routed to) has `tokens == 0`.

    Raises ValueError, when the block ends, for an activation that is NaN or infinite, naming the layer.
    """
    found = {name: Inputs() for name in matrices}
    by_module: dict[nn.Module, list[Matrix]] = {}
    for matrix in matrices.values():
        by_module.setdefault(matrix.module, []).append(matrix)
    # The tensor last read and how often it had been written to, by the name of the first matrix that read it.
    last: dict[str, tuple[torch.Tensor, int]] = {}

    def layer(module: nn.Module, arguments: tuple) -> None:
        x = arguments[0]
        name = by_module[module][0].name
        version = 0 if x.is_inference() else x._version
        for other, (seen, then) in last.items():
            same = seen is x and then == version and other != name
            if same and (found[name] is found[other] or not found[name].tokens):
                found[name] = found[other]
                return
        # Holding the tensor also keeps another from taking its place in memory.
        last[name] = x, version
        found[name].add(input_rows(module, x), gram)

    def experts(module: nn.Module, arguments: tuple) -> None:
        hidden, chosen = (tensor.flatten(0, -2) for tensor in arguments[:2])
        for expert, its in groupby(sorted(by_module[module], key=_expert), key=_expert):
            first, second = expert_rows(module, expert, hidden, chosen)
            for matrix in its if first.shape[1] else ():
                found[matrix.name].add(second if "down_proj" in matrix.parameter else first, gram)

    with ExitStack() as hooks:
        for module, its in by_module.items():
            hook = layer if its[0].expert is None else experts
            hooks.callback(module.register_forward_pre_hook(hook).remove)
        yield found
    for name, inputs in found.items():
        if inputs.squares is not None and not inputs.squares.isfinite().all():
            raise ValueError(
                f"an activation that enters {name!r} is NaN or infinite: a weight before it is, or 16 bits "
                "are too few for it (load the model with dtype='float32')"
            )
