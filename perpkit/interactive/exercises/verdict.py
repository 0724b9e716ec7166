"""What a check says, and what its cases have in common: careful calls and comparisons in words."""

import copy
import functools
import html
import math
import numbers
import operator
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn


class Wrong(Exception):
    """What is wrong with an answer, in words for the learner."""


@dataclass(frozen=True)
class Verdict:
    """What a check found: true when the answer is right, and words that say why.

    >>> Verdict(False, "the mask keeps 3 weights; want 2")
    ✗ not yet: the mask keeps 3 weights; want 2
    """

    right: bool
    words: str

    def __bool__(self) -> bool:
        return self.right

    def __repr__(self) -> str:
        return f"✓ right: {self.words}" if self.right else f"✗ not yet: {self.words}"

    def _repr_html_(self) -> str:
        # Okabe and Ito's bluish green and vermilion; the signs say it without colours.
        colour = "#009E73" if self.right else "#D55E00"
        style = f"border-left: 4px solid {colour}; padding: 2px 8px; white-space: pre-wrap"
        return f'<div style="{style}">{html.escape(repr(self))}</div>'


def check(praise: str) -> Callable[[Callable[[Callable], None]], Callable[[Callable], Verdict]]:
    """Make a check of a function that raises `Wrong` for an answer that is; `praise` is said of the others.

    >>> @check("two and two are four")
    ... def check_sum(answer):
    ...     if call(answer, 2, 2) != 4:
    ...         raise Wrong("two and two are not four")
    >>> check_sum(lambda a, b: a + b)
    ✓ right: two and two are four
    >>> check_sum(lambda a, b: a / 0)
    ✗ not yet: your function raises ZeroDivisionError: division by zero (its line 1)
    """

    def decorate(examine: Callable[[Callable], None]) -> Callable[[Callable], Verdict]:
        @functools.wraps(examine)
        def checked(answer: Callable) -> Verdict:
            if not callable(answer):
                raise ValueError(f"{answer!r} is no function; pass yours by its name, without calling it")
            try:
                # Whatever the notebook has set before.
                with torch.enable_grad(), torch.device("cpu"):
                    examine(answer)
            except Wrong as wrong:
                return Verdict(False, str(wrong))
            except Exception as error:
                words = f"what your function returns cannot be compared: {type(error).__name__}: {error}"
                return Verdict(False, words)
            return Verdict(True, praise)

        return checked

    return decorate


def call(answer: Callable, *given: Any, **named: Any) -> Any:
    """What a learner's function returns; raises `Wrong` if it raises, returns None or changes its arguments.

    Gradients flow through tensors that ask for them.
    """
    before = [value.detach().clone() if torch.is_tensor(value) else copy.deepcopy(value) for value in given]
    try:
        got = answer(*given, **named)
    except Exception as error:
        raise Wrong(f"your function raises {type(error).__name__}: {error}{_line(answer, error)}") from error
    for place, (value, old) in enumerate(zip(given, before, strict=True)):
        if not _unchanged(value, old):
            raise Wrong(f"your function changes its argument {place + 1} in place; leave it as it was")
    if got is None or got is ...:
        raise Wrong("your function returns nothing yet")
    return got


def same_kind(what: str, got: Any, want: torch.Tensor) -> torch.Tensor:
    """Raise `Wrong` unless `got` is a tensor of the shape and kind of `want`; returns it in its dtype."""
    if not torch.is_tensor(got):
        raise Wrong(f"{what} is a {type(got).__name__}; want a torch.Tensor")
    if got.shape != want.shape:
        raise Wrong(f"{what} has shape {tuple(got.shape)}; want {tuple(want.shape)}")
    if (got.dtype == torch.bool) != (want.dtype == torch.bool):
        raise Wrong(f"{what} is of {got.dtype}; want {want.dtype}")
    # Whoever computes in float64 or on another device is right, too.
    return got.to(want)


def number(what: str, got: Any) -> float:
    """Raise `Wrong` unless `got` is a number, or a tensor or an array of one; returns it.

    >>> number("the error", torch.tensor([0.5]))
    0.5
    """
    if isinstance(got, torch.Tensor | np.ndarray):
        if math.prod(got.shape) != 1:
            raise Wrong(f"{what} has shape {tuple(got.shape)}; want one number")
        got = got.item()
    if isinstance(got, bool) or not isinstance(got, numbers.Real):
        raise Wrong(f"{what} is a {type(got).__name__}; want a number")
    if not math.isfinite(got):
        raise Wrong(f"{what} is {got}; want a finite number")
    return float(got)


def close(what: str, got: Any, want: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Raise `Wrong`, naming the first differing entry, unless all agree within `tolerance` of the largest.

    >>> close("the output", torch.tensor([1.0, 2.5]), torch.tensor([1.0, 2.0]))
    Traceback (most recent call last):
    perpkit.interactive.exercises.verdict.Wrong: the output has 2.5 at (1,); want 2
    """
    got = same_kind(what, got, want).detach().double()
    want = want.detach().double()
    apart = ~torch.isclose(got, want, rtol=0, atol=tolerance * max(1.0, want.abs().max().item()))
    if apart.any():
        place = tuple(apart.nonzero()[0].tolist())
        raise Wrong(f"{what} has {got[place].item():.5g} at {place}; want {want[place].item():.5g}")


def _unchanged(value: Any, old: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.shape == old.shape and torch.equal(value.detach(), old.detach())
    if isinstance(value, nn.Module):
        asked = ([p.requires_grad for p in each.parameters()] for each in (value, old))
        return operator.eq(*asked) and _unchanged(value.state_dict(), old.state_dict())
    if isinstance(value, Mapping):
        return value.keys() == old.keys() and all(_unchanged(value[name], old[name]) for name in old)
    if isinstance(value, list | tuple):
        return len(value) == len(old) and all(map(_unchanged, value, old))
    return bool(value == old)


def _line(answer: Callable, error: Exception) -> str:
    """Where in the learner's function it went wrong, counted from its first line."""
    code = getattr(answer, "__code__", None)
    for frame, number in traceback.walk_tb(error.__traceback__):
        if frame.f_code is code:
            return f" (its line {number - code.co_firstlineno + 1})"
    return ""
