"""Exercises about soups."""

import re

import pytest
import torch

import perpkit as pk


def mean(states, masks):
    return {name: torch.stack([state[name] for state in states]).mean(0) for name in states[0]}


def right_soup(states, masks):
    for name, mask in masks.items():
        if any(state[name][~mask].any() for state in states):
            raise ValueError(name)
    return mean(states, masks)


def checks_the_average(states, masks):
    soup = mean(states, masks)
    if any(soup[name][~mask].any() for name, mask in masks.items()):
        raise ValueError
    return soup


def mean_of_the_kept(states, masks):
    soup = right_soup(states, masks)
    alive = sum((state["weight"] != 0).float() for state in states).clamp(min=1)
    return {**soup, "weight": sum(state["weight"] for state in states) / alive}


def in_place(states, masks):
    right_soup(states, masks)
    for state in states[1:]:
        for name, tensor in state.items():
            states[0][name] += tensor
    return {name: tensor / len(states) for name, tensor in states[0].items()}


def raises_another(states, masks):
    if any(state[name][~mask].any() for state in states for name, mask in masks.items()):
        raise RuntimeError("differing masks")
    return mean(states, masks)


def greedy_from(order, models, score, least=0.0):
    chosen = []
    for place in order:
        trial = [*chosen, place]
        now, new = (
            torch.stack([models[i] for i in each]).mean(0) if each else None for each in (chosen, trial)
        )
        if now is None or score(new) - score(now) >= least:
            chosen = trial
    return [1 / len(chosen) if place in chosen else 0.0 for place in range(len(models))]


def right_greedy(models, score, **more):
    return greedy_from(sorted(range(len(models)), key=lambda i: -score(models[i])), models, score, **more)


def best_alone(models, score):
    best = max(range(len(models)), key=lambda i: score(models[i]))
    return [float(place == best) for place in range(len(models))]


def test_right_answers_pass():
    for verdict in (
        pk.exercises.check_soup(right_soup),
        pk.exercises.check_average_sparsity(lambda sparsity, models: sparsity**models),
        pk.exercises.check_greedy(right_greedy),
    ):
        assert verdict, verdict


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (mean, "the second has weights where the mask prunes.*raise a ValueError"),
        (checks_the_average, "both has weights"),
        (mean_of_the_kept, "has .* at .*; want"),
        (in_place, "changes its argument 1 in place"),
        (raises_another, "raises RuntimeError"),
        (lambda states, masks: {name: right_soup(states, masks)[name] for name in masks}, "has no 'bias'"),
        (lambda states, masks: states[0], "want"),
        (lambda states, masks: list(states), "is a list"),
        (lambda states, masks: None, "returns nothing yet"),
    ],
)
def test_a_wrong_soup_is_told_why(answer, said):
    verdict = pk.exercises.check_soup(answer)
    assert not verdict
    assert re.search(said, verdict.words)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda sparsity, models: sparsity, "one mask for all"),
        (lambda sparsity, models: (1 - sparsity) ** models, "all models keep"),
        (lambda sparsity, models: 1 - sparsity**models, "density"),
        (lambda sparsity, models: sparsity / models, "not spread over the models"),
        (lambda sparsity, models: sparsity**2, "want"),
        (lambda sparsity, models: 0.81, "want"),
        (lambda sparsity, models: "much", "is a str"),
    ],
)
def test_a_wrong_sparsity_is_told_why(answer, said):
    verdict = pk.exercises.check_average_sparsity(answer)
    assert not verdict
    assert re.search(said, verdict.words)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda models, score: [1 / len(models)] * len(models), "the uniform soup"),
        (best_alone, "the best model alone"),
        (
            lambda models, score: greedy_from(range(len(models)), models, score),
            "the next to be tried is the next best",
        ),
        (
            lambda models, score: right_greedy(models, score, least=1e-9),
            "comes in, too",
        ),
        (lambda models, score: [1.0, 0.0, 0.0], "begin with that one"),
        (lambda models, score: [float(w > 0) for w in right_greedy(models, score)], "add up to 2"),
        (lambda models, score: [0.0, 0.5, 0.5], "want"),
        (lambda models, score: 0.5, "want a list of 3 numbers"),
        (lambda models, score: models[9], "raises IndexError"),
    ],
)
def test_wrong_weights_are_told_why(answer, said):
    verdict = pk.exercises.check_greedy(answer)
    assert not verdict
    assert re.search(said, verdict.words)
