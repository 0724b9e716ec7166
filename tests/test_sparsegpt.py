"""SparseGPT against the textbook: explicit inverses, one row and one column at a time."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from perpkit.pruning.criteria import wanda
from perpkit.pruning.selection import select
from perpkit.pruning.sparsegpt import sparsegpt

HOW = [
    {"sparsity": 0.5},
    {"sparsity": 0.37, "group": "row"},
    {"sparsity": None, "pattern": (2, 4)},
    {"sparsity": None, "pattern": (1, 3)},
]


def problem(rows=6, width=24, seed=0, dtype=torch.float64):
    """A weight [rows, width] and XᵀX of inputs that depend on each other."""
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, width, dtype=torch.float64, generator=draw)
    mixed = torch.randn(width, width, dtype=torch.float64, generator=draw)
    inputs = torch.randn(4 * width, width, dtype=torch.float64, generator=draw) @ mixed
    return weight.to(dtype), (inputs.T @ inputs).to(dtype)


def output_error(weight, new, gram):
    difference = (weight - new).double()
    return ((difference @ gram.double()) * difference).sum().item()


def slowly(weight, gram, sparsity, pattern=None, group="layer", damping=0.01, block=128, kept=None):
    """Optimal brain surgeon from left to right, with the inverse for what is left at each column."""
    rows, width = weight.shape
    hessian = gram + damping * gram.diagonal().mean() * torch.eye(width, dtype=gram.dtype)
    inverses = [torch.linalg.inv(hessian[j:, j:]) for j in range(width)]
    saved = torch.stack([inverse[0, 0] for inverse in inverses])
    new, mask = weight.clone(), torch.ones_like(weight, dtype=torch.bool)
    unit = pattern[1] if pattern else block
    each = rows if group == "layer" else 1
    for j in range(width):
        if j % unit == 0:
            stop = min(j + unit, width)
            scores = new[:, j:stop] ** 2 / saved[j:stop]
            if kept is not None:
                scores = scores.masked_fill(~kept[:, j:stop], -torch.inf)
            if pattern:
                mask[:, j:stop] = select(scores, None, pattern=pattern)
            else:
                lost = round(sparsity * stop * each) - round(sparsity * j * each)
                share = lost / ((stop - j) * each)
                mask[:, j:stop] = select(scores, share, group=group)
        for row in range(rows):
            if not mask[row, j]:
                new[row, j:] -= new[row, j] / saved[j] * inverses[j][0]
    return new * mask, mask


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("block", [1, 6, 12, 24, 128])
@pytest.mark.parametrize("width", [24, 12])
def test_equals_the_textbook(how, block, width):
    weight, gram = problem(width=width)
    new, mask = sparsegpt(weight, gram, block=block, **how)
    expected, chosen = slowly(weight, gram, block=block, **how)
    assert torch.equal(mask, chosen)
    torch.testing.assert_close(new, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("how", HOW)
def test_equals_the_textbook_on_a_wide_layer_with_an_odd_last_block(how):
    weight, gram = problem(rows=3, width=300)
    new, mask = sparsegpt(weight, gram, damping=0.1, **how)
    expected, chosen = slowly(weight, gram, damping=0.1, **how)
    assert torch.equal(mask, chosen)
    torch.testing.assert_close(new, expected, rtol=1e-8, atol=1e-8)


def test_by_hand():
    # Inputs 0 and 1 belong together and so do 2 and 3: each pair has the inverse [[2, -1], [-1, 2]] / 3.
    gram = torch.tensor([[2.0, 1, 0, 0], [1, 2, 0, 0], [0, 0, 2, 1], [0, 0, 1, 2]])
    weight = torch.tensor([[1.0, 4.0, 2.0, 3.0]])
    # 1² / (2/3) < 4² / (1/2), so the first goes and the second gains 1/2 of it; likewise the third.
    new, mask = sparsegpt(weight, gram, sparsity=None, pattern=(1, 2), damping=0)
    assert mask.tolist() == [[False, True, False, True]]
    torch.testing.assert_close(new, torch.tensor([[0.0, 4.5, 0.0, 4.0]]))
    # The last column of a pair has nobody to take over.
    new, mask = sparsegpt(torch.tensor([[4.0, 1.0, 3.0, 2.0]]), gram, sparsity=0.5, damping=0)
    assert mask.tolist() == [[True, False, True, False]]
    torch.testing.assert_close(new, torch.tensor([[4.0, 0.0, 3.0, 0.0]]))


def test_pairs_of_n_and_m_are_chosen_by_the_weights_as_they_run():
    # As they were, 1.0 < 1.1; the first column's error lifts the third above the fourth.
    gram = torch.eye(4)
    gram[0, 2] = gram[2, 0] = 0.9
    weight = torch.tensor([[0.5, 9.0, 1.0, 1.1]])
    _, mask = sparsegpt(weight, gram, sparsity=None, pattern=(1, 2), damping=0)
    assert mask.tolist() == [[False, True, True, False]]


# --- exactly as many, exactly zero ------------------------------------------------------------------


@given(
    st.integers(1, 5),
    st.integers(1, 30),
    st.integers(1, 40),
    st.floats(0, 1),
    st.sampled_from(["layer", "row"]),
    st.integers(0, 99),
    st.sampled_from([None, 0.2, 0.5, 0.9]),
)
def test_counts_are_exact_and_nothing_comes_back(rows, width, block, sparsity, group, seed, gone):
    weight, gram = problem(rows, width, seed, torch.float32)
    draw = torch.Generator().manual_seed(seed)
    kept = None if gone is None else torch.rand(rows, width, generator=draw) > gone
    if kept is not None:
        # All earlier zeros at the right: the blocks before must not take their share.
        kept = kept.sort(dim=1, descending=True).values if seed % 2 else kept
    new, mask = sparsegpt(weight, gram, sparsity=sparsity, group=group, block=block, kept=kept)
    assert torch.count_nonzero(new[~mask]) == 0
    dims = (0, 1) if group == "layer" else (1,)
    n = rows * width if group == "layer" else width
    before = torch.zeros_like(mask) if kept is None else ~kept
    assert not (mask & before).any()
    wanted = before.sum(dims).clamp(min=round(sparsity * n))
    assert torch.equal((~mask).sum(dims), wanted)


@given(st.integers(1, 20), st.integers(0, 20), st.integers(0, 99), st.sampled_from([0.0, 0.3, 0.8]))
def test_patterns_are_kept_whatever_was_pruned_before(m, n, seed, gone):
    n = min(n, m)
    weight, gram = problem(3, 2 * m, seed, torch.float32)
    kept = torch.rand(3, 2 * m, generator=torch.Generator().manual_seed(seed)) >= gone
    _, mask = sparsegpt(weight, gram, sparsity=None, pattern=(n, m), kept=kept)
    assert not (mask & ~kept).any()
    wanted = kept.view(-1, m).sum(1).clamp(max=n)
    assert torch.equal(mask.view(-1, m).sum(1), wanted)


def test_weights_that_were_pruned_before_count_and_are_made_up_for():
    weight, gram = problem()
    kept = torch.rand(6, 24, generator=torch.Generator().manual_seed(3)) > 0.4
    new, mask = sparsegpt(weight, gram, sparsity=0.5, kept=kept)
    expected, chosen = slowly(weight, gram, sparsity=0.5, kept=kept)
    assert torch.equal(mask, chosen)
    torch.testing.assert_close(new, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_nothing_or_everything(dtype):
    weight, gram = problem(dtype=dtype)
    before = weight.clone()
    new, mask = sparsegpt(weight, gram, sparsity=0)
    assert torch.equal(new, weight)
    assert mask.all()
    new, mask = sparsegpt(weight, gram, sparsity=1)
    assert torch.count_nonzero(new) == 0
    assert not mask.any()
    assert torch.equal(weight, before)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("group_of_zeros", [[3], [5, 20, 21, 22, 23], list(range(4, 24))])
def test_weights_of_unused_inputs_become_zero_and_go_first(how, group_of_zeros):
    weight, gram = problem()
    gram[group_of_zeros], gram[:, group_of_zeros] = 0, 0
    new, mask = sparsegpt(weight, gram, block=8, **how)
    assert new.isfinite().all()
    assert torch.count_nonzero(new[:, group_of_zeros]) == 0
    assert torch.equal((~mask).sum(), (~sparsegpt(*problem(), block=8, **how)[1]).sum())
    used = [j for j in range(24) if j not in group_of_zeros]
    if "pattern" not in how and mask[:, group_of_zeros].any():
        assert mask[:, used].all()
    if "pattern" not in how and not mask[:, used].all():
        assert not mask[:, group_of_zeros].any()


# --- numerics ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", HOW)
def test_the_scales_of_inputs_and_weights_do_not_matter(how):
    weight, gram = problem(20, 60, dtype=torch.float32)
    new, mask = sparsegpt(weight, gram, **how)
    for scale in (2.0**-40, 2.0**40):
        again, same = sparsegpt(weight, gram * scale, **how)
        assert torch.equal(same, mask)
        assert torch.equal(again, new)
    again, same = sparsegpt(weight * 2.0**10, gram, **how)
    assert torch.equal(same, mask)
    assert torch.equal(again, new * 2.0**10)


@pytest.mark.parametrize("how", HOW)
def test_views_and_half_precision(how):
    weight, gram = problem(20, 60, dtype=torch.float32)
    coarse = weight.bfloat16()
    new, mask = sparsegpt(coarse, gram, **how)
    exact, same = sparsegpt(coarse.float(), gram, **how)
    assert new.dtype == torch.bfloat16
    assert torch.equal(mask, same)
    assert torch.equal(new, exact.bfloat16())
    transposed = weight.T.contiguous().T
    before = transposed.clone()
    new, mask = sparsegpt(transposed, gram.double(), kept=torch.ones(60, 20, dtype=torch.bool).T, **how)
    expected, same = sparsegpt(weight, gram, **how)
    assert torch.equal(mask, same)
    assert torch.equal(new, expected)
    assert torch.equal(transposed, before)


def test_too_little_data_raises_the_damping_and_says_so():
    weight, _ = problem()
    inputs = torch.randn(3, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 1e3
    gram = inputs.T @ inputs
    with pytest.warns(UserWarning, match=r"fc1 is not positive definite at damping 0; used 0\.0001"):
        new, mask = sparsegpt(weight, gram, sparsity=0.5, damping=0, name="fc1")
    expected, same = sparsegpt(weight, gram, sparsity=0.5, damping=1e-4)
    assert torch.equal(mask, same)
    assert torch.equal(new, expected)


def test_what_no_damping_saves_is_refused():
    weight, gram = problem()
    with pytest.raises(ValueError, match="XᵀX is not positive semidefinite: no damping up to 100"):
        sparsegpt(weight, -gram, sparsity=0.5)


# --- it pays ----------------------------------------------------------------------------------------


def masked_error(weight, gram, sparsity, pattern):
    mask = select(wanda(weight, gram.diagonal().sqrt()), sparsity, group="row", pattern=pattern)
    return output_error(weight, weight * mask, gram)


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.7])
@pytest.mark.parametrize("pattern", [None, (2, 4)])
@pytest.mark.parametrize("seed", range(3))
def test_the_output_changes_less_than_with_wanda(sparsity, pattern, seed):
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(32, 64, generator=draw)
    # few directions, as in a network, and a little noise
    inputs = torch.randn(500, 16, generator=draw) @ torch.randn(16, 64, generator=draw)
    inputs += 0.5 * torch.randn(500, 64, generator=draw)
    gram = inputs.T @ inputs
    new, _ = sparsegpt(weight, gram, sparsity=sparsity, pattern=pattern)
    assert output_error(weight, new, gram) < 0.7 * masked_error(weight, gram, sparsity, pattern)


@pytest.mark.parametrize("how", [{"sparsity": 0.5, "block": 16}, {"sparsity": 0.5, "pattern": (2, 4)}])
def test_it_pays_in_every_matrix_of_a_trained_model(loaded, text, how):
    model = loaded[0]
    grams = {}

    def accumulate(module, inputs):
        rows = inputs[0].detach().flatten(0, -2).double()
        grams[module] = grams.get(module, 0) + rows.T @ rows

    layers = [each for each in model.model.decoder.layers.modules() if isinstance(each, torch.nn.Linear)]
    hooks = [module.register_forward_pre_hook(accumulate) for module in layers]
    with torch.no_grad():
        model(text.calibration)
    for hook in hooks:
        hook.remove()
    for layer in layers:
        weight, gram = layer.weight.detach(), grams[layer]
        new, _ = sparsegpt(weight, gram, **how)
        assert output_error(weight, new, gram) < masked_error(weight, gram, 0.5, how.get("pattern"))


# --- mistakes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gram": torch.eye(5)}, r"XᵀX is \(5, 5\); a weight \(6, 24\) needs \(24, 24\)"),
        ({"kept": torch.ones(24, 6, dtype=torch.bool)}, r"the earlier mask is torch\.bool \(24, 6\)"),
        ({"kept": torch.ones(6, 24)}, r"the earlier mask is torch\.float32 \(6, 24\)"),
        ({"damping": -0.1}, r"damping is -0\.1"),
        ({"damping": float("nan")}, r"damping is nan"),
        ({"block": 0}, "block is 0"),
        ({"sparsity": 1.5}, r"sparsity is 1\.5"),
        ({"pattern": (2, 5)}, "the width 24 is no multiple of 5"),
        ({"group": "column"}, "unknown group 'column'"),
        ({"weight": torch.full((6, 24), float("nan"))}, "the weight has entries that are not finite"),
        ({"gram": torch.full((24, 24), float("inf"))}, "XᵀX of the calibration inputs has entries"),
    ],
)
def test_mistakes_are_named(change, message):
    weight, gram = problem()
    given = {"weight": weight, "gram": gram, "sparsity": 0.5, **change}
    with pytest.raises(ValueError, match=message):
        sparsegpt(**given)
