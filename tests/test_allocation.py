"""How a sparsity is spread over layers: hand-worked numbers, and totals that are exact to the weight."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from perpkit.pruning.allocation import (
    erk,
    from_scores,
    lamp,
    outlier_ratio,
    owl,
    uniform,
    uniform_plus,
)
from perpkit.pruning.selection import select

SPARSITIES = st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.floats(0, 1))
SIZES = st.dictionaries(st.sampled_from("abcdefgh"), st.integers(1, 500), min_size=1)
# Few values, so that ties are heavy.
SCORES = st.dictionaries(
    st.sampled_from("abcde"),
    st.lists(st.sampled_from([0.0, -0.0, 1.0, 2.0, math.inf, -math.inf]), min_size=1, max_size=12),
    min_size=1,
)


def counts(sizes, found):
    """How many weights each layer loses, checked to be whole numbers."""
    assert found.keys() == sizes.keys()
    exact = {name: found[name] * size for name, size in sizes.items()}
    assert all(abs(value - round(value)) < 1e-6 for value in exact.values())
    assert all(0 <= value <= 1 for value in found.values())
    return {name: round(value) for name, value in exact.items()}


# --- worked by hand -------------------------------------------------------------------------------


def test_uniform_plus_by_hand():
    sizes = {"conv": 100, "body": 800, "head": 100}
    # below 80 % nothing is at its limit but the first layer: 500 of the other 900
    found = uniform_plus(sizes, 0.5, first="conv", classifier="head")
    assert counts(sizes, found) == {"conv": 0, "body": 444, "head": 56}
    # the classifier stops at 80: the body takes the other 770
    found = uniform_plus(sizes, 0.85, first="conv", classifier="head")
    assert counts(sizes, found) == {"conv": 0, "body": 770, "head": 80}
    assert uniform_plus(sizes, 0.88, first="conv", classifier="head")["body"] == 1
    assert uniform_plus({"a": 10, "b": 30}, 0.5, first=None, classifier=None) == {"a": 0.5, "b": 0.5}


def test_uniform_plus_says_how_far_it_goes():
    sizes = {"conv": 100, "body": 800, "head": 100}
    with pytest.raises(ValueError, match=r"sparsity is 0\.9, but uniform\+ prunes at most 0\.8800 of this"):
        uniform_plus(sizes, 0.9, first="conv", classifier="head")


def test_erk_by_hand():
    shapes = {"conv": (4, 2, 3, 3), "linear": (10, 12)}
    # densities 12/72 = 1/6 and 22/120 = 11/60 times c; 72/6 + 22 = 34 c = 96 would need c = 48/17
    sizes = {"conv": 72, "linear": 120}
    assert counts(sizes, erk(shapes, 0.5)) == {"conv": 72 - 34, "linear": 120 - 62}
    # a layer that would be more than full is full, and the rest shares what is left
    shapes = {"tiny": (2, 2), "large": (20, 20)}
    assert erk(shapes, 0.5) == {"tiny": 0.0, "large": 202 / 400}


def test_lamp_by_hand():
    weights = {"a": torch.tensor([[3.0, -4.0]]), "b": torch.tensor([[1.0, -2.0, 2.0]])}
    # a: 9/25 and 16/16; b: 1/9, 4/8 and 4/4; of the last two, which are equal, that in front goes first
    for pruned, wanted in enumerate([(0, 0), (0, 1), (1, 1), (1, 2), (2, 2), (2, 3)]):
        assert counts({"a": 2, "b": 3}, lamp(weights, pruned / 5)) == dict(zip("ab", wanted, strict=True))


def test_lamp_of_zeros_prunes_them_first():
    weights = {"a": torch.zeros(2, 3), "b": torch.tensor([[0.0, 5.0], [1e-9, 5.0]])}
    assert counts({"a": 6, "b": 4}, lamp(weights, 0.7)) == {"a": 6, "b": 1}
    assert counts({"a": 6, "b": 4}, lamp(weights, 0.8)) == {"a": 6, "b": 2}


def test_outliers_by_hand():
    row = torch.tensor([[0.0, 1.0, 1.0, 18.0]])  # mean 5
    assert outlier_ratio([row], 3.0) == 0.25
    assert outlier_ratio([row], 4.0) == 0
    # each matrix has a mean of its own
    assert outlier_ratio([row, 1000 * row], 3.0) == 0.25
    assert outlier_ratio([row, torch.ones(1, 12)], 3.0) == 1 / 16


def test_owl_by_hand():
    sizes = {"a": 1000, "b": 1000, "c": 2000}
    ratios = {"a": 0.04, "b": 0.02, "c": 0.01}
    # mean 0.02 over the weights, width 0.03; with 2 · 0.06 = 0.12: -0.08, 0, +0.04
    found = owl(sizes, ratios, 0.6, spread=0.06)
    assert found == {"a": 0.52, "b": 0.6, "c": 0.64}
    assert owl(sizes, dict.fromkeys(sizes, 0.3), 0.6) == dict.fromkeys(sizes, 0.6)
    assert owl(sizes, ratios, 0) == dict.fromkeys(sizes, 0)
    assert owl(sizes, ratios, 1) == dict.fromkeys(sizes, 1)
    # what would leave [0, 1] stays inside and the others make up for it
    assert counts(sizes, owl(sizes, ratios, 0.99, spread=0.08)) == {"a": 960, "b": 1000, "c": 2000}


# --- whatever the layers ----------------------------------------------------------------------------


@given(SIZES, SPARSITIES, st.data())
def test_uniform_plus_is_exact_and_keeps_its_two(sizes, sparsity, data):
    names = list(sizes)
    first, classifier = data.draw(st.sampled_from([None, *names])), data.draw(st.sampled_from([None, *names]))
    if first == classifier:
        first = None
    total = sum(sizes.values())
    most = {n: 0 if n == first else math.floor(0.8 * s) if n == classifier else s for n, s in sizes.items()}
    if round(sparsity * total) > sum(most.values()):
        with pytest.raises(ValueError, match="uniform"):
            uniform_plus(sizes, sparsity, first=first, classifier=classifier)
        return
    found = counts(sizes, uniform_plus(sizes, sparsity, first=first, classifier=classifier))
    assert sum(found.values()) == round(sparsity * total)
    assert all(found[name] <= most[name] for name in names)


@given(
    st.dictionaries(
        st.sampled_from("abcdef"), st.lists(st.integers(1, 9), min_size=2, max_size=4), min_size=1
    ),
    SPARSITIES,
)
def test_erk_is_exact_and_in_proportion(shapes, sparsity):
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    found = counts(sizes, erk(shapes, sparsity))
    assert sum(found.values()) == round(sparsity * sum(sizes.values()))
    # where neither is full, the kept weights are in proportion to the sums of the dimensions
    kept = {name: (sizes[name] - found[name], sum(shapes[name])) for name in sizes if found[name] > 1}
    scales = [((number - 1.5) / share, (number + 1.5) / share) for number, share in kept.values()]
    assert not scales or max(low for low, _ in scales) <= min(high for _, high in scales)


@given(SCORES, SPARSITIES)
def test_one_threshold_is_one_sort_over_everything(scores, sparsity):
    tensors = {name: torch.tensor(values, dtype=torch.float64) for name, values in scores.items()}
    everything = [(value, at, name) for name, values in scores.items() for at, value in enumerate(values)]
    order = sorted(range(len(everything)), key=lambda i: (everything[i][0], i))
    pruned = {everything[i][2:0:-1] for i in order[: round(sparsity * len(everything))]}
    for name, fraction in from_scores(tensors, sparsity).items():
        mask = select(tensors[name], fraction)
        assert mask.tolist() == [(name, at) not in pruned for at in range(len(mask))]


@given(SCORES, SPARSITIES)
def test_lamp_is_its_formula(scores, sparsity):
    weights = {
        name: torch.tensor([2.0 if math.isinf(v) else v + 0.1 * (i % 3) for i, v in enumerate(values)])[None]
        for name, values in scores.items()
    }
    slow = {}
    for name, weight in weights.items():
        order = sorted(weight.double().flatten().tolist(), key=abs)
        tails = [sum(w * w for w in order[i:]) for i in range(len(order))]
        slow[name] = [w * w / tail if tail else 0.0 for w, tail in zip(order, tails, strict=True)]
    everything = sorted(value for values in slow.values() for value in values)
    number = round(sparsity * len(everything))
    found = counts({n: w.numel() for n, w in weights.items()}, lamp(weights, sparsity))
    assert sum(found.values()) == number
    # exactly the lowest of all are pruned, up to rounding between equals
    lost = sorted(value for name, values in slow.items() for value in values[: found[name]])
    assert lost == pytest.approx(everything[:number], rel=1e-9, abs=1e-12)


@given(SIZES, SPARSITIES, st.data())
def test_owl_is_exact_and_follows_the_outliers(sizes, sparsity, data):
    ratios = {name: data.draw(st.floats(0, 0.2)) for name in sizes}
    found = counts(sizes, owl(sizes, ratios, sparsity))
    assert sum(found.values()) == round(sparsity * sum(sizes.values()))
    for one in sizes:
        for other in sizes:
            if ratios[one] > ratios[other]:
                slack = 1 / sizes[one] + 1 / sizes[other]
                assert found[one] / sizes[one] <= found[other] / sizes[other] + slack


def test_uniform_is_the_same_for_all():
    assert uniform({"a": 3, "b": 7}, 0.37) == {"a": 0.37, "b": 0.37}
