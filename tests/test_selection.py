"""Exact selection in a matrix, in each row, in each N:M group."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from perpkit.pruning.selection import checked_pattern, grouped, highest, parse_pattern, select

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
INFINITY = math.inf
# Few values, so that ties are heavy; both zeros and both infinities among them.
TIED = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, INFINITY, -INFINITY])
SCORES = st.one_of(
    st.lists(TIED, min_size=1, max_size=40),
    st.lists(st.floats(allow_nan=False), min_size=1, max_size=40),
    st.lists(st.floats(allow_nan=False, width=16), min_size=1, max_size=40),
)
SPARSITIES = st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.floats(0, 1))


def slowly(scores, sparsity):
    """Sort by score, then by position; the first `round(sparsity · n)` are pruned."""
    return without_lowest(scores, round(sparsity * len(scores)))


def without_lowest(scores, count):
    order = sorted(range(len(scores)), key=lambda i: (scores[i], i))
    pruned = set(order[:count])
    return [i not in pruned for i in range(len(scores))]


def tied_scores(shape, seed, levels=5):
    """Few different scores, so that most of them tie."""
    return torch.randint(levels, shape, generator=torch.Generator().manual_seed(seed)).double()


# --- the whole tensor -------------------------------------------------------------------------------


@given(SCORES, SPARSITIES, st.sampled_from(DTYPES))
def test_selection_equals_sorting(scores, sparsity, dtype):
    tensor = torch.tensor(scores, dtype=torch.float64).to(dtype)
    mask = select(tensor, sparsity)
    assert mask.dtype == torch.bool
    assert mask.tolist() == slowly(tensor.double().tolist(), sparsity)


@given(SCORES, SPARSITIES)
def test_the_count_is_exact(scores, sparsity):
    mask = select(torch.tensor(scores, dtype=torch.float64), sparsity)
    assert int((~mask).sum()) == round(sparsity * len(scores))


@given(SCORES, SPARSITIES, SPARSITIES)
def test_more_sparsity_only_prunes_more(scores, one, other):
    less, more = sorted((one, other))
    tensor = torch.tensor(scores, dtype=torch.float64)
    assert not (select(tensor, more) & ~select(tensor, less)).any()


@given(st.integers(1, 6), st.integers(1, 6), SPARSITIES, st.integers(0, 99))
def test_a_matrix_is_compared_as_a_whole(rows, columns, sparsity, seed):
    scores = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    mask = select(scores, sparsity)
    assert mask.shape == scores.shape
    assert torch.equal(mask.flatten(), select(scores.flatten(), sparsity))
    # a transposed view is a matrix like any other
    assert int(select(scores.T, sparsity).sum()) == int(mask.sum())


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_matrices_full_of_ties(dtype):
    # the published implementations prune every score up to the threshold, here all of them
    scores = torch.ones(300, 300, dtype=dtype)
    scores[:, 0] = 2
    mask = select(scores, 0.5)
    assert int((~mask).sum()) == 45_000
    assert mask[:, 0].all()
    assert mask.flatten().tolist() == slowly(scores.flatten().tolist(), 0.5)


def test_scores_are_left_as_they_are():
    scores = torch.tensor([3.0, 1.0, 2.0])
    select(scores, 0.5)
    assert scores.tolist() == [3.0, 1.0, 2.0]


@pytest.mark.parametrize("sparsity", [-0.1, 1.1, 50, math.nan])
def test_sparsity_is_a_fraction(sparsity):
    with pytest.raises(ValueError, match=f"sparsity is {sparsity}; it is the fraction of pruned weights"):
        select(torch.ones(4), sparsity)


def test_nan_scores_are_refused():
    with pytest.raises(ValueError, match="a score is NaN"):
        select(torch.tensor([1.0, math.nan]), 0.5)


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 4), (2, 3, 4)])
@pytest.mark.parametrize("group", ["layer", "row"])
def test_any_shape_is_kept(shape, group):
    mask = select(torch.rand(shape, generator=torch.Generator().manual_seed(0)), 0.5, group=group)
    assert mask.shape == shape
    assert int(mask.sum()) == math.prod(shape) - round(0.5 * math.prod(shape))


def test_the_scores_of_pruned_weights_are_the_lowest():
    scores = torch.tensor([[-1.0, -INFINITY, 3.0, -INFINITY]])
    assert select(scores, 0.5).tolist() == [[True, False, True, False]]
    assert select(scores, None, pattern=(1, 2)).tolist() == [[True, False, True, False]]


# --- rows -------------------------------------------------------------------------------------------


@given(st.integers(1, 4), st.integers(1, 45), SPARSITIES, st.integers(0, 999), st.sampled_from(DTYPES))
def test_rows_are_compared_each_for_itself(rows, width, sparsity, seed, dtype):
    scores = tied_scores((rows, width), seed).to(dtype)
    mask = select(scores, sparsity, group="row")
    assert mask.tolist() == [slowly(row, sparsity) for row in scores.tolist()]


@given(st.integers(1, 4), st.integers(17, 45), SPARSITIES, st.integers(0, 999))
def test_rows_without_and_with_ties_in_one_matrix(rows, width, sparsity, seed):
    scores = tied_scores((rows, width), seed)
    scores[::2] += torch.rand(width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    mask = select(scores, sparsity, group="row")
    assert mask.tolist() == [slowly(row, sparsity) for row in scores.tolist()]


def test_rows_and_columns_of_a_view():
    scores = tied_scores((30, 20), 0)
    for view in (scores.T, scores[::2, ::2], scores[:, 3:11]):
        for how in ({"group": "row"}, {"group": "layer"}, {"pattern": (1, 2), "sparsity": None}):
            options = {"sparsity": 0.4, **how}
            assert torch.equal(select(view, **options), select(view.contiguous(), **options))


def test_unknown_groups_are_refused():
    with pytest.raises(ValueError, match="unknown group 'column'; the groups are layer, row"):
        select(torch.ones(2, 2), 0.5, group="column")


# --- N:M --------------------------------------------------------------------------------------------


@given(st.data())
def test_patterns_keep_n_of_every_m(data):
    m = data.draw(st.integers(1, 20))
    n = data.draw(st.integers(0, m))
    shape = (data.draw(st.integers(1, 3)), m * data.draw(st.integers(1, 3)))
    dtype = data.draw(st.sampled_from(DTYPES))
    scores = tied_scores(shape, data.draw(st.integers(0, 999)), levels=4).to(dtype)
    mask = select(scores, None, pattern=(n, m))
    assert mask.shape == shape
    for group, chosen in zip(scores.view(-1, m).tolist(), mask.view(-1, m).tolist(), strict=True):
        assert chosen == without_lowest(group, m - n)


def test_more_groups_than_are_ranked_together():
    scores = tied_scores((2**18 + 3, 4), 0)
    mask = select(scores, None, pattern=(1, 4))
    # the last of the largest is kept
    largest = scores == scores.amax(1, keepdim=True)
    last = largest & (largest.flip(1).cumsum(1).flip(1) == 1)
    assert torch.equal(mask, last)


@given(st.integers(1, 20), st.integers(0, 20), st.integers(0, 99))
def test_the_highest_of_each_column(size, count, seed):
    scores = tied_scores((size, 5), seed)
    count = min(count, size)
    assert torch.equal(highest(scores, count, dim=0), highest(scores.T.contiguous(), count).T)


def test_a_width_that_is_no_multiple_is_refused():
    with pytest.raises(ValueError, match="the width 6 is no multiple of 4: no 2:4 pattern fits"):
        select(torch.ones(4, 6), None, pattern=(2, 4))


@pytest.mark.parametrize(
    ("text", "pattern"), [("2:4", (2, 4)), ("0:1", (0, 1)), ("16:16", (16, 16)), ("1:3", (1, 3))]
)
def test_patterns_are_read(text, pattern):
    assert parse_pattern(text) == pattern


@pytest.mark.parametrize("text", ["", "2", "2/4", "-1:4", "2:4:8", "a:b", "2.0:4", " 2:4"])
def test_what_is_no_pattern_is_refused(text):
    with pytest.raises(ValueError, match=f"the pattern is '{text}'; write N:M"):
        parse_pattern(text)


@pytest.mark.parametrize("pattern", [(5, 4), (0, 0), (-1, 4)])
def test_impossible_patterns_are_refused(pattern):
    n, m = pattern
    for refused in (
        lambda: checked_pattern(pattern),
        lambda: select(torch.ones(4, 4), None, pattern=pattern),
    ):
        with pytest.raises(ValueError, match=f"the pattern is {n}:{m}; N:M keeps N of every M weights"):
            refused()


# --- all of them ------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{}, {"group": "row"}, {"pattern": (2, 4)}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_scale_of_the_scores_does_not_matter(how, dtype):
    scores = torch.randn(24, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    mask = select(scores, 0.5, **how)
    assert torch.equal(mask, select(scores * 2**10, 0.5, **how))
    assert torch.equal(mask, select(scores * 2**-10, 0.5, **how))


@pytest.mark.parametrize("how", [{}, {"group": "row"}, {"pattern": (2, 4)}])
def test_every_group_keeps_its_number(how):
    groups, kept = grouped(torch.zeros(6, 40), 0.5, **how)
    mask = select(tied_scores((6, 40), 0), 0.5, **how)
    assert (mask.reshape(groups.shape).sum(1) == kept).all()


def test_scores_that_need_a_gradient_are_no_hindrance():
    scores = torch.rand(4, 40, requires_grad=True, generator=torch.Generator().manual_seed(0))
    for how in ({}, {"group": "row"}, {"pattern": (2, 4)}):
        assert torch.equal(select(scores, 0.5, **how), select(scores.detach(), 0.5, **how))
