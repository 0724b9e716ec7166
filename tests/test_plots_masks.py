"""Pictures of matrices with their masks: every colour can be worked out from one entry."""

import numpy as np
import pytest
import torch

from perpkit.interactive.plots.card import KEPT
from perpkit.interactive.plots.masks import FINEST, plot_mask
from perpkit.pruning.selection import select


@pytest.fixture
def weight():
    return torch.randn(12, 16, generator=torch.Generator().manual_seed(0))


def picture(figure, panel: int = 0) -> np.ndarray:
    return np.asarray(figure.axes[panel].get_images()[0].get_array())


def group_lines(axes) -> list[float]:
    """Where the lines between groups stand."""
    found = [each.get_segments() for each in axes.collections if hasattr(each, "get_segments")]
    return [float(start[0]) for segments in found for start, end in segments if start[0] == end[0]]


def test_what_is_pruned_is_white_and_the_rest_darkens_with_its_size():
    values = torch.tensor([[0.0, -1.0, 2.0], [3.0, 4.0, -4.0]])
    mask = torch.tensor([[True, True, False], [True, False, True]])
    drawn = picture(plot_mask(values, mask))
    assert (drawn[0, 2] == 1).all()
    assert (drawn[1, 1] == 1).all()
    light = [drawn[0, 0].sum(), drawn[0, 1].sum(), drawn[1, 0].sum(), drawn[1, 2].sum()]
    assert light == sorted(light, reverse=True)
    # Even a kept zero is no white, in grey too.
    assert drawn[0, 0] @ [0.3, 0.59, 0.11] < 0.85
    assert np.allclose(drawn[1, 2], KEPT(1.0)[:3])


def test_the_table_holds_each_cell(weight):
    mask = select(weight.abs(), 0.5)
    table = plot_mask(weight, mask, title="fc").table
    assert table["magnitude"].tolist() == weight.abs().flatten().tolist()
    assert table["kept"].tolist() == mask.float().flatten().tolist()
    assert table.loc[17, ["name", "row", "column"]].tolist() == ["fc", 1, 1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_any_precision_and_trained_parameters(weight, dtype):
    parameter = torch.nn.Parameter(weight.to(dtype))
    table = plot_mask(parameter).table
    assert table["magnitude"].tolist() == parameter.detach().float().abs().flatten().tolist()
    assert (table["kept"] == 1).all()


def test_several_matrices_share_one_scale(weight):
    mask = select(weight.abs(), 0.25)
    figure = plot_mask({"small": (weight / 4, None), "large": (weight, mask)})
    small, large = picture(figure, 0), picture(figure, 1)
    assert [axes.get_title() for axes in figure.axes[:2]] == ["small\nnothing pruned", "large\n25 % pruned"]
    assert figure.table.groupby("name", sort=False).size().to_dict() == {"small": 192, "large": 192}
    place = int(weight.abs().argmax())
    i, j = divmod(place, 16)
    assert np.allclose(large[i, j], KEPT(1.0)[:3])
    assert small[i, j].sum() > large[i, j].sum()


def test_groups_are_parted_and_counted(weight):
    mask = select(weight.abs(), None, pattern=(2, 4))
    figure = plot_mask(weight, mask, nm=(2, 4))
    assert group_lines(figure.axes[0]) == [4, 8, 12]
    assert "all 48 groups of 4 inputs keep 2" in figure.get_supxlabel().splitlines()
    mask[0, :4] = True
    assert "47 of 48 groups of 4 inputs keep 2" in plot_mask(weight, mask, nm=(2, 4)).get_supxlabel()
    both = plot_mask({"a": (weight, mask), "b": (weight, None)}, nm=(2, 4)).get_supxlabel()
    assert "a: 47 of 48 groups of 4 inputs keep 2\nb: 0 of 48 groups" in both


def test_a_corner_of_a_large_matrix_shows_its_groups():
    large = torch.arange(100 * 96.0).view(100, 96)
    mask = select(large, None, pattern=(4, 8))
    whole, corner = plot_mask(large, mask, nm=(4, 8)).axes[:2]
    assert group_lines(whole) == []
    assert group_lines(corner) == [8, 16, 24, 32, 40, 48, 56]
    assert (corner.get_xlabel(), corner.get_ylabel()) == ("64 inputs", "16 outputs")
    white = (np.asarray(corner.get_images()[0].get_array()) == 1).all(axis=2)
    assert np.array_equal(white, ~mask[:16, :64].numpy())


def test_the_threshold_stands_on_the_scale(weight):
    figure = plot_mask(weight, weight.abs() > 0.5, threshold=0.5)
    [line] = [line for line in figure.axes[-1].get_lines() if set(line.get_ydata()) == {0.5}]
    assert line.get_linewidth() > 1
    assert "kept above the line on the scale, 0.5" in figure.get_supxlabel()


def test_a_huge_matrix_is_averaged_over_squares():
    rows, columns = 2 * FINEST, 10
    weight = torch.ones(rows, columns)
    weight[:2, :2] = torch.tensor([[1.0, 3.0], [5.0, 7.0]])
    mask = torch.ones(rows, columns, dtype=torch.bool)
    mask[0, :2] = False  # half of the first square
    mask[2:4, :2] = False  # all of the second
    figure = plot_mask(weight, mask)
    table = figure.table.set_index(["row", "column"])
    assert len(table) == FINEST * 5
    assert table.loc[(0, 0), ["magnitude", "kept"]].tolist() == [6.0, 0.5]
    assert table.loc[(1, 0), ["magnitude", "kept"]].tolist() == [1.0, 0.0]
    assert (picture(figure)[1, 0] == 1).all()
    assert "each cell is the mean of up to 2 × 2 entries" in figure.get_supxlabel()


def test_a_side_that_no_square_divides_is_averaged_over_what_there_is():
    table = plot_mask(torch.ones(2 * FINEST + 1, 1)).table
    assert len(table) == -(-(2 * FINEST + 1) // 3)
    assert np.allclose(table[["magnitude", "kept"]], 1)


def test_few_large_entries_leave_the_others_their_colours():
    weight = torch.linspace(0, 1, 1000).view(20, 50)
    weight[0, 0] = 1000
    scale = plot_mask(weight).axes[-1]
    assert scale.get_ylim()[1] < 1.1


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_a_matrix_of_one_value_is_drawn(value):
    assert plot_mask(torch.full((4, 4), value)).png()


def test_broken_entries_are_counted(weight):
    weight[0, 0], weight[1, 1] = torch.nan, torch.inf
    figure = plot_mask(weight)
    assert (picture(figure)[0, 0] == 0).all()
    assert figure.get_supxlabel().endswith("2 entries are not finite: black")


def test_bad_tensors_are_errors(weight):
    with pytest.raises(ValueError, match=r"the tensor is \[12\]; a matrix is \[out, in\]"):
        plot_mask(weight[:, 0])
    with pytest.raises(ValueError, match=r"mask 'fc' is torch.bool \[1, 16\]; .* shape \[12, 16\]"):
        plot_mask(weight, weight[:1] > 0, title="fc")
    with pytest.raises(ValueError, match=r"the mask is torch.float32"):
        plot_mask(weight, (weight > 0).float())
    with pytest.raises(ValueError, match="has 16 inputs, no multiple of M = 5"):
        plot_mask(weight, nm=(2, 5))
    with pytest.raises(ValueError, match="the pattern is 4:2"):
        plot_mask(weight, nm=(4, 2))
    with pytest.raises(ValueError, match="no matrix to draw"):
        plot_mask({})
