"""Exercises about criteria that look at activations."""

import re

import pytest
import torch

import perpkit as pk


def scores(weight, inputs):
    return weight.abs() * inputs.pow(2).sum(0).sqrt()


def hessian(inputs, damping):
    moments = 2 / len(inputs) * inputs.T @ inputs
    return moments + damping * moments.diag().mean() * torch.eye(len(moments))


def update(row, inverse, index):
    return row - row[index] / inverse[index, index] * inverse[:, index]


def masked(row, inverse, index):
    return torch.where(torch.arange(len(row)) == index, 0.0, row)


def test_right_answers_pass():
    assert pk.exercises.check_wanda(scores)
    assert pk.exercises.check_hessian(hessian)
    assert pk.exercises.check_obs(update)
    assert pk.exercises.check_hessian(lambda inputs, damping: hessian(inputs.double(), damping))
    assert pk.exercises.check_obs(lambda row, inverse, q: update(row.double(), inverse.double(), q))


def test_the_reference_update_is_the_optimum():
    """Against least squares on the inputs, in float64."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(30, 4, generator=generator, dtype=torch.float64)
    row = torch.randn(4, generator=generator, dtype=torch.float64)
    new = update(row, torch.linalg.inv(inputs.T @ inputs), 2)
    kept = [0, 1, 3]
    best = torch.linalg.lstsq(inputs[:, kept], inputs @ row).solution
    torch.testing.assert_close(new[kept], best)
    assert new[2].abs() < 1e-12


@pytest.mark.parametrize(
    ("check", "answer", "said"),
    [
        ("wanda", lambda w, x: w.abs(), "The inputs do not enter"),
        ("wanda", lambda w, x: w * x.norm(dim=0), "its size is what counts"),
        ("wanda", lambda w, x: w.abs() * x.abs().sum(0), "the root of the sum of squares"),
        ("wanda", lambda w, x: w.abs() * x.norm(), "the score has"),
        ("wanda", lambda w, x: (w.abs() * x.norm(dim=0)).T, "the score has|shape"),
        ("wanda", lambda w, x: w.abs() * x.norm(dim=1)[:2], "the score has|shape|raises"),
        ("hessian", lambda x, d: 2 / len(x) * x.T @ x, "The damping is missing"),
        ("hessian", lambda x, d: 2 / len(x) * x.T @ x + d * torch.eye(x.shape[1]), "relative to the mean"),
        ("hessian", lambda x, d: hessian(x, 0) + d * hessian(x, 0).diag().mean(), "the diagonal alone"),
        ("hessian", lambda x, d: hessian(x, d) * len(x) / 2, "The factor 2/N is missing"),
        ("hessian", lambda x, d: x @ x.T, "the Hessian has"),
        ("obs", masked, "they have to move"),
        ("obs", lambda r, h, q: r - r[q] * h[:, q], "Divide by the diagonal entry"),
        ("obs", lambda r, h, q: 2 * r - update(r, h, q), "the wrong way round"),
        ("obs", lambda r, h, q: torch.zeros_like(r), "the row has 0"),
    ],
)
def test_wrong_answers_are_told_why(check, answer, said):
    verdict = getattr(pk.exercises, f"check_{check}")(answer)
    assert not verdict
    assert re.search(said, verdict.words), verdict.words
