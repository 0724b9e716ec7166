"""SparseFW: the steps by hand and slowly, budgets that hold, and masks that lose less of the output."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from perpkit.pruning.criteria import magnitude, ria, wanda
from perpkit.pruning.frank_wolfe import _relaxed, sparsefw
from perpkit.pruning.selection import grouped, select

HOW = [
    {"sparsity": 0.5},
    {"sparsity": 0.37, "group": "layer"},
    {"sparsity": None, "pattern": (2, 4)},
    {"sparsity": None, "pattern": (5, 6)},
]


def problem(rows=6, width=24, seed=0, dtype=torch.float64):
    """A weight [rows, width] and XᵀX of inputs that lie near few directions."""
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, width, dtype=torch.float64, generator=draw)
    inputs = torch.randn(200, width // 3 + 1, dtype=torch.float64, generator=draw)
    inputs = inputs @ torch.randn(width // 3 + 1, width, dtype=torch.float64, generator=draw)
    inputs += 0.5 * torch.randn(200, width, dtype=torch.float64, generator=draw)
    return weight.to(dtype), (inputs.T @ inputs).to(dtype)


def objective(weight, relaxed, gram):
    lost = (weight - relaxed * weight).double()
    return ((lost @ gram.double()) * lost).sum().item()


def slowly(weight, gram, shape, budget, alpha, iterations):
    """The algorithm in loops over groups and their entries, from Wanda's mask; the mask and its start."""
    scores = wanda(weight, gram.diagonal().sqrt()).reshape(shape)
    groups, size = shape
    order = [sorted(range(size), key=lambda j, g=g: (scores[g, j].item(), j)) for g in range(groups)]
    kept = [row[size - budget :] for row in order]
    permanent = math.floor(alpha * budget + 1e-9)
    fixed = [row[budget - permanent :] for row in kept]
    mask = torch.zeros(shape, dtype=weight.dtype)
    for g in range(groups):
        mask[g, kept[g]] = 1
    for t in range(iterations):
        relaxed = mask.view_as(weight)
        gradient = (-2 * weight * ((weight - relaxed * weight) @ gram)).reshape(shape)
        vertex = torch.zeros(shape, dtype=weight.dtype)
        for g in range(groups):
            free = [j for j in range(size) if j not in fixed[g] and gradient[g, j] < 0]
            free.sort(key=lambda j, g=g: gradient[g, j].item())
            vertex[g, free[: budget - permanent] + fixed[g]] = 1
        mask = mask + 2 / (t + 2) * (vertex - mask)
    chosen = torch.zeros(shape, dtype=torch.bool)
    for g in range(groups):
        best = sorted(range(size), key=lambda j, g=g: (round(mask[g, j].item(), 9), order[g].index(j)))
        chosen[g, best[size - budget :]] = True
    return chosen.view_as(weight)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("alpha", [0, 0.5, 0.9, 1])
@pytest.mark.parametrize("iterations", [0, 1, 2, 7, 30])
def test_equals_the_loops(how, alpha, iterations):
    weight, gram = problem(3)
    options = {"group": "row", "pattern": None, **how}
    groups, budget = grouped(weight, **options)
    mask = sparsefw(weight, gram, alpha=alpha, iterations=iterations, **how)
    assert torch.equal(mask, slowly(weight, gram, groups.shape, budget, alpha, iterations))


def test_by_hand():
    # Inputs 0 and 1 are one and the same: to lose 2.0 and -1.5 together costs 0.5², less than any one.
    weight = torch.tensor([[2.0, -1.5, 1.0]])
    gram = torch.tensor([[1.0, 1, 0], [1, 1, 0], [0, 0, 1]])

    def kept(iterations):
        return sparsefw(weight, gram, sparsity=2 / 3, alpha=0, iterations=iterations).tolist()[0]

    assert kept(0) == [True, False, False]
    # W ⊙ (W − M⊙W) G is [-3, 2.25, 1], one step later [4, -3, 1], then from (2/3, 1/3, 0) [-0.67, 0.5, 1]
    assert kept(1) == [False, True, False]
    assert kept(2) == [True, False, False]
    assert kept(3) == [False, False, True]


def test_weights_that_only_add_to_the_error_are_no_part_of_a_step():
    # Once the first is kept, the second would make things worse, although the budget has room for it.
    weight, gram = torch.tensor([[3.0, -1.0, 0.5]]), torch.tensor([[1.0, 1, 0], [1, 1, 0], [0, 0, 1]])
    start, free = torch.tensor([[True, False, True]]), torch.ones(1, 3, dtype=torch.bool)
    relaxed = _relaxed(weight, gram, start, ~free, free, 2, (1, 3), 1)
    assert relaxed.tolist() == [[0.0, 1.0, 0.0]]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_the_relaxed_error_sinks_below_that_of_the_best_mask(seed, alpha):
    weight, gram = problem(1, 9, seed)
    start = select(wanda(weight, gram.diagonal().sqrt()), 4 / 9, group="row")
    fixed = select(wanda(weight, gram.diagonal().sqrt()), 1 - math.floor(alpha * 5) / 9, group="row")
    free = int((start & ~fixed).sum())
    relaxed = _relaxed(weight, gram, start, fixed, torch.ones_like(start), free, (1, 9), 3000)
    assert relaxed.min() >= 0
    assert relaxed.max() <= 1
    assert relaxed.sum() <= 5 + 1e-9
    assert (relaxed[fixed] == 1).all()
    masks = [
        torch.tensor([[j in kept for j in range(9)]]) | fixed
        for kept in itertools.combinations(range(9), free)
    ]
    best = min(objective(weight, mask, gram) for mask in masks)
    assert objective(weight, relaxed, gram) <= best * 1.001


# --- budgets ----------------------------------------------------------------------------------------


@given(
    st.integers(1, 4),
    st.integers(1, 30),
    st.floats(0, 1),
    st.sampled_from(["row", "layer"]),
    st.floats(0, 1),
    st.integers(0, 5),
    st.integers(0, 99),
    st.sampled_from([None, 0.2, 0.6, 0.95]),
)
def test_counts_are_exact_and_nothing_comes_back(rows, width, sparsity, group, alpha, steps, seed, gone):
    weight, gram = problem(rows, width, seed, torch.float32)
    draw = torch.Generator().manual_seed(seed)
    kept = None if gone is None else torch.rand(rows, width, generator=draw) > gone
    weight[torch.rand(rows, width, generator=draw) < 0.2] = 0
    mask = sparsefw(weight, gram, sparsity=sparsity, group=group, alpha=alpha, iterations=steps, kept=kept)
    before = torch.zeros_like(mask) if kept is None else ~kept
    assert not (mask & before).any()
    dims = (0, 1) if group == "layer" else (1,)
    n = rows * width if group == "layer" else width
    assert torch.equal((~mask).sum(dims), before.sum(dims).clamp(min=round(sparsity * n)))


@given(st.integers(1, 20), st.integers(0, 20), st.integers(0, 99), st.sampled_from([0.0, 0.3, 0.8]))
def test_patterns_hold_whatever_was_pruned_before(m, n, seed, gone):
    n = min(n, m)
    weight, gram = problem(3, 2 * m, seed, torch.float32)
    kept = torch.rand(3, 2 * m, generator=torch.Generator().manual_seed(seed)) >= gone
    mask = sparsefw(weight, gram, sparsity=None, pattern=(n, m), kept=kept, iterations=5)
    assert not (mask & ~kept).any()
    assert torch.equal(mask.view(-1, m).sum(1), kept.view(-1, m).sum(1).clamp(max=n))


# --- warm starts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", ["wanda", "ria", "magnitude"])
def test_no_steps_or_nothing_free_is_the_warm_start(how, name):
    weight, gram = problem()
    norms = gram.diagonal().sqrt()
    scores = {"wanda": wanda(weight, norms), "ria": ria(weight, norms), "magnitude": magnitude(weight)}[name]
    expected = select(scores, **{"group": "row", **how})
    assert torch.equal(sparsefw(weight, gram, warm_start=name, iterations=0, **how), expected)
    assert torch.equal(sparsefw(weight, gram, warm_start=name, alpha=1, **how), expected)
    # As a mask, its highest by Wanda are fixed.
    mask = sparsefw(weight, gram, warm_start=expected, iterations=20, **how)
    groups, budget = grouped(expected, **{"group": "row", **how})
    fixed = wanda(weight, norms).masked_fill(~expected, -1).view(groups.shape)
    lowest = fixed.sort(dim=1, descending=True).values[:, math.floor(0.9 * budget) - 1, None]
    assert mask.view(groups.shape)[fixed >= lowest].all()


def test_the_first_step_forgets_the_start_but_for_what_is_fixed():
    # With inputs that have nothing to do with each other, the best step adds what is lost, however much was
    # kept: from the mask that keeps the two largest, it goes to the one that keeps the other two.
    weight, gram = torch.tensor([[4.0, 3.0, 2.0, 1.0]]), torch.eye(4)
    free = torch.ones(1, 4, dtype=torch.bool)
    start = torch.tensor([[True, True, False, False]])
    assert _relaxed(weight, gram, start, ~free, free, 2, (1, 4), 1).tolist() == [[0, 0, 1, 1]]
    fixed = torch.tensor([[True, False, False, False]])
    assert _relaxed(weight, gram, start, fixed, free, 1, (1, 4), 1).tolist() == [[1, 0, 1, 0]]


# --- it pays ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{"sparsity": 0.5}, {"sparsity": 0.6}, {"sparsity": 0.5, "pattern": (2, 4)}])
@pytest.mark.parametrize("seed", range(3))
def test_the_output_changes_less_than_with_wanda(how, seed):
    weight, gram = problem(32, 64, seed)
    greedy = select(wanda(weight, gram.diagonal().sqrt()), **{"group": "row", **how})
    mask = sparsefw(weight, gram, **how)
    assert objective(weight, mask, gram) < 0.9 * objective(weight, greedy, gram)


# --- numerics and mistakes --------------------------------------------------------------------------


@pytest.mark.parametrize("how", HOW)
def test_scale_layout_and_precision_do_not_matter(how):
    weight, gram = problem(8, 24, dtype=torch.float32)
    mask = sparsefw(weight, gram, **how)
    for scale in (2.0**-20, 2.0**20):
        assert torch.equal(sparsefw(weight, gram * scale, **how), mask)
        assert torch.equal(sparsefw(weight * scale, gram, **how), mask)
    before = weight.clone()
    kept = torch.ones(24, 8, dtype=torch.bool).T
    assert torch.equal(sparsefw(weight.T.contiguous().T, gram.double(), kept=kept, **how), mask)
    coarse = weight.bfloat16()
    assert torch.equal(sparsefw(coarse, gram, **how), sparsefw(coarse.float(), gram, **how))
    assert torch.equal(weight, before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gram": torch.eye(5)}, r"XᵀX is \(5, 5\); a weight \(6, 24\) needs \(24, 24\)"),
        ({"kept": torch.ones(24, 6, dtype=torch.bool)}, r"the earlier mask is torch\.bool \(24, 6\)"),
        ({"alpha": 1.1}, r"alpha is 1\.1"),
        ({"alpha": math.nan}, "alpha is nan"),
        ({"iterations": -1}, "iterations is -1"),
        ({"warm_start": "wander"}, "unknown warm start 'wander'; it is a mask or wanda, ria, magnitude"),
        ({"warm_start": torch.ones(6, 24)}, r"the warm start is torch\.float32 \(6, 24\)"),
        ({"warm_start": torch.ones(6, 24, dtype=torch.bool)}, "keeps 24 weights of group 0, not 12"),
        ({"sparsity": 1.5}, r"sparsity is 1\.5"),
        ({"pattern": (2, 5)}, "the width 24 is no multiple of 5"),
        ({"group": "column"}, "unknown group 'column'"),
        ({"weight": torch.full((6, 24), math.nan)}, "the weight has entries that are not finite"),
    ],
)
def test_mistakes_are_named(change, message):
    weight, gram = problem()
    given = {"weight": weight, "gram": gram, "sparsity": 0.5, **change}
    with pytest.raises(ValueError, match=message):
        sparsefw(**given)


def test_a_start_that_brings_weights_back_is_refused():
    weight, gram = problem()
    start = select(weight.abs(), 0.5, group="row")
    kept = torch.ones_like(start)
    kept[0, start[0].nonzero()[0]] = False
    with pytest.raises(ValueError, match="keeps weights that the earlier mask has pruned"):
        sparsefw(weight, gram, sparsity=0.5, warm_start=start, kept=kept)
