"""Learning-rate schedules."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perpkit.retraining.schedules import llr


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
