"""How one matrix's weights are chosen: groups by default, noise, and the error that is told."""

import pytest
import torch
from torch import nn

from perpkit.pruning.inputs import Inputs
from perpkit.pruning.layers import prunable_matrices
from perpkit.pruning.method import CALIBRATED, CRITERIA, NEEDS_GRAM, Method, output_error


def method(criterion, matrices, **options):
    settings = {"group": None, "allocation": None, "pattern": None, "seed": 0, "parameters": {}, **options}
    return Method.checked(criterion, names=list(matrices), **settings)


@pytest.fixture
def matrices():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return prunable_matrices(nn.Sequential(nn.Linear(6, 4), nn.Linear(6, 4)))


def test_the_groups_are_those_of_the_papers(matrices):
    groups = {criterion: method(criterion, matrices).group for criterion in CRITERIA}
    assert groups == {
        "magnitude": "layer",
        "random": "layer",
        "wanda": "row",
        "ria": "row",
        "sparsegpt": "layer",
        "sparsefw": "row",
    }
    assert set(NEEDS_GRAM) < set(CALIBRATED) < set(CRITERIA)


def test_a_global_group_is_an_allocation(matrices):
    for options in (
        {"group": "global"},
        {"allocation": "global"},
        {"group": "layer", "allocation": "global"},
    ):
        found = method("wanda", matrices, **options)
        assert (found.group, found.allocation) == ("layer", "global")
    assert method("wanda", matrices).allocation == "uniform"


def test_noise_is_each_matrices_own(matrices):
    one, other = matrices.values()
    chosen = method("random", matrices, seed=5)
    scores = chosen.scores(one, None, None)
    assert torch.equal(scores, chosen.scores(one, None, None))
    assert not torch.equal(scores, chosen.scores(other, None, None))
    assert not torch.equal(scores, method("random", matrices, seed=6).scores(one, None, None))


@pytest.mark.parametrize("criterion", ["magnitude", "random", "wanda", "ria"])
def test_what_was_pruned_before_scores_lowest(matrices, criterion):
    matrix = next(iter(matrices.values()))
    kept = torch.arange(24).view(4, 6) % 3 > 0
    inputs = Inputs(2, torch.rand(1, 6, generator=torch.Generator().manual_seed(0)) + 1)
    chosen = method(criterion, matrices)
    scores, before = chosen.scores(matrix, inputs, kept), chosen.scores(matrix, inputs, None)
    assert (scores[~kept] == -torch.inf).all()
    assert torch.equal(scores[kept], before[kept])


@pytest.mark.parametrize("criterion", CRITERIA)
def test_the_model_is_not_changed(matrices, criterion):
    matrix = next(iter(matrices.values()))
    before = matrix.weight().detach().clone()
    inputs = Inputs()
    inputs.add(torch.randn(1, 30, 6, generator=torch.Generator().manual_seed(0)), True)
    gram = inputs.gram.clone()
    with torch.no_grad():
        new, mask = method(criterion, matrices).pruned(matrix, inputs, None, 0.5)
    assert torch.equal(matrix.weight(), before)
    assert torch.equal(inputs.gram, gram)
    assert (new != 0).equal(mask)
    assert int(mask.sum()) == 12


# --- the error ----------------------------------------------------------------------------------------


def sums(rows, gram):
    inputs = Inputs()
    inputs.add(rows, gram)
    return inputs


@pytest.mark.parametrize("groups", [1, 3])
def test_the_error_with_a_gram_matrix_is_that_of_the_outputs(groups):
    draw = torch.Generator().manual_seed(0)
    rows = torch.randn(groups, 50, 5, generator=draw, dtype=torch.float64)
    before = torch.randn(2 * groups, 5, generator=draw, dtype=torch.float64)
    after = before * (torch.rand(before.shape, generator=draw) < 0.5)
    outputs = [
        torch.cat([x @ w.T for x, w in zip(rows, weight.chunk(groups), strict=True)], 1)
        for weight in (before, after)
    ]
    wanted = (outputs[0] - outputs[1]).square().sum() / outputs[0].square().sum()
    assert output_error(before, after, sums(rows, True)) == pytest.approx(float(wanted))
    # with norms only, as if the inputs were uncorrelated
    norms = rows.square().sum(1).repeat_interleave(2, 0)
    wanted = ((before - after).square() * norms).sum() / (before.square() * norms).sum()
    assert output_error(before, after, sums(rows, False)) == pytest.approx(float(wanted))


def test_the_error_without_inputs_is_that_of_the_weights():
    before, after = torch.tensor([[3.0, 4.0], [0.0, 12.0]]), torch.tensor([[0.0, 4.0], [0.0, 0.0]])
    assert output_error(before, after, None) == (9 + 144) / 169
    assert output_error(before, after, Inputs()) == (9 + 144) / 169
    assert output_error(torch.zeros(2, 2), torch.zeros(2, 2), None) == 0
    half = before.to(torch.bfloat16)
    assert output_error(half, torch.zeros_like(half), sums(torch.ones(1, 3, 2), True)) == 1
