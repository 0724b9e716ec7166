"""Learning-rate schedules."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from perpkit.pruning.masks import Masks
from perpkit.retraining.schedules import (
    SCHEDULES,
    allr,
    allr_start,
    clr,
    constant,
    factors,
    llr,
    lrw,
    plateau,
    slr,
)


@pytest.mark.parametrize(
    ("steps", "warmup", "factors"),
    [
        (1, 0.1, [1]),
        (4, 0.0, [1, 3 / 4, 2 / 4, 1 / 4]),
        (4, 0.5, [1 / 2, 1, 1, 1 / 2]),
        (5, 0.2, [1, 1, 3 / 4, 2 / 4, 1 / 4]),
        (4, 1.0, [1 / 4, 2 / 4, 3 / 4, 1]),
        # three steps of warm-up, seven that fall
        (10, 0.3, [1 / 3, 2 / 3, 1, 1, 6 / 7, 5 / 7, 4 / 7, 3 / 7, 2 / 7, 1 / 7]),
    ],
)
def test_worked_by_hand(steps, warmup, factors):
    assert [llr(step, steps, warmup) for step in range(steps)] == pytest.approx(factors)


def test_the_warm_up_is_a_tenth_unless_told():
    factors = [llr(step, 100) for step in range(100)]
    assert factors[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert factors[10:] == pytest.approx([(100 - step) / 90 for step in range(10, 100)])


@given(st.integers(1, 400), st.floats(0, 1))
def test_it_rises_to_one_and_falls_almost_to_zero(steps, warmup):
    factors = [llr(step, steps, warmup) for step in range(steps)]
    rising = round(warmup * steps)
    assert all(0 < factor <= 1 for factor in factors)
    assert max(factors) == 1
    assert factors[:rising] == sorted(factors[:rising])
    assert factors[rising:] == sorted(factors[rising:], reverse=True)
    if rising < steps:
        # zero is reached after the last step, not in it: no step is wasted
        assert factors[-1] == pytest.approx(1 / (steps - rising))


@given(st.integers(3, 200), st.floats(0, 1))
def test_both_parts_are_straight_lines(steps, warmup):
    factors = [llr(step, steps, warmup) for step in range(steps)]
    rising = round(warmup * steps)
    for part in (factors[:rising], factors[rising:]):
        for i in range(len(part) - 2):
            assert part[i] - 2 * part[i + 1] + part[i + 2] == pytest.approx(0, abs=1e-12)


# --- the others -------------------------------------------------------------------------------------


def steps_at(progress):
    """A pre-training schedule of three rates."""
    return [1.0, 0.1, 0.01][min(int(progress * 3), 2)]


def test_cosine_by_hand():
    falling = [(1 + math.cos(math.pi * k / 5)) / 2 for k in range(5)]
    assert [clr(step, 6, warmup=1 / 6) for step in range(6)] == pytest.approx([1.0, *falling])


@given(st.integers(1, 100), st.floats(0, 1))
def test_all_with_a_warm_up_rise_alike(steps, warmup):
    rising = round(warmup * steps)
    wanted = [(step + 1) / rising for step in range(rising)]
    for schedule in (llr, clr, slr, constant):
        found = [schedule(step, steps, warmup) for step in range(steps)]
        assert found[:rising] == pytest.approx(wanted)
        assert all(0 <= factor <= 1 for factor in found)


def test_the_end_of_the_original_schedule_once_more():
    # pre-trained for 12 epochs in three parts; the last 6 again: 2 at a tenth, 4 at a hundredth
    found = [lrw(step, 6, share=0.5, original=steps_at) for step in range(6)]
    assert found == [0.1, 0.1, 0.01, 0.01, 0.01, 0.01]
    assert [lrw(step, 6, share=1.0, original=steps_at) for step in range(6)] == [1, 1, 0.1, 0.1, 0.01, 0.01]
    for share in (0.0, 1.5, math.nan):
        with pytest.raises(ValueError, match="share is"):
            lrw(0, 6, share=share)


def test_the_whole_original_schedule_squeezed():
    assert [slr(step, 6, 0.0, steps_at) for step in range(6)] == [1, 1, 0.1, 0.1, 0.01, 0.01]
    assert [slr(step, 8, 0.25, steps_at) for step in range(8)] == [0.5, 1, 1, 1, 0.1, 0.1, 0.01, 0.01]
    # linear pre-training makes it LLR
    assert [slr(s, 20) for s in range(20)] == pytest.approx([llr(s, 20) for s in range(20)])


def test_adaptive_is_linear_from_its_start():
    assert [allr(s, 10, 0.2, start=0.3) for s in range(10)] == pytest.approx(
        [0.3 * llr(s, 10, 0.2) for s in range(10)]
    )


# --- where ALLR starts ------------------------------------------------------------------------------


@pytest.fixture
def pruned():
    """Weights (3, 1, 2, 4) of which the lowest two are pruned, beside a bias, and the dense model."""
    dense, model = nn.Linear(4, 1), nn.Linear(4, 1)
    dense.weight.data = torch.tensor([[3.0, 1.0, 2.0, 4.0]])
    masks = Masks({"weight": torch.tensor([[True, False, False, True]])})
    model.load_state_dict(dense.state_dict())
    masks.apply(model)
    return model, masks, dense


def test_the_start_by_hand(pruned):
    model, masks, dense = pruned
    # sqrt(1 + 4) pruned away of sqrt(9 + 1 + 4 + 16), half of the weights
    wanted = math.sqrt(5 / 30 / 0.5)
    for before in (dense, dict(dense.named_parameters()), math.sqrt(30)):
        assert allr_start(model, masks, before, share=0.1) == pytest.approx(wanted, rel=1e-6)
    assert allr_start(model, masks, dense, share=0.9) == 0.9
    assert allr_start(model, masks, dense, share=7.0) == 1.0


def test_the_start_is_at_most_one(pruned):
    model, masks, dense = pruned
    dense.weight.data = torch.tensor([[0.1, 9.0, 9.0, 0.1]])
    assert allr_start(model, masks, dense, share=0.1) == 1.0


def test_what_else_has_moved_counts_too(pruned):
    model, masks, dense = pruned
    model.weight.data[0, 0] += 1  # as SparseGPT moves kept weights
    assert allr_start(model, masks, dense, share=0.1) == pytest.approx(math.sqrt(6 / 30 / 0.5), rel=1e-6)


@pytest.mark.parametrize(
    ("masks", "dense", "share", "words"),
    [
        ({}, 5.0, 0.1, "the masks prune nothing"),
        (None, 2.0, 0.1, "the norm 2.0 is below that of the pruned weights"),
        (None, math.nan, 0.1, "the norm nan is below"),
        (None, np.float32(2.0), 0.1, "the norm 2.0 is below"),
        (None, nn.Linear(3, 1), 0.1, "has no 'weight' of the same shape"),
        (None, 9.0, 0.0, "share is 0.0"),
        ({"other": torch.tensor([False])}, 9.0, 0.1, "the masks belong to another model"),
    ],
)
def test_bad_starts_are_refused(pruned, masks, dense, share, words):
    masks = pruned[1] if masks is None else Masks(masks)
    with pytest.raises(ValueError, match=words):
        allr_start(pruned[0], masks, dense, share=share)


# --- names and early stops --------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_name_is_its_function(name):
    warmup = 0.0 if name in ("constant", "ft") else 0.3
    assert factors(name, 9, 0.3) == [SCHEDULES[name](step, 9, warmup) for step in range(9)]
    assert factors(name, 0, 0.3) == []


def test_a_function_of_ones_own():
    assert factors(lambda step, steps: step / steps, 4, 0.5) == [0, 0.25, 0.5, 0.75]


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        ("cosin", "unknown schedule 'cosin'; did you mean 'cosine'"),
        ("CLR", "unknown schedule 'CLR'; did you mean 'clr'"),
        ("FT", "did you mean 'ft'"),
        ("LLR", "did you mean 'llr'"),
        ("lrw", "the schedule 'lrw' needs settings"),
        (lambda step, steps: math.nan, "factor at step 0 is nan; it must be finite"),
        (lambda step, steps: 1 - step, "factor at step 2 is -1"),
    ],
)
def test_bad_schedules_are_refused(schedule, words):
    with pytest.raises(ValueError, match=words):
        factors(schedule, 4, 0.1)


@pytest.mark.parametrize(
    ("losses", "stops"),
    [
        ([], False),
        ([3, 2, 1], False),  # too few for two windows
        ([4, 4, 3, 3], False),
        ([4, 4, 3.5, 3.5], True),  # lower by a half only
        ([9, 9, 9, 1, 1, 1], False),  # 5 against 1
        ([9, 9, 1, 1, 1, 1], True),
        ([4, 4, math.nan, 1], True),
    ],
)
def test_a_plateau_compares_two_windows(losses, stops):
    assert plateau(2, improvement=0.5)(losses) == stops


def test_a_plateau_of_no_steps_is_refused():
    with pytest.raises(ValueError, match="window is 0"):
        plateau(0)
