"""Exercises about distorted features."""

import re

import pytest

import perpkit as pk


def cka(x, y):
    x, y = x - x.mean(0), y - y.mean(0)
    return (y.T @ x).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm())


def bias(inputs, weight, pruned, bias):
    return bias + inputs.mean(0) @ (weight - pruned).T


def test_right_answers_pass():
    assert pk.exercises.check_relative_error(lambda a, b: ((a - b).norm() / a.norm()).item())
    assert pk.exercises.check_cka(cka)
    assert pk.exercises.check_bias(bias)


@pytest.mark.parametrize(
    ("check", "answer", "said"),
    [
        ("relative_error", lambda a, b: (a - b).norm(), "you say 4; want 0.8"),
        ("relative_error", lambda a, b: (a - b).norm() / b.norm(), "want 0.8"),
        ("relative_error", lambda a, b: ((a - b).norm() / a.norm()) ** 2, "you say 0.64; want 0.8"),
        ("relative_error", lambda a, b: 0.8, "want 0.1104"),
        ("relative_error", lambda a, b: a - b, "want one number"),
        (
            "cka",
            lambda x, y: (y.T @ x).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm()),
            "centre the columns",
        ),
        ("cka", lambda x, y: cka(x, y) ** 0.5, "enters as its square"),
        ("cka", lambda x, y: float("nan"), "is nan; want a finite number"),
        ("cka", lambda x, y: 1.0, "you say 1.0000; want"),
        ("cka", lambda x, y: (y.T @ x).norm() ** 2, "1; you say"),
        ("bias", lambda x, w, p, b: b, "add it"),
        ("bias", lambda x, w, p, b: bias(x, w, p, 0 * b), "The old bias is still needed"),
        ("bias", lambda x, w, p, b: b + (w - p).sum(1), "the mean input counts"),
        ("bias", lambda x, w, p, b: 2 * b - bias(x, w, p, b), "the wrong way round"),
        ("bias", lambda x, w, p, b: b + x @ (w - p).T, r"has shape \(2, 1\); want \(1,\)"),
    ],
)
def test_wrong_answers_are_told_why(check, answer, said):
    verdict = getattr(pk.exercises, f"check_{check}")(answer)
    assert not verdict
    assert re.search(said, verdict.words), verdict.words
