"""Calibration data on its way through a model, block by block, each after the pruned blocks before it."""

from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from .layers import Matrix, decoder_blocks, is_language_model, prunable_matrices


@dataclass
class Part:
    """A block of a language model, or a layer of any other, at its turn: its matrices, and its forward pass.

    `forward(i)` is its output for batch i of the calibration data, as the pruned model before it has made
    them, with gradients where they are on, and `run()` sends all batches through it; weights may change
    between the calls.
    """

    name: str
    matrices: dict[str, Matrix]
    batches: int
    forward: Callable[[int], torch.Tensor] = field(repr=False)

    @torch.no_grad()
    def run(self) -> None:
        """Send all calibration data through, without gradients."""
        for i in range(self.batches):
            self.forward(i)


# As a decorator: inside, the caller too would go without gradients between two parts.
@torch.no_grad()
def stream(
    model: nn.Module, data: torch.Tensor, *, batch: int = 8, offload: bool = False, window: int = 1
) -> Generator[Part, None, None]:
    """The parts of a model in the order of the data, each with the inputs that the parts before it now make.

    A language model is streamed by decoder blocks from token windows `[n, length]`: resident are the
    activations of one block boundary, which become the next block's when the caller goes on. With `offload`
    the model stays on the CPU and one block at a time moves to the GPU. A `window` of several consecutive
    blocks makes them one part. Any other model is streamed by layers from inputs `[n, …]`, each by a forward
    pass that ends at the layer.

    Raises ValueError when there is no GPU to offload to, or no decoder block to move.
    """
    with _evaluating(model):
        if is_language_model(model):
            yield from _blocks(model, data.split(batch), _compute_device(model, offload), window)
        elif offload:
            raise ValueError(f"offload=True moves decoder blocks, and a {type(model).__name__} has none")
        else:
            yield from _layers(model, data.split(batch))


def _compute_device(model: nn.Module, offload: bool) -> torch.device:
    if not offload:
        return next(model.parameters()).device
    if not torch.cuda.is_available():
        raise ValueError("offload=True moves one block at a time to a GPU, and there is none here")
    return torch.device("cuda")


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


class _Reached(Exception):
    """The forward pass has come as far as it is needed."""


def _blocks(
    model: nn.Module, batches: tuple[torch.Tensor, ...], device: torch.device, window: int
) -> Iterator[Part]:
    prefix, blocks = decoder_blocks(model)
    home = next(model.parameters()).device
    matrices = prunable_matrices(model)
    hidden: list[torch.Tensor] = []
    arguments: list[list] = []
    for tokens in batches:
        first, further = _captured(model, blocks, tokens.to(home))
        hidden.append(first)
        # Masks and rotary tables are mostly the same for every batch but the last: kept once.
        arguments.append(arguments[0] if arguments and _same(arguments[0], further) else further)
    # Else the last batch would stay alive beside what becomes of it.
    del first
    for first_of in range(0, len(blocks), window):
        several = range(first_of, min(first_of + window, len(blocks)))

        def forward(i: int, several: range = several) -> torch.Tensor:
            x = hidden[i].to(device)
            for index in several:
                args, kwargs = pytree.tree_map(
                    lambda x: x.to(device) if isinstance(x, torch.Tensor) else x, arguments[i][index]
                )
                output = blocks[index](x, *args, **kwargs)
                x = output[0] if isinstance(output, tuple) else output
            return x

        name = f"{prefix}.{several[0]}" + (f"-{several[-1]}" if len(several) > 1 else "")
        inside = tuple(f"{prefix}.{index}." for index in several)
        try:
            for index in several:
                blocks[index].to(device)
            its = {n: matrix for n, matrix in matrices.items() if n.startswith(inside)}
            yield Part(name, its, len(hidden), forward)
            if several[-1] + 1 < len(blocks):
                for i in range(len(hidden)):
                    hidden[i] = forward(i).to(home)
        finally:
            for index in several:
                blocks[index].to(home)


def _captured(model: nn.Module, blocks: nn.ModuleList, tokens: torch.Tensor) -> tuple[torch.Tensor, list]:
    """What enters the first block, and each block's own further arguments; no block is computed.

    (Each block has its own: Gemma alternates masks and rotary tables. No hidden state changes them.)
    """
    entered: list[torch.Tensor] = []
    further = []

    def passing(hidden, *args, **kwargs):
        if not entered:
            entered.append(hidden)
        kept = {key: None if "past" in key or "cache" in key else value for key, value in kwargs.items()}
        further.append((args, kept))
        if len(further) == len(blocks):
            raise _Reached
        return (hidden,)

    with ExitStack() as patches:
        for block in blocks:
            patches.enter_context(_replaced_forward(block, passing))
        with suppress(_Reached):
            model(input_ids=tokens, use_cache=False)
    return entered[0], further


def _same(one: Any, other: Any) -> bool:
    (ours, form), (theirs, other_form) = pytree.tree_flatten(one), pytree.tree_flatten(other)
    return form == other_form and all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a is b
        for a, b in zip(ours, theirs, strict=True)
    )


@contextmanager
def _replaced_forward(module: nn.Module, forward: Callable) -> Iterator[None]:
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


def _layers(model: nn.Module, batches: tuple[torch.Tensor, ...]) -> Iterator[Part]:
    matrices = prunable_matrices(model)
    device = next(model.parameters()).device
    order: dict[nn.Module, Matrix] = {}
    with ExitStack() as hooks:
        for matrix in matrices.values():
            hook = matrix.module.register_forward_pre_hook(
                lambda module, _, matrix=matrix: order.setdefault(module, matrix) and None
            )
            hooks.callback(hook.remove)
        model(batches[0][:1].to(device))

    def until(last: nn.Module, i: int) -> torch.Tensor:
        def reached(module, inputs, output):
            raise _Reached(output)

        hook = last.register_forward_hook(reached)
        try:
            return model(batches[i].to(device))
        except _Reached as stopped:
            return stopped.args[0]
        finally:
            hook.remove()

    for module, matrix in order.items():
        yield Part(matrix.name, {matrix.name: matrix}, len(batches), partial(until, module))
    # Layers that no data reached, so that none is forgotten.
    for matrix in matrices.values():
        if matrix.module not in order:
            yield Part(matrix.name, {matrix.name: matrix}, 0, partial(until, matrix.module))
