"""ALLR in cycles of pruning and retraining: each starts by what it has itself pruned."""

import copy
import functools
import math

import pytest
import torch
from soup_parts import cook, same_soup, same_tensors
from torch import nn

import perpkit as pk
from perpkit.pruning.masks import Masks
from perpkit.retraining.iterative import geometric_sparsities, imp
from perpkit.retraining.schedules import allr, allr_start

SETTINGS = {"subset": "full", "steps": 3, "lr": 1e-3, "batch": 4, "warmup": 0.4, "progress": False}
CYCLES = {"sparsity": 0.8, "cycles": 2, "schedule": "allr", "share": 0.01}


def test_the_start_of_a_later_cycle_by_hand():
    """Of (3, 4) that were left of four weights 3 is pruned: half of what was left."""
    model = nn.Linear(4, 1, bias=False)
    model.weight.data = torch.tensor([[0.0, 0.0, 0.0, 4.0]])
    earlier, masks = (Masks({"weight": torch.tensor([[False, False, x, True]])}) for x in (True, False))
    before = {"weight": torch.tensor([[0.0, 0.0, 3.0, 4.0]])}
    found = allr_start(model, masks, before, share=0.1, earlier=earlier)
    assert found == pytest.approx(3 / 5 / math.sqrt(0.5))
    with pytest.raises(ValueError, match="prune nothing"):
        allr_start(model, masks, before, share=0.1, earlier=masks)


@pytest.mark.parametrize("criterion", ["magnitude", "sparsegpt"])
def test_every_cycle_starts_by_what_it_has_pruned(make_model, windows, criterion):
    dense = make_model("opt")
    model, by_hand = copy.deepcopy(dense), copy.deepcopy(dense)
    calibration = None if criterion == "magnitude" else windows
    _, history = imp(model, criterion, windows, calibration=calibration, **CYCLES, **SETTINGS)
    earlier, starts = None, []
    for cycle, sparsity in enumerate(geometric_sparsities(0.8, 2)):
        before = copy.deepcopy(by_hand)
        options = {"sparsity": sparsity, "masks": earlier, "calibration": calibration, "progress": False}
        masks = pk.prune(by_hand, criterion, **options)
        starts.append(allr_start(by_hand, masks, before, share=0.01, earlier=earlier))
        schedule = functools.partial(allr, start=starts[-1], warmup=0.4)
        pk.retrain(by_hand, windows, masks=masks, seed=cycle, schedule=schedule, **SETTINGS)
        earlier = masks
    assert same_tensors(model, by_hand)
    assert history.groupby("cycle")["lr"].max().tolist() == pytest.approx([1e-3 * start for start in starts])
    assert 0.01 < starts[0] < 1
    assert starts[0] != starts[1]


def test_one_candidate_is_iterative_pruning(make_model, windows):
    dense = make_model("opt")
    soup = cook(dense, windows, m=1, **CYCLES, **SETTINGS)
    _, history = imp(dense, "magnitude", windows, **CYCLES, **SETTINGS)
    assert same_tensors(soup.model, dense)
    assert soup.history["lr"].tolist() == history["lr"].tolist()


def test_a_soup_goes_on_with_the_same_starts_only(make_model, windows, tmp_path):
    dense, told = make_model("opt"), []
    options = {**CYCLES, **SETTINGS, "m": 2}
    whole = cook(dense, windows, **options)
    stopped = {"on_candidate": told.append, "cancelled": lambda: len(told) >= 3}
    cook(dense, windows, folder=tmp_path, **stopped, **options)
    for other in ({"share": 0.02}, {"schedule": "llr", "share": None}):
        with pytest.raises(ValueError, match="another learning rates;"):
            cook(dense, windows, folder=tmp_path, **{**options, **other})
    assert same_soup(cook(dense, windows, folder=tmp_path, **options), whole)


def test_iterative_pruning_resumes(make_model, windows, tmp_path):
    options = {**CYCLES, **SETTINGS, "checkpoint": tmp_path / "run"}
    whole = make_model("opt")
    imp(whole, "magnitude", windows, **options)
    (tmp_path / "run-2").unlink()
    again = make_model("opt")
    imp(again, "magnitude", windows, **options)
    assert same_tensors(again, whole)


@pytest.mark.parametrize("share", [None, 0.0, math.nan, "0.1", True])
def test_a_share_is_needed(make_model, windows, share):
    model = make_model("opt")
    before = copy.deepcopy(model)
    for call in (
        functools.partial(imp, model, "magnitude", windows, **SETTINGS),
        functools.partial(cook, model, windows),
    ):
        with pytest.raises(ValueError, match=r"share is .*; the schedule 'allr' needs T_rt/T"):
            call(**{**CYCLES, "share": share})
        with pytest.raises(ValueError, match=r"share is 0\.1, which only the schedule 'allr' reads"):
            call(**{**CYCLES, "schedule": "llr", "share": 0.1})
    assert same_tensors(model, before)
