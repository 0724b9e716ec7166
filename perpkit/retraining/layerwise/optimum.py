"""The exact optimum of one matrix's reconstruction, from sums over the calibration tokens alone.

With the dense matrix `W` on its inputs `X` and the pruned one `Ŵ`, mask `M`, on its own inputs `X̂`, the error
`‖XWᵀ − X̂Ŵᵀ‖²` is a convex function of each row of `Ŵ`, and only `G = X̂ᵀX̂` and the like of the drift
`Δ = X − X̂` enter it (section 6 of the methods). No activations are kept.
"""

from collections import deque
from dataclasses import dataclass

import torch

from ...pruning.inputs import added_gram

# Floats that the systems solved at once by Cholesky may take.
CHOLESKY_VALUES = 2**24
# The gain of so many steps ahead estimates how far conjugate gradients still are from the optimum.
LOOK_BACK = 5
METHODS = ("auto", "cg", "cholesky")


@dataclass
class Moments:
    """Sums over tokens: `gram = X̂ᵀX̂`, `cross = X̂ᵀΔ` and `drift = ΔᵀΔ`, each `[groups, in, in]`.

    `cross` and `drift` are None when the target is the dense matrix on the pruned model's inputs: `Δ = 0`.

    >>> moments = Moments()
    >>> moments.add(torch.tensor([[[1.0, 2.0], [0.0, 1.0]]]))
    >>> moments.tokens, moments.gram.tolist()
    (2, [[[1.0, 2.0], [2.0, 5.0]]])
    """

    tokens: int = 0
    gram: torch.Tensor | None = None
    cross: torch.Tensor | None = None
    drift: torch.Tensor | None = None

    def add(self, rows: torch.Tensor, dense: torch.Tensor | None = None) -> None:
        """Count in more inputs `[groups, tokens, in]` of the pruned model, and those of the dense one for the
        same tokens, in float32 at least.
        """
        self.gram = added_gram(self.gram, rows)
        rows = rows.to(self.gram)
        if dense is not None:
            change = dense.to(rows) - rows
            self.cross = _added(self.cross, rows, change)
            self.drift = _added(self.drift, change, change)
        self.tokens += rows.shape[1]

    def target(self, dense: torch.Tensor) -> float:
        """The energy of the target, `‖XWᵀ‖²`, of a dense matrix `[out, in]`."""
        return float(self.errors(torch.zeros_like(dense), dense).sum())

    def errors(self, weight: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
        """The squared error of every output, `‖XWᵀ − X̂Ŵᵀ‖²` by columns, `[out]` in float64.

        >>> moments = Moments()
        >>> moments.add(torch.tensor([[[1.0, 2.0]]]))
        >>> moments.errors(torch.tensor([[3.0, 0.0]]), torch.tensor([[3.0, 4.0]]))
        tensor([64.], dtype=torch.float64)
        """
        assert self.gram is not None
        found = []
        for group, (new, old) in enumerate(zip(*self.split(weight, dense), strict=True)):
            lost = old - new
            terms = (lost @ self.gram[group]) * lost
            if self.cross is not None and self.drift is not None:
                terms += 2 * (lost @ self.cross[group]) * old + (old @ self.drift[group]) * old
            found.append(terms.sum(1, dtype=torch.float64))
        return torch.cat(found).clamp(min=0)

    def split(self, *matrices: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
        """Matrices `[out, in]` cut into the groups of a grouped convolution, in the type of the sums."""
        assert self.gram is not None
        return [matrix.to(self.gram).chunk(len(self.gram)) for matrix in matrices]


def _added(total: torch.Tensor | None, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return left.mT @ right if total is None else total.baddbmm_(left.mT, right)


@torch.no_grad()
def optimum(
    weight: torch.Tensor,
    dense: torch.Tensor,
    mask: torch.Tensor,
    moments: Moments,
    *,
    ridge: float = 0.0,
    tol: float = 1e-4,
    method: str = "auto",
) -> torch.Tensor:
    """The kept weights that reconstruct a dense matrix best, the others zero: `[out, in]`, float32 at least.

    `weight` is the pruned matrix as it is, `dense` the dense one and `mask` what is kept. For every row with
    kept columns `K` the step `d` solves `(G_KK + λI) d_K = ((W − Ŵ) G + W (X̂ᵀΔ)ᵀ)_K`, the normal equations
    of `‖XWᵀ − X̂(Ŵ + D)ᵀ‖² + λ‖D‖²`: `λ = ridge · mean(diag G)` holds the weights near what they are, so dead
    inputs and too few tokens leave alone what they say nothing about.

    `method` is `"cg"`, conjugate gradients on all rows at once, each until within about `tol` of its least
    error; `"cholesky"`, exact, many rows at once; or `"auto"`, Cholesky where the rows keep few weights.

    Raises ValueError for an unknown method and a negative ridge.

    >>> moments = Moments()
    >>> moments.add(torch.tensor([[[1.0, 1.0], [1.0, 0.0]]]))
    >>> dense, mask = torch.tensor([[2.0, 2.0]]), torch.tensor([[True, False]])
    >>> optimum(dense * mask, dense, mask, moments).round(decimals=3)
    tensor([[3., 0.]])
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; the methods are {', '.join(METHODS)}")
    check_ridge(ridge)
    if not moments.tokens:
        return weight.to(torch.promote_types(weight.dtype, torch.float32))
    assert moments.gram is not None
    errors = moments.errors(weight, dense).chunk(len(moments.gram))
    kept = mask.chunk(len(moments.gram))
    found = []
    for group, (new, old) in enumerate(zip(*moments.split(weight, dense), strict=True)):
        gram = moments.gram[group].clone()
        # Rounding makes a singular Gram matrix indefinite; this is above the rounding and below what matters.
        # Each input by its own size: beside a massive activation the mean says nothing about the others.
        floor, diagonal = torch.finfo(gram.dtype).eps ** 0.75, gram.diagonal()
        mean = diagonal.mean()
        diagonal.add_(torch.where(diagonal > 0, floor * diagonal, floor * mean) + ridge * mean)
        wanted = (old - new) @ moments.gram[group]
        if moments.cross is not None:
            wanted += old @ moments.cross[group].mT
        found.append(new + _solved(gram, wanted, kept[group], errors[group], tol, method))
    return torch.cat(found)


def check_ridge(ridge: float) -> None:
    """Raise ValueError for a ridge that is negative or not a number.

    >>> check_ridge(0.01)
    """
    if not 0 <= ridge < float("inf"):
        raise ValueError(f"ridge is {ridge}; it is a fraction of the mean of diag(XᵀX), 0 or more")


def _solved(gram, wanted, mask, errors, tol: float, method: str) -> torch.Tensor:
    step, left = torch.zeros_like(wanted), torch.ones(len(wanted), dtype=torch.bool, device=wanted.device)
    if method == "cholesky" or (method == "auto" and _short(mask)):
        step, good = cholesky(gram, wanted, mask)
        left = ~good
    if left.any():
        step[left] = conjugate_gradients(gram, wanted[left], mask[left], errors[left], tol=tol)
    return step


def _short(mask: torch.Tensor) -> bool:
    """Whether the rows keep so few weights that Cholesky is faster than conjugate gradients."""
    longest = int(mask.sum(1).max()) if len(mask) else 0
    return longest**3 <= 4 * mask.shape[1] ** 2


def cholesky(
    gram: torch.Tensor, wanted: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Solve `G_KK d_K = wanted_K` for the kept columns `K` of every row, and say for which rows it went well.

    `gram` is `[in, in]`, `wanted` and `mask` are `[rows, in]`; it goes wrong where `G_KK` is not positive
    definite.

    >>> gram = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    >>> step, good = cholesky(gram, torch.tensor([[3.0, 3.0]]), torch.tensor([[True, True]]))
    >>> step.round(decimals=3), good
    (tensor([[1., 1.]]), tensor([True]))
    """
    step = torch.zeros_like(wanted)
    good = torch.ones(len(wanted), dtype=torch.bool, device=wanted.device)
    counts = mask.sum(1)
    # Rows of nearly one length lie together: they are filled up to the longest.
    order = counts.argsort()
    done = 0
    while done < len(order):
        longest = max(1, int(counts[order[done]]))
        some = order[done : done + max(1, CHOLESKY_VALUES // longest**2)]
        done += len(some)
        longest = max(1, int(counts[some].max()))
        columns = mask[some].byte().argsort(dim=1, descending=True, stable=True)[:, :longest]
        real = torch.arange(longest, device=mask.device) < counts[some, None]
        systems = gram[columns[:, :, None], columns[:, None, :]]
        systems.masked_fill_(~(real[:, :, None] & real[:, None, :]), 0)
        systems.diagonal(dim1=1, dim2=2).masked_fill_(~real, 1)
        factors, trouble = torch.linalg.cholesky_ex(systems)
        sides = wanted[some].gather(1, columns).masked_fill_(~real, 0)
        solved = torch.cholesky_solve(sides[:, :, None], factors).squeeze(2)
        step[some] = torch.zeros_like(wanted[some]).scatter_(1, columns, solved.masked_fill_(~real, 0))
        good[some] = (trouble == 0) & solved.isfinite().all(1)
    return step, good


def conjugate_gradients(
    gram: torch.Tensor, wanted: torch.Tensor, mask: torch.Tensor, errors: torch.Tensor, *, tol: float
) -> torch.Tensor:
    """Solve `G_KK d_K = wanted_K` for the kept columns `K` of all rows at once, from `d = 0`.

    `gram` is `[in, in]`, `wanted` and `mask` are `[rows, in]`, `errors` `[rows]` is the squared error before.
    Each row has its own step sizes and stops when its last steps together have lowered the error by less
    than `tol` of what is left of it: that sum estimates the distance from the optimum (Hestenes and Stiefel,
    1952).
    The preconditioner is the diagonal.

    >>> gram = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    >>> both = torch.tensor([[True, True]])
    >>> step = conjugate_gradients(gram, torch.tensor([[3.0, 3.0]]), both, torch.tensor([6.0]), tol=1e-6)
    >>> step.round(decimals=3)
    tensor([[1., 1.]])
    """
    result = torch.zeros_like(wanted)
    inverse = gram.diagonal().reciprocal()
    inverse = torch.where(inverse.isfinite() & (inverse > 0), inverse, 0)
    rows = torch.arange(len(wanted), device=wanted.device)
    kept = mask.to(gram.dtype)
    residual = wanted * kept
    step = torch.zeros_like(residual)
    direction = residual * inverse
    size = (residual * direction).sum(1)
    # The accuracy that rounding leaves.
    least = errors * torch.finfo(gram.dtype).eps
    left = errors.clone()
    gains: deque[torch.Tensor] = deque(maxlen=LOOK_BACK)
    for _ in range(2 * len(gram)):
        turned = (direction @ gram).mul_(kept)
        curvature = (direction * turned).sum(1)
        length = torch.where(curvature > 0, size / curvature, 0)
        step.addcmul_(length[:, None], direction)
        residual.addcmul_(length[:, None], turned, value=-1)
        gains.append((length * size).to(left.dtype))
        left -= gains[-1]
        done = sum(gains) <= torch.maximum(tol * left, least)
        done = done & (len(gains) == LOOK_BACK) | (curvature <= 0)
        if (finished := int(done.sum())) == len(done):
            break
        if 4 * finished > len(done):
            # Finished rows leave once they are many: until then copying costs more than carrying them on.
            result[rows[done]] = step[done]
            stay = ~done
            rows, kept, residual, step = rows[stay], kept[stay], residual[stay], step[stay]
            direction, size, least, left = direction[stay], size[stay], least[stay], left[stay]
            gains = deque((gain[stay] for gain in gains), maxlen=LOOK_BACK)
        scaled = residual * inverse
        new = (residual * scaled).sum(1)
        direction.mul_(torch.where(size > 0, new / size, 0)[:, None]).add_(scaled)
        size = new
    result[rows] = step
    return result
