"""Exercises about reconstruction: the error of a matrix, and the kept weights that have the least."""

import math
from collections.abc import Callable

import torch

from ...retraining.layerwise.optimum import Moments, optimum
from .verdict import Wrong, call, check, close, number, same_kind

Tensor = torch.Tensor
TOLERANCE = 1e-4


@check("the error of the outputs, without any activation")
def check_gram_error(my_error: Callable[[Tensor, Tensor, Tensor], float]) -> None:
    """Check `my_error(dense, new, gram)`: the squared error `‖XWᵀ − XŴᵀ‖²` from `G = XᵀX` alone.

    `dense` and `new` are `[out, in]`, `gram` is `[in, in]`; returned is a number, summed over all outputs and
    tokens: `tr((W − Ŵ) G (W − Ŵ)ᵀ)`.

    >>> check_gram_error(lambda dense, new, gram: ((dense - new) ** 2).sum())
    ✗ not yet: the error of a 2×3 matrix is 5; want 17. That is the error of the weights: the inputs, \
and so the Gram matrix, do not enter it
    """
    for inputs, dense, mask in _cases():
        new, gram = dense * mask, _gram(inputs)
        want = float(_moments(inputs).errors(new, dense).sum())
        got = number("the error", call(my_error, dense, new, gram))
        if _near(got, want):
            continue
        lost = dense - new
        hints = {
            float(
                lost.square().sum()
            ): "That is the error of the weights: the inputs, and so the Gram matrix, do not enter it",
            float((lost @ gram @ lost.T).sum()): "You add up the whole [out, out] matrix; the errors of the "
            "outputs are its diagonal",
            float(
                (lost @ gram).square().sum()
            ): "The Gram matrix is quadratic in the inputs already; nothing "
            "is to be squared after multiplying by it",
            math.sqrt(want): "That is the norm; want its square",
            want / len(dense): "That is the mean over the outputs; want the sum",
            want / len(inputs): "That is the mean over the tokens; want the sum",
            want / lost.numel(): "That is a mean; want the sum",
            want
            / float(_moments(inputs).target(dense)): "That is relative to the energy of the dense outputs; "
            "want the error itself",
        }
        raise Wrong(f"the error of {_size(dense)} is {got:.5g}; want {want:.5g}{_hint(got, hints)}")


@check("no choice of these kept weights has a smaller error")
def check_row_optimum(my_row: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    """Check `my_row(row, keep, gram)`: the kept weights of one output that reconstruct it best.

    `row` `[in]` is the dense matrix's, `keep` `[in]` says which weights stay, `gram` `[in, in]` is `XᵀX`.
    Returned is a row `[in]`, zero where pruned, that solves the normal equations of the kept columns.

    >>> check_row_optimum(lambda row, keep, gram: row * keep)
    ✗ not yet: of the row [1.0, 2.0, 0.5] with kept [True, False, True] the kept weights are as they were \
before: they have to take over what the pruned ones did, through the inputs that go together
    """
    for inputs, dense, mask in _cases():
        gram = _gram(inputs)
        best = optimum(dense * mask, dense, mask, _moments(inputs), method="cholesky")
        for row, keep, want in zip(dense, mask, best, strict=True):
            asked = f"of the row {[round(x, 2) for x in row.tolist()]} with kept {keep.tolist()}"
            if len(row) > 4:
                asked = f"of a row of {len(row)} weights, {int(keep.sum())} kept,"
            got = call(my_row, row.clone(), keep.clone(), gram.clone())
            if torch.is_tensor(got) and got.shape == (int(keep.sum()),) != row.shape:
                raise Wrong(f"{asked} you return the kept weights alone; want them in a row of {len(row)}")
            got = same_kind("your row", got, row).detach().double()
            if got[~keep].any():
                whole = _near_all(got, row)
                raise Wrong(
                    f"{asked} pruned weights are not zero{': it is the dense row again' if whole else ''}; "
                    "solve for the kept columns only"
                )
            if _near_all(got, want):
                continue
            if _near_all(got, row * keep):
                raise Wrong(
                    f"{asked} the kept weights are as they were before: they have to take over what the "
                    "pruned ones did, through the inputs that go together"
                )
            found, least = (_error(inputs, row, each) for each in (got, want))
            raise Wrong(f"{asked} your error is {found:.5g}; the least is {least:.5g}")


@check("1 is the best that these kept weights can do")
def check_multiple(my_multiple: Callable[[Tensor, Tensor, Tensor, Tensor], float]) -> None:
    """Check `my_multiple(dense, new, mask, gram)`: the error of a matrix as a multiple of the least one.

    `dense`, `new` and `mask` are `[out, in]`, `gram` is `[in, in]`. Returned is the squared error of `new`
    over the smallest that any weights with this mask have, both summed over the outputs.

    >>> check_multiple(lambda dense, new, mask, gram: 1.0)
    ✗ not yet: of a 2×3 matrix whose pruned weights were only set to zero the multiple is 1; want 1.6756
    """
    for inputs, dense, mask in _cases():
        moments, gram = _moments(inputs), _gram(inputs)
        best = optimum(dense * mask, dense, mask, moments, method="cholesky")
        least = moments.errors(best, dense)
        halfway = (dense * mask + best) / 2
        for how, new in [
            ("whose pruned weights were only set to zero", dense * mask),
            ("at its optimum", best),
            ("halfway to its optimum", halfway),
        ]:
            errors = moments.errors(new, dense)
            want = float(errors.sum() / least.sum())
            asked = f"of {_size(dense)} {how} the multiple"
            got = number("the multiple", call(my_multiple, dense, new, mask, gram))
            if _near(got, want):
                continue
            weights = (dense - new).square().sum() / (dense - best).square().sum()
            hints = {
                math.sqrt(want): "That is the ratio of the norms; want that of the squared errors",
                1 / want: "It is upside down: the least error is the unit",
                want - 1: "You have left out the optimum itself: at the optimum the multiple is 1, not 0",
                float((errors / least).mean()): "That is the mean of the rows' ratios; want the ratio of the "
                "sums, in which a row without much error counts little",
                float(
                    weights
                ): "You compare errors of weights; want those of outputs, through the Gram matrix",
            }
            raise Wrong(f"{asked} is {got:.5g}; want {want:.5g}{_hint(got, hints)}")


# --- what the cases have in common ----------------------------------------------------------------------


def _cases() -> list[tuple[Tensor, Tensor, Tensor]]:
    """Inputs `[tokens, in]`, a dense matrix `[out, in]` and its mask, in float64."""
    inputs = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0], [1.0, 0.0, 2.0], [1.0, 1.0, 0.0]])
    dense = torch.tensor([[1.0, 2.0, 0.5], [-1.0, 0.5, 1.0]])
    first = inputs, dense, torch.tensor([[True, False, True], [True, True, False]])
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(40, 6, generator=generator) @ torch.randn(6, 6, generator=generator)
    second = mixed, torch.randn(4, 6, generator=generator), torch.rand(4, 6, generator=generator) < 0.5
    second[2][0] = True
    second[2][1] = False
    second[2][2, :3] = True
    return [tuple(t if t.dtype == torch.bool else t.double() for t in case) for case in (first, second)]  # type: ignore[misc]


def _moments(inputs: Tensor) -> Moments:
    moments = Moments()
    moments.add(inputs[None])
    return moments


def _gram(inputs: Tensor) -> Tensor:
    gram = _moments(inputs).gram
    assert gram is not None
    return gram[0]


def _error(inputs: Tensor, row: Tensor, new: Tensor) -> float:
    return float(_moments(inputs).errors(new[None], row[None]).sum())


def _size(matrix: Tensor) -> str:
    return f"a {matrix.shape[0]}×{matrix.shape[1]} matrix"


def _near(got: float, want: float) -> bool:
    return math.isclose(got, want, rel_tol=TOLERANCE, abs_tol=1e-9)


def _near_all(got: Tensor, want: Tensor) -> bool:
    try:
        close("", got, want, TOLERANCE)
    except Wrong:
        return False
    return True


def _hint(got: float, hints: dict[float, str]) -> str:
    """What a wrong number gives away about how it was found."""
    return next((f". {said}" for value, said in hints.items() if _near(got, value)), "")
