"""Histograms of weights, before and after."""

import numpy as np
import pytest
import torch

from perpkit.interactive.plots.weights import BINS, plot_weights


@pytest.fixture
def weight():
    return torch.randn(40, 50, generator=torch.Generator().manual_seed(0))


def legend(figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_every_weight_is_counted_once(weight):
    pruned = weight * (weight.abs() > 0.5)
    table = plot_weights({"dense": weight, "pruned": pruned}).table
    bins = table[table.low < table.high]
    for name, tensor in {"dense": weight, "pruned": pruned}.items():
        mine = bins[bins.name == name]
        assert len(mine) == BINS
        for low, high, count in mine[["low", "high", "count"]].iloc[:-1].itertuples(index=False):
            inside = (tensor != 0) & (tensor.double() >= low) & (tensor.double() < high)
            # A float32 on an edge may fall to either side.
            assert abs(int(inside.sum()) - count) <= 1
        assert table[table.name == name]["count"].sum() == tensor.numel()
    assert np.array_equal(bins[bins.name == "dense"].low, bins[bins.name == "pruned"].low)


def test_zeros_are_told_and_not_drawn(weight):
    pruned = weight * (weight.abs() > weight.abs().median())
    figure = plot_weights({"dense": weight, "pruned": pruned})
    assert legend(figure) == [
        "dense: 2,000 weights, none exactly zero",
        "pruned: 2,000 weights, 50 % exactly zero (not drawn)",
    ]
    drawn = [np.asarray(patch.get_data().values).sum() for patch in figure.axes[0].patches]
    assert drawn == [2000, 2000, 1000, 1000]
    low_high = figure.table[figure.table.low == figure.table.high]
    assert low_high[["name", "count"]].values.tolist() == [["dense", 0], ["pruned", 1000]]


def test_outliers_bring_a_logarithmic_axis(weight):
    assert plot_weights({"dense": weight}).axes[0].get_yscale() == "linear"
    weight[0, 0] = 100
    assert plot_weights({"dense": weight}).axes[0].get_yscale() == "log"


def test_lines_differ_by_more_than_colour(weight):
    figure = plot_weights({"a": weight, "b": weight, "c": weight})
    outlines = [patch for patch in figure.axes[0].patches if not patch.get_fill()]
    assert len({str(patch.get_linestyle()) for patch in outlines}) == 3


def test_broken_weights_are_said(weight):
    weight[0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    figure = plot_weights({"dense": weight.bfloat16()})
    assert figure.get_supxlabel().endswith("3 of 2000 weights of dense are not finite and not shown")


@pytest.mark.parametrize("weights", [{}, {"w": torch.zeros(0)}, {"w": torch.tensor([torch.nan])}])
def test_no_weights_are_an_error(weights):
    with pytest.raises(ValueError, match="no finite weights to draw"):
        plot_weights(weights)


def test_a_tensor_of_zeros_is_drawn():
    figure = plot_weights({"pruned": torch.zeros(3, 3)})
    assert legend(figure) == ["pruned: 9 weights, 100 % exactly zero (not drawn)"]
    assert figure.png()
