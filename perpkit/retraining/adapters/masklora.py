"""MaskLoRA's linear map as an exact autograd function that keeps nothing of the weight's size.

It is a registered operator, so that `torch.compile` sees one node and checkpointing and autocast treat it as
any other. The effective weight is formed again whenever it is needed: a block at a time in one buffer, or the
whole of it on a GPU, by the kernels of `fused`.
"""

from contextlib import nullcontext
from functools import wraps

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .kernels import kernels

# Rows (forward) or columns (backward) of the effective weight that exist at once.
BLOCK = 512
# Entries of the mask that are widened at once: small enough to stay in a core's cache.
_WIDENED = 2**18
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def mask_lora_linear(
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float,
    block: int = BLOCK,
) -> Tensor:
    """`x (W + M ⊙ σBA)ᵀ + b` with exact gradients, saving only `x`, `W`, `M`, `A` and `B` for them.

    `x` is `[..., in]`, `weight` and the boolean `mask` (`True` = kept) are `[out, in]`, `lora_A` `[r, in]`,
    `lora_B` `[out, r]`, `bias` `[out]`; returns `[..., out]`. With `g = ∂L/∂y` and `E = (gᵀx) ⊙ M` the
    gradients are `∂B = σ E Aᵀ`, `∂A = σ Bᵀ E`, `∂x = g (W + M ⊙ σBA)` (PERP, MaskLoRA; section 4 of the
    methods), and `∂W = gᵀx` if asked for. The mask is the explicit one: a kept weight that is zero trains.
    `block` bounds the rows or columns of the effective weight that exist at a time (a GPU's kernels form all
    of it at once); the result does not depend on it beyond rounding. Under autocast the products are formed
    in its type, the sum `W + M ⊙ σBA` in the weight's. Gradients of gradients are not defined.

    Raises ValueError for shapes or types that do not fit and a block below 1.

    >>> W, M = torch.tensor([[2.0, 0.0]]), torch.tensor([[True, False]])
    >>> mask_lora_linear(torch.ones(1, 2), W, M, torch.ones(1, 2), torch.ones(1, 1), scale=0.5)
    tensor([[2.5000]])
    """
    rows, columns = weight.shape if weight.ndim == 2 else (-1, -1)
    rank = lora_A.shape[0]
    wanted = {
        "mask": (mask, (rows, columns)),
        "lora_A": (lora_A, (rank, columns)),
        "lora_B": (lora_B, (rows, rank)),
        "x": (x, (*x.shape[:-1], columns)),
    }
    if bias is not None:
        wanted["bias"] = (bias, (rows,))
    for name, (tensor, shape) in wanted.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} is {list(tensor.shape)}; with a weight {list(weight.shape)} it must be {list(shape)}"
            )
    if mask.dtype != torch.bool:
        raise ValueError(f"the mask is {mask.dtype}; masks are boolean, True = kept")
    if block < 1:
        raise ValueError(f"block is {block}; it must be at least 1")
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    elif x.dtype == weight.dtype:
        dtype = x.dtype
    else:
        raise ValueError(f"x is {x.dtype} and the weight {weight.dtype}: cast one of them, or use autocast")
    inputs = (x, weight, mask, lora_A, lora_B, bias, scale, block, dtype)
    if not torch.compiler.is_compiling() and kernels(x, weight, mask, lora_A, lora_B) is not None:
        # To look an operator up takes longer than to launch the kernels.
        return _Linear.apply(*inputs)
    return _forward(*inputs)


def _linear(
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    scale: float,
    block: int,
    dtype: torch.dtype,
) -> Tensor:
    if (module := kernels(x, weight, mask, lora_a, lora_b)) is not None:
        return module.linear(x, weight, mask, lora_a, lora_b, bias, scale, dtype)
    rows, columns = weight.shape
    flat = x.reshape(-1, columns).to(dtype).contiguous()
    a, b = lora_a.to(weight.dtype), (scale * lora_b).to(weight.dtype)
    y = flat.new_empty(len(flat), rows)
    buffer = _Buffer(weight, min(block, rows) * columns, dtype)
    with torch.autocast(x.device.type, enabled=False):
        for start in range(0, rows, block):
            some = slice(start, start + block)
            effective = buffer.effective(weight[some], mask[some], a, b[some])
            torch.mm(flat, effective.t(), out=y[:, some])
        if bias is not None:
            y += bias.to(dtype)
    return y.view(*x.shape[:-1], rows)


_forward = torch.library.custom_op("perpkit::mask_lora_linear", _linear, mutates_args=())


@_forward.register_fake
def _(x, weight, mask, lora_a, lora_b, bias, scale, block, dtype):
    return x.new_empty(*x.shape[:-1], weight.shape[0], dtype=dtype)


def _linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    block: int,
    for_x: bool,
    for_weight: bool,
    for_a: bool,
    for_b: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, weight, lora_a and lora_b, those that are not needed empty."""
    if (module := kernels(x, weight, mask, lora_a, lora_b)) is not None:
        needed = (for_x, for_weight, for_a, for_b)
        # To enter autocast's context takes as long as a launch.
        inside = torch.is_autocast_enabled(x.device.type)
        with torch.autocast(x.device.type, enabled=False) if inside else nullcontext():
            return module.gradients(grad, x, weight, mask, lora_a, lora_b, scale, needed)
    rows, columns = weight.shape
    dtype = grad.dtype
    flat = x.reshape(-1, columns).to(dtype).contiguous()
    grad = grad.reshape(-1, rows).contiguous()
    wanted = ((x, for_x), (weight, for_weight), (lora_a, for_a), (lora_b, for_b))
    dx, dw, da, db = _empty_gradients(*wanted)
    buffer = _Buffer(weight, max(min(block, rows) * columns, min(block, columns) * rows), dtype)
    with torch.autocast(x.device.type, enabled=False):
        if for_weight or for_a or for_b:
            a, b = lora_a.to(dtype), (scale * lora_b).to(dtype)
            sum_a = lora_a.new_zeros(da.shape, dtype=torch.promote_types(lora_a.dtype, torch.float32))
            for start in range(0, rows, block):
                some = slice(start, start + block)
                outer = buffer.product(*weight[some].shape)
                torch.mm(grad[:, some].t(), flat, out=outer)
                if for_weight:
                    dw[some] = outer
                _prune(outer, mask[some])
                if for_a:
                    sum_a += b[some].t() @ outer
                if for_b:
                    db[some] = scale * (outer @ a.t())
            da.copy_(sum_a)
        if for_x:
            a, b = lora_a.to(weight.dtype), (scale * lora_b).to(weight.dtype)
            dx_flat = dx.view(-1, columns)
            # By columns, or ∂x would be a sum over the blocks, which 16 bits would round every time.
            for start in range(0, columns, block):
                some = slice(start, start + block)
                effective = buffer.effective(weight[:, some], mask[:, some], a[:, some], b)
                if dx.dtype == dtype:
                    torch.mm(grad, effective, out=dx_flat[:, some])
                else:
                    dx_flat[:, some] = grad @ effective
    return dx, dw, da, db


@torch.library.custom_op("perpkit::mask_lora_linear_backward", mutates_args=())
@wraps(_linear_backward)
def _backward(*inputs):
    dx, dw, da, db = _linear_backward(*inputs)
    # The results of an operator are contiguous, as its fake ones, and no parts of one tensor.
    return dx, dw.contiguous(), da.clone(), db.clone()


@_backward.register_fake
def _(grad, x, weight, mask, lora_a, lora_b, scale, block, for_x, for_weight, for_a, for_b):
    return _empty_gradients((x, for_x), (weight, for_weight), (lora_a, for_a), (lora_b, for_b))


def _empty_gradients(*wanted: tuple[Tensor, bool]) -> tuple[Tensor, ...]:
    return tuple(tensor.new_empty(tensor.shape if needed else 0) for tensor, needed in wanted)


def _save(ctx, inputs, output) -> None:
    x, weight, mask, lora_a, lora_b, bias, ctx.scale, ctx.block, _ = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, weight, mask, lora_a, lora_b)


def _gradients(ctx, grad: Tensor, backward=_backward):
    x, weight, mask, lora_a, lora_b = ctx.saved_tensors
    for_x, for_weight, _, for_a, for_b, for_bias, *_ = ctx.needs_input_grad
    needed = (for_x, for_weight, for_a, for_b)
    found = backward(grad, x, weight, mask, lora_a, lora_b, ctx.scale, ctx.block, *needed)
    dx, dw, da, db = (part if need else None for part, need in zip(found, needed, strict=True))
    dbias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype) if for_bias else None
    return dx, dw, None, da, db, dbias, None, None, None


_forward.register_autograd(_gradients, setup_context=_save)


class _Linear(torch.autograd.Function):
    """The same without the registry of operators."""

    @staticmethod
    def forward(ctx, *inputs):
        _save(ctx, inputs, None)
        return _linear(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return _gradients(ctx, grad, _linear_backward)


class _Buffer:
    """The memory of one block of rows or columns, laid out as the weight is, used again for every block."""

    def __init__(self, weight: Tensor, size: int, dtype: torch.dtype):
        # GPT-2 stores its weights transposed: a block in the other order would be read against the grain.
        self.transposed = weight.stride(0) < weight.stride(1)
        self.sum = weight.new_empty(size)
        self.cast = self.sum if dtype == weight.dtype else weight.new_empty(size, dtype=dtype)

    def product(self, rows: int, columns: int) -> Tensor:
        """An uninitialised block in the type of the products."""
        return self._shaped(self.cast, rows, columns)

    def effective(self, weight: Tensor, mask: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """`weight + mask ⊙ (b a)` for one block, in the type of the products."""
        block = torch.mm(b, a, out=self._shaped(self.sum, *weight.shape))
        _prune(block, mask)
        block += weight
        return block if self.cast is self.sum else self.product(*weight.shape).copy_(block)

    def _shaped(self, memory: Tensor, rows: int, columns: int) -> Tensor:
        part = memory[: rows * columns]
        return part.view(columns, rows).t() if self.transposed else part.view(rows, columns)


def _prune(block: Tensor, mask: Tensor) -> None:
    """Set a block to zero where the mask is False, in place.

    On a CPU the mask is widened to all-one or all-zero bits and combined as integers: sixty times as fast as
    `masked_fill_`, and unlike a product right for infinities too.
    """
    if block.device.type != "cpu":
        torch.where(mask, block, block.new_zeros(()), out=block)
        return
    if block.stride(0) < block.stride(1):
        block, mask = block.t(), mask.t()
    bits, kept = block.view(_BITS[block.element_size()]), mask.view(torch.int8)
    height = max(1, _WIDENED // block.shape[1])
    widened = torch.empty(min(height, len(block)), block.shape[1], dtype=bits.dtype)
    for start in range(0, len(block), height):
        some = slice(start, start + height)
        keep = widened[: len(bits[some])].copy_(kept[some]).neg_()
        bits[some].bitwise_and_(keep)  # `&=` would also copy the slice onto itself
