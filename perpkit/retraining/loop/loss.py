"""Losses that never hold the logits of a whole vocabulary at once, and distillation from the dense model."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ..subsets import head_of
from .evaluating import evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Logits held at once: with 50,272 tokens that is 83 rows, 16 MiB in float32.
LOGITS_AT_ONCE = 2**22

RowLoss = Callable[[torch.Tensor, slice], torch.Tensor]


@dataclass(frozen=True)
class Distillation:
    """How much of the loss is the divergence from the dense model, and at which temperature."""

    weight: float = 0.5
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.weight <= 1 or not self.temperature > 0:
            raise ValueError(
                f"distill_weight={self.weight}, temperature={self.temperature}: want a weight in [0, 1] and "
                "a positive temperature"
            )


def rows_loss(
    logits: torch.Tensor,
    targets: torch.Tensor,
    teacher: torch.Tensor | None = None,
    distillation: Distillation | None = None,
) -> torch.Tensor:
    """The loss summed over rows of logits `[rows, classes]`, in nats: cross entropy, or with a teacher

    (1 − w) · CE + w · T² · KL(softmax(teacher/T) ‖ softmax(logits/T))   (Hinton et al. 2015),

    computed in float32 at least; the teacher's logits have the same shape.

    >>> logits = torch.tensor([[2.0, 0.0]])
    >>> targets = torch.tensor([0])
    >>> round(float(rows_loss(logits, targets)), 4)
    0.1269
    >>> round(float(rows_loss(logits, targets, logits, Distillation(weight=1.0))), 4)
    0.0
    """
    logits = logits.to(_wide(logits.dtype))
    loss = F.cross_entropy(logits, targets, reduction="sum")
    if teacher is None or distillation is None:
        return loss
    temperature = distillation.temperature
    divergence = F.kl_div(
        (logits / temperature).log_softmax(-1),
        (teacher.to(logits.dtype) / temperature).log_softmax(-1),
        reduction="sum",
        log_target=True,
    )
    return (1 - distillation.weight) * loss + distillation.weight * temperature**2 * divergence


def chunked_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    row_loss: RowLoss,
    *,
    rows: int | None = None,
) -> torch.Tensor:
    """The mean of `row_loss` over the rows of `hidden @ weight.T + bias`, a few rows of logits at a time.

    `hidden` is `[n, in]`, `weight` `[classes, in]`; `row_loss(logits, rows)` sums the losses of a slice of
    rows. The gradients are formed beside the loss, so that the backward pass needs no logits; in 16 bits and
    under autocast the products are in 16 bits and the loss in float32.

    >>> hidden, weight = torch.ones(3, 2), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    >>> targets = torch.tensor([0, 1, 1])
    >>> entropy = lambda logits, rows: rows_loss(logits, targets[rows])
    >>> round(float(chunked_loss(hidden, weight, None, entropy, rows=2)), 4)
    0.6931
    """
    if rows is None:
        rows = max(1, LOGITS_AT_ONCE // len(weight))
        if hidden.is_cuda:
            # A GPU needs larger products to be busy, of as many rows as its tiles have.
            rows = 1 << (4 * rows).bit_length() - 1
    if torch.is_grad_enabled():
        return _ThroughHead.apply(hidden, weight, bias, row_loss, rows)
    return _forward(hidden, weight, bias, row_loss, rows, (False, False, False))[0]


class _ThroughHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, row_loss, rows):
        loss, ctx.gradients = _forward(hidden, weight, bias, row_loss, rows, ctx.needs_input_grad[:3])
        ctx.dtypes = [None if value is None else value.dtype for value in (hidden, weight, bias)]
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        # Scaled in place and given away: a copy of the matrix's gradient would be the largest tensor of all.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("this loss can be differentiated only once")
        scaled = [
            None if part is None else part.mul_(gradient.to(part.dtype)).to(dtype)
            for part, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]
        del gradients
        return *scaled, None, None


def _forward(hidden, weight, bias, row_loss, rows, needed):
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    wide = _wide(dtype)
    # Cast once: autocast would cast the matrix again for every block of rows.
    matrix, shift = weight.to(dtype), None if bias is None else bias.to(dtype)
    total = torch.zeros((), dtype=wide, device=hidden.device)
    gradients = [
        torch.zeros_like(value, dtype=wide) if need else None
        for value, need in zip((hidden, weight, bias), needed, strict=True)
    ]
    with torch.autocast(device, enabled=False):
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            x = hidden[part].to(dtype)
            logits = F.linear(x, matrix, shift).to(wide).requires_grad_(any(needed))
            with torch.set_grad_enabled(any(needed)):
                loss = row_loss(logits, part)
            total += loss.detach()
            if any(needed):
                (slope,) = torch.autograd.grad(loss, logits)
                # Of the sum, not of the mean: that would vanish in float16.
                _add_gradients(gradients, part, slope.to(dtype), x, matrix)
                del slope
            # Before the next logits are made.
            del logits, loss
    for gradient in gradients:
        if gradient is not None:
            gradient /= len(hidden)
    return total / len(hidden), gradients


def _add_gradients(gradients, part, slope, x, matrix) -> None:
    of_hidden, of_weight, of_bias = gradients
    if of_hidden is not None:
        of_hidden[part] = slope @ matrix
    if of_weight is not None and of_weight.dtype == slope.dtype:
        of_weight.addmm_(slope.t(), x)
    elif of_weight is not None:
        of_weight += slope.t() @ x
    if of_bias is not None:
        of_bias += slope.sum(0)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


# --- language models ------------------------------------------------------------------------------


def next_token_loss(model: "PreTrainedModel", tokens: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood in nats of `tokens[:, 1:]`; tokens `[batch, length]`.

    >>> import perpkit as pk
    >>> model, tokenizer = pk.load_model("tiny-opt", device="cpu")
    >>> text = pk.load_text("storyworld", tokenizer, windows={"train": 8, "calibration": 8, "test": 8})
    >>> perplexity = float(next_token_loss(model, text.test).exp().detach())
    >>> abs(perplexity - pk.perplexity(model, text.test)) < 1e-4
    True
    """
    return language_loss(model, model, tokens, plain_head(model))


def language_loss(
    called: nn.Module,
    model: nn.Module,
    tokens: torch.Tensor,
    head: nn.Linear | None,
    teacher: tuple[nn.Module, nn.Linear | None, Distillation] | None = None,
) -> torch.Tensor:
    """The next-token loss of `model`, called through `called` (itself or a wrapper), with its plain head.

    A plain head computes the loss itself in place of the logits; without one (`plain_head`) the model's
    logits are used, all of them at once. `teacher` is the dense model, its plain head and the distillation.
    """
    targets = tokens[:, 1:].flatten()
    reference = None if teacher is None else _teacher_logits(teacher[0], tokens, teacher[1])
    distillation = None if teacher is None else teacher[2]

    def row_loss(logits: torch.Tensor, rows: slice) -> torch.Tensor:
        return rows_loss(logits, targets[rows], reference and reference(rows), distillation)

    if head is None:
        logits = called(input_ids=tokens, use_cache=False).logits[:, :-1].flatten(0, 1)
        return row_loss(logits, slice(None)) / len(targets)

    def loss_of(hidden: torch.Tensor) -> torch.Tensor:
        return chunked_loss(hidden[:, :-1].flatten(0, 1), head.weight, head.bias, row_loss)

    # Inside the head's own call, so that wrappers that gather its matrix there work.
    with _instead(head, loss_of):
        return called(input_ids=tokens, use_cache=False).logits


@torch.no_grad()
def _teacher_logits(
    dense: nn.Module, tokens: torch.Tensor, head: nn.Linear | None
) -> Callable[[slice], torch.Tensor]:
    if head is None:
        logits = dense(input_ids=tokens, use_cache=False).logits[:, :-1].flatten(0, 1)
        return lambda rows: logits[rows]
    with _instead(head, lambda hidden: hidden):
        hidden = dense(input_ids=tokens, use_cache=False).logits[:, :-1].flatten(0, 1)
    return lambda rows: F.linear(hidden[rows].to(head.weight.dtype), head.weight, head.bias).detach()


@contextmanager
def _instead(head: nn.Module, forward: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    head.forward = forward
    try:
        yield
    finally:
        del head.forward


def plain_head(model: nn.Module) -> nn.Linear | None:
    """The head, if the model's logits are exactly what a plain linear head makes of its input, else None.

    It is None for logits that are capped or scaled after the head (Gemma 2, Granite, …), for an adapter with
    a forward pass of its own, and for a head that something else has taken over.

    >>> import perpkit as pk
    >>> model, _ = pk.load_model("tiny-opt", device="cpu")
    >>> plain_head(model) is model.lm_head
    True
    """
    head = head_of(model)
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        return None
    if "forward" in vars(head):
        return None
    made: list[torch.Tensor] = []
    hook = head.register_forward_hook(lambda _, args, output: made.append(output))
    try:
        with evaluating(model):
            # The model itself says whether something follows its head.
            tokens = torch.arange(2, device=head.weight.device)[None] % len(head.weight)
            logits = model(input_ids=tokens, use_cache=False).logits
    finally:
        hook.remove()
    plain = len(made) == 1 and torch.equal(made[0].to(logits.dtype), logits)
    return head if plain else None
