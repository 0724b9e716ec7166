"""Exercises about reading the papers' tables."""

import math
import re

import pytest

import perpkit as pk


def recovered(pruned, retrained, dense):
    return math.log(pruned / retrained) / math.log(pruned / dense)


def aggregated(sizes, always, stages, late=0):
    total, shares = sum(sizes) + always, []
    for stage in range(stages):
        frozen = (stage + 1 - late) * len(sizes) // stages
        shares.append((sum(sizes[frozen:]) + always) / total)
    return sum(shares) / stages


def test_right_answers_pass():
    assert pk.exercises.check_recovered(recovered)
    assert pk.exercises.check_aggregated(aggregated)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda p, r, d: (p - r) / (p - d), "compare their logarithms"),
        (lambda p, r, d: 1 - recovered(p, r, d), "the gap that is left"),
        (lambda p, r, d: 100 * recovered(p, r, d), "not per cent"),
        (lambda p, r, d: r / d, "not what it won"),
        (lambda p, r, d: -recovered(p, r, d), "counts as positive"),
        (lambda p, r, d: 0.9108, "want 1$"),
        (lambda p, r, d: max(0.0, recovered(p, r, d)), "want -1$"),
        (lambda p, r, d: "much", "is a str; want a number"),
        (lambda p, r, d: None, "returns nothing yet"),
    ],
)
def test_a_wrong_share_of_the_gap_is_told_why(answer, said):
    verdict = pk.exercises.check_recovered(answer)
    assert not verdict
    assert re.search(said, verdict.words), verdict.words


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda s, a, n: aggregated(s, a, n, late=1), "first stage already has"),
        (lambda s, a, n: aggregated(s[::-1], a, n), "at the input freeze first"),
        (lambda s, a, n: n * aggregated(s, a, n), "not the sum"),
        (lambda s, a, n: aggregated(s, 0, n), "want"),
        (
            lambda s, a, n: aggregated(s, a, n) - a / (sum(s) + a),
            "leave out the parameters that always train",
        ),
        (lambda s, a, n: aggregated([1] * len(s), 0, n), "count their parameters"),
        (lambda s, a, n: 0.3, "give 0.3; want"),
        (lambda s, a, n: s.pop(), "changes its argument|want"),
    ],
)
def test_a_wrong_aggregated_share_is_told_why(answer, said):
    verdict = pk.exercises.check_aggregated(answer)
    assert not verdict
    assert re.search(said, verdict.words), verdict.words
