"""Iterative pruning: the schedule, masks that only grow, and runs that stop or fail in between."""

import copy
import itertools
import math

import pytest
import torch
from case_names import named

import perpkit as pk
from perpkit.retraining.iterative import Cycle, geometric_sparsities, imp

SETTINGS = {"subset": "full", "steps": 3, "lr": 1e-3, "batch": 4, "progress": False}


def snapshot(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one, other):
    return all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("cycles", [1, 2, 5])
def test_every_cycle_prunes_the_same_share_of_what_is_left(sparsity, cycles):
    found = geometric_sparsities(sparsity, cycles)
    assert len(found) == cycles
    assert found[-1] == sparsity
    if sparsity < 1:
        kept = [1.0, *(1 - each for each in found)]
        shares = [after / before for before, after in itertools.pairwise(kept)]
        assert all(share == pytest.approx((1 - sparsity) ** (1 / cycles)) for share in shares)


def test_it_is_pruning_and_retraining_by_turns(make_model, windows):
    dense = make_model("opt")
    model, by_hand = copy.deepcopy(dense), copy.deepcopy(dense)
    masks, history = imp(model, "magnitude", windows, sparsity=0.9, cycles=3, seed=5, **SETTINGS)
    now = None
    for cycle, sparsity in enumerate(geometric_sparsities(0.9, 3)):
        before = now
        now = pk.prune(by_hand, "magnitude", sparsity=sparsity, masks=before, progress=False)
        assert before is None or not any((now[name] & ~before[name]).any() for name in now)
        steps = pk.retrain(by_hand, windows, masks=now, seed=5 + cycle, **SETTINGS)
        rows = history[history["cycle"] == cycle + 1]
        assert rows["loss"].tolist() == steps["loss"].tolist()
        assert (rows["sparsity"] == sparsity).all()
    assert same(snapshot(model), snapshot(by_hand))
    assert all(torch.equal(masks[name], now[name]) for name in now)
    masks.check(model)
    assert (history["trainable_share"] == 1).all()
    assert len(history) == 9


def test_any_architecture_by_any_criterion(any_model, windows):
    """Criteria that look at activations get calibration; the pruning's own options reach it."""
    options = {"calibration": windows, "pruning": {"group": "layer", "batch": 6}}
    masks, history = imp(any_model, "wanda", windows, sparsity=0.6, cycles=2, **options, **SETTINGS)
    masks.check(any_model)
    for name, mask in masks.items():
        kept = mask.flatten(1) if mask.ndim == 3 else mask[None]
        assert all(int((~each).sum()) == round(0.6 * each.numel()) for each in kept), name
    assert history["loss"].map(math.isfinite).all()


def test_cycles_are_told_and_can_be_looked_at(make_model, windows):
    model, told = make_model("llama"), []

    def look(cycle):
        cycle.masks.check(model)
        told.append((cycle, cycle.masks.sparsity()))

    masks, history = imp(model, "magnitude", windows, sparsity=0.8, cycles=2, on_cycle=look, **SETTINGS)
    assert all(isinstance(cycle, Cycle) for cycle, _ in told)
    assert [(cycle.cycle, cycle.cycles) for cycle, _ in told] == [(1, 2), (2, 2)]
    for cycle, sparsity in told:
        assert sparsity == pytest.approx(cycle.sparsity, abs=1e-3)
        assert cycle.loss == history[history["cycle"] == cycle.cycle]["loss"].iloc[-1]
    assert masks is told[-1][0].masks


def test_the_seed_decides_and_the_global_generators_stay(make_model, windows, generators_unchanged):
    found = []
    for seed in (0, 0, 1):
        model = make_model("opt", dropout=0.1)
        imp(model, "random", windows, sparsity=0.5, cycles=2, seed=seed, **SETTINGS)
        found.append(snapshot(model))
    assert same(found[0], found[1])
    assert not same(found[0], found[2])


@pytest.mark.parametrize("when", [0, 2, 30])
def test_cancelled_masks_and_history_are_those_of_the_model(make_model, windows, when):
    model = make_model("opt")
    asked, told = iter(range(1000)), []
    masks, history = imp(
        model,
        "magnitude",
        windows,
        sparsity=0.9,
        cycles=3,
        cancelled=lambda: next(asked) >= when,
        on_cycle=told.append,
        **SETTINGS,
    )
    assert next(asked) == when + 1, "it was asked again after it had said True"
    masks.check(model)
    assert list(history.columns) == ["cycle", "sparsity", "step", "loss", "lr", "trainable_share"]
    zeros = sum(int((value == 0).sum()) for name, value in model.named_parameters() if name in masks)
    assert zeros == sum(int((~mask).sum()) for mask in masks.values())
    assert len(history) < 9
    assert len(told) < 3


def test_an_interrupted_run_has_its_masks(make_model, windows):
    model, steps = make_model("opt"), []

    def interrupt(step, loss):
        steps.append(step)
        if len(steps) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as stopped:
        imp(model, "magnitude", windows, sparsity=0.9, cycles=3, on_step=interrupt, **SETTINGS)
    assert "in cycle 2 of 3" in stopped.value.__notes__[-1]
    masks = stopped.value.masks
    assert masks.sparsity() == pytest.approx(geometric_sparsities(0.9, 3)[1], abs=1e-3)
    masks.check(model)


def test_a_killed_run_goes_on_to_the_same_bits(make_model, windows, tmp_path):
    dense = make_model("opt")
    options = {"sparsity": 0.9, "cycles": 3, "checkpoint": tmp_path / "run", **SETTINGS}
    whole = copy.deepcopy(dense)
    _, history = imp(whole, "magnitude", windows, **{**options, "checkpoint": tmp_path / "other"})

    taken = []

    def killed(step, loss):
        taken.append(step)
        if len(taken) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        imp(copy.deepcopy(dense), "magnitude", windows, on_step=killed, checkpoint_every=1, **options)
    again, steps = copy.deepcopy(dense), []
    masks, resumed = imp(
        again, "magnitude", windows, on_step=lambda *step: steps.append(step), checkpoint_every=1, **options
    )
    assert same(snapshot(again), snapshot(whole))
    masks.check(again)
    assert resumed.equals(history)
    assert len(steps) < 9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.5}, "sparsity is 1.5"),
        ({"cycles": 0}, "cycles is 0"),
        ({"subset": "bias"}, "unknown subset 'bias'; did you mean 'biases'"),
        ({"lr": -1.0}, "lr=-1.0"),
        ({"gradual": "thaw"}, "gradual is 'thaw'; want 'freeze' or 'unfreeze'"),
        ({"gradual": "freeze", "subset": "biases"}, "'biases' trains no layers that could be frozen"),
        ({"gradual": "freeze", "stages": 0}, "stages is 0"),
        ({"criterion": "size"}, "unknown criterion 'size'"),
        ({"criterion": "wanda"}, "wanda looks at activations: give calibration="),
        ({"data": torch.full((4, 16), 99)}, "token id is 99"),
        ({"pruning": {"power": 2}}, "prune has no parameter 'power'"),
        ({"pruning": {"sparsity": 0.5}}, "pruning has 'sparsity', which is not set there"),
        ({"pruning": 3}, "pruning is 3; it is a mapping"),
        ({"sparsity": "0.5"}, "sparsity is '0.5'"),
    ],
)
def test_bad_options_are_named_and_change_nothing(make_model, windows, options, message):
    model = make_model("opt")
    before = snapshot(model)
    call = {"criterion": "magnitude", "data": windows, "sparsity": 0.5, "cycles": 2, **SETTINGS, **options}
    with pytest.raises(ValueError, match=message):
        imp(model, **call)
    assert same(before, snapshot(model))


def test_what_retrain_needs_and_does_not_know_is_said_before_pruning(make_model, windows):
    model = make_model("opt")
    before = snapshot(model)
    with pytest.raises(TypeError, match="'lr'"):
        imp(model, "magnitude", windows, sparsity=0.5, cycles=2, subset="full")
    with pytest.raises(TypeError, match="epochs"):
        imp(model, "magnitude", windows, sparsity=0.5, cycles=2, epochs=3, **SETTINGS)
    assert same(before, snapshot(model))


def test_several_cycles_beat_one_at_high_sparsity(loaded, text):
    """The embedded model at 80 %: as many steps in all, the last cycle as long as the single one."""
    results = {}
    for cycles in (1, 3):
        model = copy.deepcopy(loaded[0])
        options = {"sparsity": 0.8, "cycles": cycles, "subset": "full", "steps": 25, "lr": 3e-3}
        imp(model, "magnitude", text.train, progress=False, **options)
        results[cycles] = pk.perplexity(model, text.test)
    assert results[3] < results[1]


def head_is_tied(model):
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": -1}, "steps=-1"),
        ({"steps": 2.0}, "steps is 2.0"),
        ({"cycles": 2.0}, "cycles is 2.0"),
        ({"schedule": lambda step, steps: math.nan}, "factor at step 0 is nan"),
        ({"checkpoint": "no/such/folder/run"}, "lies in a folder that does not exist"),
        ({"checkpoint": "run", "checkpoint_every": 0}, "checkpoint_every is 0"),
        ({"criterion": "size"}, "unknown criterion 'size'"),
        ({"distill_weight": 2.0}, "distill_weight"),
        ({"batch": 0}, "batch is 0"),
    ],
    ids=named,
)
def test_bad_options_neither_prune_nor_untie(make_model, windows, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    model = make_model("opt")
    before = snapshot(model)
    call = {"criterion": "magnitude", "data": windows, "sparsity": 0.5, "cycles": 2, **SETTINGS}
    with pytest.raises(ValueError, match=message):
        imp(model, **{**call, "subset": "head", **options})
    assert same(before, snapshot(model))
    assert head_is_tied(model)


def test_another_scheme_does_not_go_on_from_a_checkpoint(make_model, windows, tmp_path):
    dense = make_model("opt")
    call = {"sparsity": 0.5, "cycles": 1, "checkpoint": tmp_path / "run", **SETTINGS}
    schemes = [{}, {"gradual": "freeze"}, {"gradual": "freeze", "reverse": True}]
    schemes += [{"gradual": "freeze", "stages": 3}, {"gradual": "unfreeze"}]
    for scheme in schemes:
        model, whole = copy.deepcopy(dense), copy.deepcopy(dense)
        imp(model, "magnitude", windows, **{**call, **scheme})
        imp(whole, "magnitude", windows, **{**call, **scheme, "checkpoint": None})
        assert same(snapshot(model), snapshot(whole)), scheme
