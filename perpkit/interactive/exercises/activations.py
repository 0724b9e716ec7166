"""Exercises about criteria that look at activations: Wanda's score, and the update of SparseGPT."""

from collections.abc import Callable

import torch

from .verdict import Wrong, call, check, close, same_kind

Scores = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Hessian = Callable[[torch.Tensor, float], torch.Tensor]
Update = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]


@check("each weight counts as much as the input that it meets")
def check_wanda(my_scores: Scores) -> None:
    """Check `my_scores(weight, inputs)`: Wanda's score of every weight, `|W[i, j]| · ‖X[:, j]‖₂`.

    `weight` is `[out, in]`, `inputs` are `[tokens, in]`; returned are scores `[out, in]`.

    >>> check_wanda(lambda weight, inputs: weight.abs())
    ✗ not yet: the score has 1 at (0, 0); want 5. The inputs do not enter
    """
    generator = torch.Generator().manual_seed(0)
    cases = [
        (torch.tensor([[1.0, -2.0], [-3.0, 0.5]]), torch.tensor([[3.0, 0.0], [4.0, 2.0]])),
        (torch.randn(3, 3, generator=generator), torch.randn(3, 3, generator=generator)),
        (torch.randn(2, 5, generator=generator), torch.randn(7, 5, generator=generator)),
    ]
    for weight, inputs in cases:
        want = weight.abs() * inputs.norm(dim=0)
        got = same_kind("the score", call(my_scores, weight, inputs), want)
        hint = ""
        if torch.allclose(got.float(), weight.abs()):
            hint = ". The inputs do not enter"
        elif torch.allclose(got.float(), weight * inputs.norm(dim=0)):
            hint = ". A weight may be negative; its size is what counts"
        elif torch.allclose(got.float(), weight.abs() * inputs.abs().sum(0)):
            hint = ". That is the sum of absolute values; the norm is the root of the sum of squares"
        try:
            close("the score", got, want)
        except Wrong as wrong:
            raise Wrong(f"{wrong}{hint}") from None


@check("the inputs' second moments, damped so that they can be inverted")
def check_hessian(my_hessian: Hessian) -> None:
    """Check `my_hessian(inputs, damping)`: SparseGPT's `H = 2/N · XᵀX + damping · mean(diag) · I`.

    `inputs` are `[N, in]`, returned is `[in, in]`; the mean is that of the diagonal of `2/N · XᵀX`.

    >>> check_hessian(lambda inputs, damping: 2 / len(inputs) * inputs.T @ inputs)
    ✗ not yet: the Hessian has 25 at (0, 0); want 27.9. The damping is missing
    """
    generator = torch.Generator().manual_seed(0)
    for inputs, damping in [
        (torch.tensor([[3.0, 0.0], [4.0, 2.0]]), 0.2),
        (torch.randn(6, 4, generator=generator), 0.01),
    ]:
        plain = 2 / len(inputs) * inputs.T @ inputs
        want = plain + damping * plain.diag().mean() * torch.eye(len(plain))
        got = same_kind("the Hessian", call(my_hessian, inputs, damping), want)
        hint = ""
        if torch.allclose(got, plain):
            hint = ". The damping is missing"
        elif torch.allclose(got, plain + damping * plain.diag().mean()):
            hint = ". Damp the diagonal alone"
        elif torch.allclose(got, plain + damping * torch.eye(len(plain))):
            hint = ". The damping is relative to the mean of the diagonal"
        elif torch.allclose(got, want * len(inputs)) or torch.allclose(got, want * len(inputs) / 2):
            hint = ". The factor 2/N is missing, in whole or in part"
        try:
            close("the Hessian", got, want)
        except Wrong as wrong:
            raise Wrong(f"{wrong}{hint}") from None


@check("the others take over what the pruned weight did, as far as the inputs allow")
def check_obs(my_update: Update) -> None:
    """Check `my_update(row, inverse, index)`: prune one weight of a row and let the others make up for it.

    `row` is `[in]`, `inverse` is H⁻¹ `[in, in]`; the new row is `w − w_q / [H⁻¹]_qq · H⁻¹[:, q]`, with q the
    `index`: zero there, and of all such rows the one with the least error on the inputs.

    >>> def masked(row, inverse, index):
    ...     row = row.clone()
    ...     row[index] = 0
    ...     return row
    >>> check_obs(masked)
    ✗ not yet: the row has 1 at (0,); want 2. The other weights are as they were: they have to move
    """
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(20, 5, generator=generator)
    cases = [
        # Two inputs that are often alike: the first weight takes over half of the second.
        (torch.tensor([1.0, 2.0]), torch.linalg.inv(torch.tensor([[2.0, 1.0], [1.0, 1.0]])), 1),
        (torch.randn(5, generator=generator), torch.linalg.inv(inputs.T @ inputs / 10), 2),
    ]
    for row, inverse, index in cases:
        want = row - row[index] / inverse[index, index] * inverse[:, index]
        got = same_kind("the row", call(my_update, row, inverse, index), want)
        masked = row.clone()
        masked[index] = 0
        hint = ""
        if torch.allclose(got, masked):
            hint = ". The other weights are as they were: they have to move"
        elif torch.allclose(got, row - row[index] * inverse[:, index], atol=1e-5):
            hint = ". Divide by the diagonal entry: the pruned weight must come out as zero"
        elif torch.allclose(got, 2 * row - want, atol=1e-5):
            hint = ". The sign is the wrong way round"
        try:
            close("the row", got, want, 1e-4)
        except Wrong as wrong:
            raise Wrong(f"{wrong}{hint}") from None
