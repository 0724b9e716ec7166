"""Exercises about iterative pruning."""

import re

import pytest
import torch

import perpkit as pk


def start(dense, pruned, share):
    gone = (dense - pruned).norm() / dense.norm() / (pruned == 0).float().mean().sqrt()
    return float(gone.clamp(min(share, 1), 1))


def statistics(batches):
    whole = torch.cat(batches)
    return whole.mean((0, 2, 3)), whole.var((0, 2, 3))


def averaged(batches):
    means = torch.stack([batch.mean((0, 2, 3)) for batch in batches])
    return means.mean(0), torch.stack([batch.var((0, 2, 3)) for batch in batches]).mean(0)


def weighted(batches):
    """Right about the mean; the variance within batches alone."""
    counts = torch.tensor([float(len(batch)) for batch in batches])
    variances = torch.stack([batch.var((0, 2, 3)) for batch in batches])
    return statistics(batches)[0], (counts[:, None] * variances).sum(0) / counts.sum()


def test_right_answers_pass():
    assert pk.exercises.check_cycle_sparsity(lambda p, n, s: 1 - (1 - s) ** (p / n))
    assert pk.exercises.check_allr_start(start)
    assert pk.exercises.check_statistics(statistics)
    assert pk.exercises.check_statistics(lambda batches: statistics([batch.double() for batch in batches]))


@pytest.mark.parametrize(
    ("check", "answer", "said"),
    [
        ("cycle_sparsity", lambda p, n, s: s * p / n, "equal shares of what is left make 53.6%"),
        ("cycle_sparsity", lambda p, n, s: s ** (n / p), "equal shares of what is left"),
        ("cycle_sparsity", lambda p, n, s: 1 - (1 - s) ** ((p - 1) / n), "you say 0.0%"),
        ("cycle_sparsity", lambda p, n, s: 1 - (1 - s) ** (p / n) if p < n else 0.0, "must reach the target"),
        ("cycle_sparsity", lambda p, n, s: str(s), "is a str; want a number"),
        (
            "allr_start",
            lambda d, p, share: (d - p).norm() / d.norm(),
            "compared with the share of the weights",
        ),
        ("allr_start", lambda d, p, share: min(start(d, p, 0.0), 1), "share is the least"),
        (
            "allr_start",
            lambda d, p, share: max(share, float((d - p).norm() / d.norm() / (p == 0).float().mean() ** 0.5)),
            "1 is the most",
        ),
        ("statistics", averaged, "do not average averages"),
        ("statistics", weighted, "What batches differ by is a part of the variance|the variance has"),
        (
            "statistics",
            lambda batches: (statistics(batches)[0], torch.cat(batches).var((0, 2, 3), unbiased=False)),
            "divides by one less",
        ),
        ("statistics", lambda batches: torch.cat(batches).mean((0, 2, 3)), "two tensors"),
        ("statistics", lambda batches: (torch.zeros(2), torch.ones(2)), "the mean has 0"),
    ],
)
def test_wrong_answers_are_told_why(check, answer, said):
    verdict = getattr(pk.exercises, f"check_{check}")(answer)
    assert not verdict
    assert re.search(said, verdict.words), verdict.words
