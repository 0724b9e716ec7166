"""The exact optimum of one matrix: against least squares row by row, and where the sums say too little."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from perpkit.retraining.layerwise.optimum import Moments, cholesky, conjugate_gradients, optimum

DOUBLE = torch.float64


def make_case(*, tokens=60, columns=12, rows=7, groups=1, drift=0.0, sparsity=0.5, seed=0, dtype=DOUBLE):
    """Inputs of the pruned and the dense model, a dense matrix and what is kept of it."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(columns, columns, generator=generator, dtype=dtype)
    x = torch.randn(groups, tokens, columns, generator=generator, dtype=dtype) @ mixed
    other = x + drift * torch.randn(x.shape, generator=generator, dtype=dtype) if drift else None
    dense = torch.randn(groups * rows, columns, generator=generator, dtype=dtype)
    mask = torch.rand(dense.shape, generator=generator) > sparsity
    return x, other, dense, mask


def summed(x, other, batches=3):
    moments = Moments()
    wanted = (x if other is None else other).tensor_split(batches, 1)
    for rows, dense_rows in zip(x.tensor_split(batches, 1), wanted, strict=True):
        moments.add(rows, None if other is None else dense_rows)
    return moments


def slow_optimum(x, other, dense, mask):
    """Least squares for each row on its kept columns, of least norm where there are several."""
    found = torch.zeros_like(dense)
    wanted = x if other is None else other
    per_group = len(dense) // len(x)
    for row, kept in enumerate(mask):
        group = row // per_group
        target = wanted[group] @ dense[row]
        found[row, kept] = torch.linalg.pinv(x[group][:, kept]) @ target
    return found


def slow_errors(x, other, weight, dense):
    wanted = x if other is None else other
    made = [a @ w.T for a, w in zip(x, weight.chunk(len(x)), strict=True)]
    target = [a @ w.T for a, w in zip(wanted, dense.chunk(len(x)), strict=True)]
    return torch.cat([(a - b).square().sum(0) for a, b in zip(made, target, strict=True)])


@pytest.mark.parametrize("method", ["cg", "cholesky", "auto"])
@pytest.mark.parametrize("drift", [0.0, 0.3])
@pytest.mark.parametrize("groups", [1, 3])
def test_it_is_least_squares_row_by_row(method, drift, groups):
    x, other, dense, mask = make_case(drift=drift, groups=groups)
    mask[0], mask[1], mask[2] = True, False, False
    mask[2, 3] = True
    found = optimum(dense * mask, dense, mask, summed(x, other), tol=1e-14, method=method)
    assert torch.allclose(found, slow_optimum(x, other, dense, mask), rtol=1e-7, atol=1e-7)
    assert torch.count_nonzero(found[~mask]) == 0


@pytest.mark.parametrize("drift", [0.0, 0.3])
@pytest.mark.parametrize("groups", [1, 2])
def test_errors_are_those_of_the_outputs(drift, groups):
    x, other, dense, mask = make_case(drift=drift, groups=groups)
    moments = summed(x, other)
    weight = dense * mask + 0.1
    assert moments.tokens == x.shape[1]
    assert torch.allclose(moments.errors(weight, dense), slow_errors(x, other, weight, dense))
    energy = slow_errors(x, other, torch.zeros_like(dense), dense).sum()
    assert moments.target(dense) == pytest.approx(float(energy))


def test_where_it_starts_does_not_matter():
    x, other, dense, mask = make_case(drift=0.2)
    moments = summed(x, other)
    elsewhere = torch.randn(dense.shape, generator=torch.Generator().manual_seed(9), dtype=DOUBLE) * mask
    one, two = (optimum(start, dense, mask, moments, tol=1e-14) for start in (dense * mask, elsewhere))
    assert torch.allclose(one, two, atol=1e-6)


@pytest.mark.parametrize("method", ["cg", "cholesky"])
def test_dead_inputs_leave_their_weights_alone(method):
    x, _, dense, mask = make_case()
    x[:, :, 4] = 0
    mask[:, 4] = True
    start = dense * mask
    found = optimum(start, dense, mask, summed(x, None), tol=1e-14, method=method)
    assert torch.allclose(found[:, 4], start[:, 4])
    best = slow_errors(x, None, slow_optimum(x, None, dense, mask), dense)
    assert torch.allclose(slow_errors(x, None, found, dense), best, atol=1e-8)


@pytest.mark.parametrize("method", ["cg", "cholesky"])
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("drift", [0.0, 0.3])
def test_fewer_tokens_than_kept_weights_give_the_least_error(method, dtype, drift):
    x, other, dense, mask = make_case(tokens=5, columns=24, drift=drift, dtype=dtype, sparsity=0.3)
    found = optimum(dense * mask, dense, mask, summed(x, other), method=method)
    assert found.isfinite().all()
    # As many kept weights as tokens and more: every output can be met.
    before = slow_errors(x, other, dense * mask, dense)
    assert (slow_errors(x, other, found, dense) < 1e-4 * before.sum()).all()
    # Of all that do so it is near where it started.
    assert (found - dense * mask).norm() < 3 * dense.norm()


def test_nothing_seen_changes_nothing():
    _, _, dense, mask = make_case()
    assert torch.equal(optimum(dense * mask, dense, mask, Moments()), dense * mask)
    blank = Moments()
    blank.add(torch.zeros(1, 4, 12, dtype=DOUBLE))
    for method in ("cg", "cholesky", "auto"):
        assert torch.equal(optimum(dense * mask, dense, mask, blank, method=method), dense * mask)


@given(
    seed=st.integers(0, 10_000),
    tokens=st.integers(1, 40),
    columns=st.integers(1, 16),
    sparsity=st.floats(0, 1),
    drift=st.sampled_from([0.0, 0.5]),
    method=st.sampled_from(["cg", "cholesky"]),
)
@settings(max_examples=60)
def test_it_never_makes_the_error_larger(seed, tokens, columns, sparsity, drift, method):
    x, other, dense, mask = make_case(
        seed=seed, tokens=tokens, columns=columns, sparsity=sparsity, drift=drift, rows=4, dtype=torch.float32
    )
    moments = summed(x, other, batches=1)
    found = optimum(dense * mask, dense, mask, moments, method=method)
    assert found.isfinite().all()
    assert torch.count_nonzero(found[~mask]) == 0
    energy = moments.target(dense)
    before, after = (float(moments.errors(weight, dense).sum()) for weight in (dense * mask, found))
    assert after <= before + 1e-5 * energy
    least = slow_errors(
        x.double(), other if other is None else other.double(), found.double(), dense.double()
    )
    exact = slow_optimum(x.double(), other if other is None else other.double(), dense.double(), mask)
    exact = slow_errors(x.double(), other if other is None else other.double(), exact, dense.double())
    assert float(least.sum()) <= 1.01 * float(exact.sum()) + 1e-4 * energy


@pytest.mark.parametrize("method", ["cg", "cholesky"])
@pytest.mark.parametrize("drift", [0.0, 0.3])
def test_the_ridge_holds_the_weights_near_what_they_are(method, drift):
    x, other, dense, mask = make_case(drift=drift)
    start, wanted = dense * mask, x if other is None else other
    found = optimum(start, dense, mask, summed(x, other), ridge=0.1, tol=1e-14, method=method)
    gram = x[0].T @ x[0]
    strength = 0.1 * gram.diagonal().mean()
    for row, kept in enumerate(mask):
        system = gram[kept][:, kept] + strength * torch.eye(int(kept.sum()), dtype=DOUBLE)
        side = (x[0].T @ (wanted[0] @ dense[row]) - gram @ start[row])[kept]
        assert torch.allclose(
            found[row, kept] - start[row, kept], torch.linalg.solve(system, side), atol=1e-7
        )
    moved = [
        (optimum(start, dense, mask, summed(x, other), ridge=r, method=method) - start).norm()
        for r in (0, 0.1, 1)
    ]
    assert moved[0] > moved[1] > moved[2] > 0


def test_a_hand_worked_case():
    moments = Moments()
    moments.add(
        torch.tensor([[[1.0, 1.0], [1.0, -1.0], [2.0, 0.0]]]),
        torch.tensor([[[1.0, 2.0], [1.0, 0.0], [2.0, 2.0]]]),
    )
    # The target is 3, 1, 4 for W = (1, 1); the first column is 1, 1, 2: (3 + 1 + 8) / 6.
    dense = torch.tensor([[1.0, 1.0]])
    found = optimum(torch.tensor([[1.0, 0.0]]), dense, torch.tensor([[True, False]]), moments)
    assert torch.allclose(found, torch.tensor([[2.0, 0.0]]), atol=1e-4)
    assert moments.errors(torch.tensor([[2.0, 0.0]]), dense).tolist() == [2.0]


def test_inputs_in_16_bits_are_summed_in_32():
    x, other, dense, mask = make_case(drift=0.2, dtype=torch.float32)
    half = Moments()
    half.add(x.bfloat16(), other.bfloat16())
    single = Moments()
    single.add(x.bfloat16().float(), other.bfloat16().float())
    assert half.gram.dtype == half.drift.dtype == torch.float32
    assert torch.equal(half.gram, single.gram)
    found = optimum((dense * mask).bfloat16(), dense.bfloat16(), mask, half)
    assert found.dtype == torch.float32
    assert (
        half.errors(found, dense.bfloat16()).sum()
        < half.errors((dense * mask).bfloat16(), dense.bfloat16()).sum()
    )


def test_cholesky_says_what_it_cannot_solve():
    gram = torch.tensor([[1.0, 2.0], [2.0, 1.0]], dtype=DOUBLE)
    mask = torch.tensor([[True, True], [True, False]])
    step, good = cholesky(gram, torch.ones(2, 2, dtype=DOUBLE), mask)
    assert good.tolist() == [False, True]
    assert step[1].tolist() == [1.0, 0.0]


def test_cholesky_takes_many_rows_in_several_goes(monkeypatch):
    x, _, _, mask = make_case(rows=50)
    gram, wanted = (
        x[0].T @ x[0],
        torch.randn(50, 12, generator=torch.Generator().manual_seed(3), dtype=DOUBLE),
    )
    whole, _ = cholesky(gram, wanted, mask)
    monkeypatch.setattr("perpkit.retraining.layerwise.optimum.CHOLESKY_VALUES", 150)
    assert torch.allclose(cholesky(gram, wanted, mask)[0], whole)


def test_rows_that_finish_early_keep_their_result():
    """One hard system among easy ones: the easy rows leave, and all are right."""
    x, _, _, _ = make_case(columns=30, tokens=100)
    gram = x[0].T @ x[0]
    mask = torch.zeros(40, 30, dtype=torch.bool)
    mask[:, 0] = True
    mask[7] = True
    wanted = torch.randn(40, 30, generator=torch.Generator().manual_seed(3), dtype=DOUBLE)
    errors = torch.full((40,), 1e6, dtype=DOUBLE)
    step = conjugate_gradients(gram, wanted, mask, errors, tol=1e-16)
    assert torch.allclose(step[7], torch.linalg.solve(gram, wanted[7]), atol=1e-6)
    assert torch.allclose(step[:7, 0], wanted[:7, 0] / gram[0, 0])
    assert torch.count_nonzero(step[~mask]) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "lu"}, "unknown method 'lu'; the methods are auto, cg, cholesky"),
        ({"ridge": -1.0}, "ridge is -1.0"),
        ({"ridge": float("nan")}, "ridge is nan"),
    ],
)
def test_bad_options_are_named(options, message):
    x, other, dense, mask = make_case()
    with pytest.raises(ValueError, match=message):
        optimum(dense * mask, dense, mask, summed(x, other), **options)


@pytest.mark.parametrize("method", ["cg", "cholesky"])
@pytest.mark.parametrize("factor", [300.0, 3000.0, 10000.0])
def test_a_massive_activation_costs_the_others_nothing(method, factor):
    x, _, dense, mask = make_case(tokens=600, columns=64, rows=16)
    x[:, :, 5] *= factor
    mask[:, 5] = True
    moments = summed(x.float(), None)
    found = optimum((dense * mask).float(), dense.float(), mask, moments, tol=1e-6, method=method)
    best = slow_errors(x, None, slow_optimum(x, None, dense, mask), dense).sum()
    # Three digits are what float32 sums can tell: the errors are small differences of the large.
    assert slow_errors(x, None, found.double(), dense).sum() < 1.01 * best
