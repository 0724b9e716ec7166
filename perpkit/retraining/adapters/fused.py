"""MaskLoRA's passes over a matrix as Triton kernels, each reading its operands from a GPU's memory once.

On a GPU they take the place of the many small operations of `masklora`, whose launches take longer there than
the products. The results are the same but for rounding, of which there is less: sums are in float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

# Larger ranks would not fit a kernel's registers.
LARGEST_RANK = 64
# The gradients of the factors are summed in so many parts along rows and columns, one program for each pair.
PARTS = 16


def linear(
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    scale: float,
    dtype: torch.dtype,
) -> Tensor:
    """`x (W + M ⊙ σBA)ᵀ + b` in `dtype`, through one effective weight that is gone afterwards.

    `weight` and `mask` `[out, in]` are both contiguous or both transposed in memory; the factors contiguous.
    Under autocast `dtype` is its type, so that it has nothing to cast.
    """
    whole = effective(weight, mask, lora_a, lora_b, scale, torch.empty_like(weight, dtype=dtype))
    return F.linear(x.to(dtype), whole, None if bias is None else bias.to(dtype))


def gradients(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    needed: tuple[bool, bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of `x`, `weight`, `lora_a` and `lora_b`, some of those that are not `needed` empty."""
    for_x, for_weight, for_a, for_b = needed
    rows, columns = weight.shape
    dx = dw = da = db = memory = None
    grad = grad.reshape(-1, rows)
    if for_weight or for_a or for_b:
        flat = x.reshape(-1, columns).to(grad.dtype)
        # In the order in which the weight lies in memory.
        outer = torch.mm(grad.t(), flat) if weight.is_contiguous() else torch.mm(flat.t(), grad).t()
        if for_a or for_b:
            da, db = factor_gradients(outer, mask, lora_a, lora_b, scale)
            da, db = da.to(lora_a.dtype), db.to(lora_b.dtype)
        if for_weight:
            dw = outer.to(weight.dtype)
        memory = None if dw is outer else outer
    if for_x:
        if memory is None:
            memory = torch.empty_like(weight, dtype=grad.dtype)
        whole = effective(weight, mask, lora_a, lora_b, scale, memory)
        dx = torch.mm(grad, whole).view(x.shape).to(x.dtype)
    dx, dw, da, db = (grad.new_empty(0) if part is None else part for part in (dx, dw, da, db))
    return dx, dw, da, db


def effective(
    weight: Tensor, mask: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float, out: Tensor
) -> Tensor:
    """Write `weight + mask ⊙ (scale · lora_b lora_a)` to `out` `[out, in]`, which may be of another type."""
    transposed = not weight.is_contiguous()
    rows, columns = weight.shape[::-1] if transposed else weight.shape
    rank, tile = len(lora_a), (32, 128)
    # Triton launches on the current GPU, which need not be the tensors'.
    with torch.cuda.device_of(weight):
        _effective_kernel[(triton.cdiv(rows, tile[0]), triton.cdiv(columns, tile[1]))](
            *(weight, mask, lora_a, lora_b, out, scale, rows, columns),
            *(rank, _padded(rank), transposed, *tile),
        )
    return out


def factor_gradients(
    outer: Tensor, mask: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """`(scale · lora_bᵀ E, scale · E lora_aᵀ)` for `E = outer ⊙ mask`: the gradients of the factors, float32.

    `outer` `[out, in]` is the gradient of the weight. Sums are formed in parts, in the same order every time.
    """
    (out, width), rank = outer.shape, len(lora_a)
    transposed = not outer.is_contiguous()
    rows, columns = (width, out) if transposed else (out, width)
    parts = outer.new_empty(PARTS, rank * (rows + columns), dtype=torch.float32)
    # Of 32 bits, larger tiles or fewer warps would not fit the registers.
    tile, warps = ((64, 128), 4) if outer.element_size() == 2 else ((64, 64), 8)
    with torch.cuda.device_of(outer):
        _factor_gradients_kernel[(PARTS, PARTS)](
            *(outer, mask, lora_a, lora_b, parts, scale, rows, columns),
            *(triton.cdiv(rows, PARTS), triton.cdiv(columns, PARTS), rank, _padded(rank), transposed),
            *tile,
            num_warps=warps,
        )
    of_rows, of_columns = parts.sum(0).split((rows * rank, rank * columns))
    if transposed:
        return of_rows.view(rank, rows), of_columns.view(columns, rank)
    return of_columns.view(rank, columns), of_rows.view(rows, rank)


def _padded(rank: int) -> int:
    """The rank that a product on tensor cores takes."""
    return max(16, 1 << (rank - 1).bit_length())


@triton.jit
def _effective_kernel(
    weight,
    mask,
    lora_a,
    lora_b,
    out,
    scale,
    rows,
    columns,
    RANK: tl.constexpr,
    PADDED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    place = row[:, None] * columns + column[None, :]
    w = tl.load(weight + place, mask=inside, other=0.0)
    kept = tl.load(mask + place, mask=inside, other=0)
    left = _left(lora_a, lora_b, row, rows, RANK, PADDED, TRANSPOSED, rows) * scale
    right = _right(lora_a, lora_b, column, columns, RANK, PADDED, TRANSPOSED, columns)
    kind = weight.dtype.element_ty
    update = tl.dot(left.to(kind), right.to(kind), input_precision="ieee")
    whole = w.to(tl.float32) + tl.where(kept, update, 0.0)
    tl.store(out + place, whole.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _factor_gradients_kernel(
    outer,
    mask,
    lora_a,
    lora_b,
    parts,
    scale,
    rows,
    columns,
    PART_ROWS: tl.constexpr,
    PART_COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
    PADDED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    part_row, part_column = tl.program_id(0), tl.program_id(1)
    last_row = tl.minimum((part_row + 1) * PART_ROWS, rows)
    last_column = tl.minimum((part_column + 1) * PART_COLUMNS, columns)
    r = tl.arange(0, PADDED)
    kind = outer.dtype.element_ty
    size = RANK * (rows + columns)
    for across in range(0, PART_COLUMNS, COLUMNS):
        # What the program reads below it has written for the columns before, perhaps by another thread.
        tl.debug_barrier()
        column = part_column * PART_COLUMNS + across + tl.arange(0, COLUMNS)
        right = _right(lora_a, lora_b, column, last_column, RANK, PADDED, TRANSPOSED, columns)
        right = tl.trans(right).to(kind)
        sum_columns = tl.zeros((PADDED, COLUMNS), dtype=tl.float32)
        for down in range(0, PART_ROWS, ROWS):
            row = part_row * PART_ROWS + down + tl.arange(0, ROWS)
            inside = (row < last_row)[:, None] & (column < last_column)[None, :]
            place = row[:, None] * columns + column[None, :]
            slope = tl.load(outer + place, mask=inside, other=0.0)
            kept = tl.load(mask + place, mask=inside, other=0)
            slope = tl.where(kept, slope, 0.0).to(kind)
            left = _left(lora_a, lora_b, row, last_row, RANK, PADDED, TRANSPOSED, rows) * scale
            sum_columns = tl.dot(tl.trans(left.to(kind)), slope, sum_columns, input_precision="tf32x3")
            sum_rows = scale * tl.dot(slope, right, input_precision="tf32x3")
            here = (row < last_row)[:, None] & (r < RANK)[None, :]
            place = parts + part_column * size + _factor(row[:, None], r[None, :], rows, RANK, TRANSPOSED)
            before = tl.load(place, mask=here & (across > 0), other=0.0)
            tl.store(place, before + sum_rows, mask=here)
        here = (r < RANK)[:, None] & (column < last_column)[None, :]
        place = parts + part_row * size + rows * RANK
        place += _factor(column[None, :], r[:, None], columns, RANK, not TRANSPOSED)
        tl.store(place, sum_columns, mask=here)


@triton.jit
def _factor(index, r, length, RANK: tl.constexpr, BY_RANK: tl.constexpr):
    """Where an entry of a factor lies: `[r, length]` by rank, else `[length, r]`."""
    return r * length + index if BY_RANK else index * RANK + r


@triton.jit
def _left(
    lora_a, lora_b, row, last, RANK: tl.constexpr, PADDED: tl.constexpr, TRANSPOSED: tl.constexpr, length
):
    """The factor along the rows in memory, `[rows, rank]`: B, or of a transposed weight Aᵀ."""
    r = tl.arange(0, PADDED)
    factor = lora_a if TRANSPOSED else lora_b
    place = _factor(row[:, None], r[None, :], length, RANK, TRANSPOSED)
    return tl.load(factor + place, mask=(row < last)[:, None] & (r < RANK)[None, :], other=0.0)


@triton.jit
def _right(
    lora_a, lora_b, column, last, RANK: tl.constexpr, PADDED: tl.constexpr, TRANSPOSED: tl.constexpr, length
):
    """The factor along the columns in memory, `[rank, columns]`: A, or of a transposed weight Bᵀ."""
    r = tl.arange(0, PADDED)
    factor = lora_b if TRANSPOSED else lora_a
    place = _factor(column[None, :], r[:, None], length, RANK, not TRANSPOSED)
    return tl.load(factor + place, mask=(r < RANK)[:, None] & (column < last)[None, :], other=0.0)
