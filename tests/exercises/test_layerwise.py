"""Exercises about reconstruction."""

import re

import pytest
import torch

import perpkit as pk


def right_error(dense, new, gram):
    lost = dense - new
    return float(((lost @ gram) * lost).sum())


def right_row(row, keep, gram):
    best = torch.zeros_like(row)
    best[keep] = torch.linalg.solve(gram[keep][:, keep], gram[keep] @ row)
    return best


def right_multiple(dense, new, mask, gram):
    best = torch.stack([right_row(row, keep, gram) for row, keep in zip(dense, mask, strict=True)])
    return right_error(dense, new, gram) / right_error(dense, best, gram)


def kept_right_hand_side(row, keep, gram):
    best = torch.zeros_like(row)
    best[keep] = torch.linalg.solve(gram[keep][:, keep], gram[keep][:, keep] @ row[keep])
    return best


def diagonal_only(row, keep, gram):
    return keep * (gram @ row) / gram.diagonal()


def mean_of_ratios(dense, new, mask, gram):
    rows = zip(dense, new, mask, strict=True)
    return sum(right_multiple(*(each[None] for each in row), gram) for row in rows) / len(dense)


@pytest.mark.parametrize(
    ("check", "answer"),
    [
        (pk.exercises.check_gram_error, right_error),
        (pk.exercises.check_gram_error, lambda w, v, g: torch.trace((w - v) @ g @ (w - v).T)),
        (pk.exercises.check_row_optimum, right_row),
        (pk.exercises.check_multiple, right_multiple),
    ],
)
def test_a_right_answer_passes(check, answer):
    verdict = check(answer)
    assert verdict, verdict


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda w, v, g: (w - v).square().sum(), "error of the weights"),
        (lambda w, v, g: ((w - v) @ g @ (w - v).T).sum(), "its diagonal"),
        (lambda w, v, g: ((w - v) @ g).square().sum(), "quadratic in the inputs already"),
        (lambda w, v, g: right_error(w, v, g) ** 0.5, "the norm"),
        (lambda w, v, g: right_error(w, v, g) / len(w), "the mean over the outputs"),
        (lambda w, v, g: right_error(w, v, g) / right_error(w, 0 * w, g), "relative to the energy"),
        (lambda w, v, g: (w - v).T @ g @ (w - v), "raises RuntimeError"),
        (lambda w, v, g: ((w - v) @ g) * (w - v), r"has shape \(2, 3\); want one number"),
        (lambda w, v, g: "17", "is a str"),
        (lambda w, v, g: float("nan"), "is nan"),
        (lambda w, v, g: 17.0, "want"),
        (lambda w, v, g: None, "returns nothing yet"),
    ],
)
def test_a_wrong_error_is_told_why(answer, said):
    verdict = pk.exercises.check_gram_error(answer)
    assert not verdict
    assert re.search(said, verdict.words)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda row, keep, gram: row * keep, "as they were before"),
        (kept_right_hand_side, "as they were before"),
        (diagonal_only, r"your error is .*; the least is"),
        (lambda row, keep, gram: right_row(row, keep, gram)[keep], "want them in a row of 3"),
        (lambda row, keep, gram: torch.linalg.solve(gram, gram @ row), "it is the dense row again"),
        (lambda row, keep, gram: row + 1, "solve for the kept columns only"),
        (lambda row, keep, gram: torch.zeros_like(row), r"your error is .*; the least is"),
        (lambda row, keep, gram: right_row(row, keep, gram)[None], r"has shape \(1, 3\); want \(3,\)"),
        (lambda row, keep, gram: row.tolist(), "is a list"),
        (lambda row, keep, gram: row.mul_(keep), "changes its argument 1 in place"),
    ],
)
def test_a_wrong_row_is_told_why(answer, said):
    verdict = pk.exercises.check_row_optimum(answer)
    assert not verdict
    assert re.search(said, verdict.words)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda w, v, m, g: right_multiple(w, v, m, g) ** 0.5, "ratio of the norms"),
        (lambda w, v, m, g: 1 / right_multiple(w, v, m, g), "upside down"),
        (lambda w, v, m, g: right_multiple(w, v, m, g) - 1, "left out the optimum itself"),
        (mean_of_ratios, "mean of the rows' ratios"),
        (lambda w, v, m, g: 1.0, "want"),
        (lambda w, v, m, g: right_error(w, v, g) / right_error(w, w * m, g), "want"),
        (lambda w, v, m, g: right_error(w, v, g) / right_error(w, 0 * w, g), "want"),
    ],
)
def test_a_wrong_multiple_is_told_why(answer, said):
    verdict = pk.exercises.check_multiple(answer)
    assert not verdict
    assert re.search(said, verdict.words)
