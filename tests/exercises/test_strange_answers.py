"""What checks make of right answers of another kind, and of wrong ones that nearly pass."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import perpkit as pk
from perpkit.interactive.exercises.verdict import Wrong, call, check, number


def share(model):
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters if p.requires_grad) / sum(p.numel() for p in parameters)


def cka(x, y, *, centred):
    x, y = (each - each.mean(0) if name in centred else each for name, each in (("x", x), ("y", y)))
    return (y.T @ x).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm())


def mask(weight, sparsity, rounding):
    kept = torch.ones(weight.numel(), dtype=torch.bool)
    kept[weight.abs().flatten().argsort(stable=True)[: rounding(sparsity * weight.numel())]] = False
    return kept.view_as(weight)


def soup_that_counts(states, masks):
    for state in states:
        for name, mask in masks.items():
            if state[name].count_nonzero() > mask.sum():
                raise ValueError(name)
    # Cancelled weights are seen, misplaced ones are not.
    return {name: sum(state[name] for state in states) / len(states) for name in states[0]}


def greedy(models, score, *, stop, ordered):
    order = sorted(range(len(models)), key=lambda place: -score(models[place]))
    if not ordered:
        order = [order[0], *(place for place in range(len(models)) if place != order[0])]
    chosen = [order[0]]
    for place in order[1:]:
        trial = [*chosen, place]
        old, new = (score(sum(models[each] for each in some) / len(some)) for some in (chosen, trial))
        if new >= old:
            chosen = trial
        elif stop:
            break
    return np.array([1 / len(chosen) if place in chosen else 0 for place in range(len(models))], np.float32)


def bias(inputs, weight, pruned, bias):
    return bias.double() + (inputs.double() @ (weight - pruned).double().T).mean(0)


# --- right ones of another kind -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("check_share", lambda model: np.float32(share(model))),
        ("check_share", lambda model: torch.tensor(share(model), dtype=torch.float64)),
        ("check_cka", lambda x, y: np.float64(cka(x, y, centred="xy"))),
        ("check_mask", lambda weight, sparsity: mask(weight, sparsity, round)),
        ("check_bias", bias),
        ("check_greedy", lambda models, score: greedy(models, score, stop=False, ordered=True)),
        ("check_average_sparsity", lambda sparsity, models: np.array([sparsity**models])),
        (
            "check_cycle_sparsity",
            lambda cycle, cycles, sparsity: 1 - torch.tensor(1 - sparsity) ** (cycle / cycles),
        ),
    ],
)
def test_right(name, answer):
    verdict = getattr(pk.exercises, name)(answer)
    assert verdict, verdict


@pytest.mark.parametrize("surrounding", [torch.no_grad, lambda: torch.device("meta")])
def test_what_the_notebook_has_set_before_changes_nothing(surrounding):
    def gradient(x, grad, mask):
        weight = torch.zeros(mask.shape, requires_grad=True)
        (x @ (mask * weight).T * grad).sum().backward()
        return weight.grad

    with surrounding():
        verdicts = [pk.exercises.check_masked_gradient(gradient), pk.exercises.check_bias(bias)]
    assert all(verdicts), verdicts


# --- wrong ones that nearly pass ------------------------------------------------------------------


def unfrozen(model):
    return share(model.requires_grad_(True))


@pytest.mark.parametrize(
    ("name", "answer", "said"),
    [
        ("check_share", unfrozen, "changes its argument 1"),
        ("check_share", lambda model: str(share(model)), "your share is a str; want a number"),
        ("check_share", lambda model: torch.zeros(2), "your share has shape (2,); want one number"),
        ("check_cka", lambda x, y: cka(x, y, centred="y"), "centre the columns of both"),
        ("check_mask", lambda weight, sparsity: mask(weight, sparsity, int), "keep 41 weights; want 40"),
        ("check_soup", soup_that_counts, "raise a ValueError"),
        (
            "check_greedy",
            lambda models, score: greedy(models, score, stop=True, ordered=True),
            "whoever is left out, the next one is tried",
        ),
        (
            "check_greedy",
            lambda models, score: greedy(models, score, stop=False, ordered=False),
            "want 0.5, 0",
        ),
        ("check_greedy", lambda models, score: [None] * len(models), "a weight is a NoneType"),
        ("check_greedy", lambda models, score: models.reverse() or [1.0], "changes its argument 1"),
        ("check_erk", lambda shapes, sparsity: dict.fromkeys(shapes, "0.5"), "is a str; want a number"),
        ("check_erk", lambda shapes, sparsity: dict.fromkeys(shapes, None), "is a NoneType; want a number"),
        ("check_recovered", lambda pruned, retrained, dense: "0.9108", "the answer is a str; want a number"),
        ("check_aggregated", lambda sizes, always, stages: sizes.clear() or 0.3, "changes its argument 1"),
        ("check_scale_start", lambda rows, columns, rank: ("A", "B"), "A is a str"),
    ],
)
def test_wrong(name, answer, said):
    verdict = getattr(pk.exercises, name)(answer)
    assert not verdict
    assert said in repr(verdict)


# --- their parts ----------------------------------------------------------------------------------


def test_what_cannot_be_compared_is_said_and_not_raised():
    class Odd:
        def __lt__(self, other):
            raise RuntimeError("no order")

    @check("it is less")
    def check_less(answer):
        assert call(answer) < 1

    assert repr(check_less(Odd)) == (
        "✗ not yet: what your function returns cannot be compared: RuntimeError: no order"
    )


@pytest.mark.parametrize("given", [0.5, np.float32(0.5), np.array([[0.5]]), torch.tensor([0.5])])
def test_numbers(given):
    assert number("it", given) == 0.5


@pytest.mark.parametrize("given", [True, np.True_, "0.5", 1j, math.nan, np.zeros(2), torch.zeros(0)])
def test_no_numbers(given):
    with pytest.raises(Wrong, match=r"^it (is|has)"):
        number("it", given)


@pytest.mark.parametrize(
    ("given", "change"),
    [
        ([1, 2], lambda each: each.append(3)),
        ({"a": [torch.zeros(2)]}, lambda each: each["a"][0].add_(1)),
        ((torch.zeros(2),), lambda each: each[0].resize_(3)),
        (nn.Linear(2, 2), lambda each: each.bias.data.add_(1)),
        (nn.Linear(2, 2), lambda each: each.bias.requires_grad_(False)),
    ],
)
def test_changed_arguments_are_noticed(given, change):
    @check("")
    def unchanged(answer):
        call(answer, given)

    verdict = unchanged(lambda each: [change(each), 1])
    assert "changes its argument 1 in place" in repr(verdict)
    assert unchanged(lambda each: 1)
