"""Filters and feature maps."""

import numpy as np
import pytest
import torch
from matplotlib.transforms import Bbox

from perpkit.interactive.plots.features import plot_filters, plot_maps


def images(figure) -> list:
    return [image for axes in figure.axes for image in axes.get_images()]


def titles(figure) -> list[str]:
    return [title for axes in figure.axes if (title := axes.get_title())]


def crosses(axes) -> list:
    return sorted((int(row), int(column)) for line in axes.get_lines() for column, row in line.get_xydata())


def test_each_filter_shows_its_strongest_input_channel():
    weight = torch.zeros(3, 4, 3, 3)
    weight[0, 2], weight[1, 0], weight[1, 3, 0, 0], weight[2, 1, 1, 1] = 1, 2, 5, -4
    figure = plot_filters(weight)
    assert titles(figure) == ["0 ← 2", "1 ← 0", "2 ← 1"]
    assert np.array_equal(images(figure)[2].get_array(), weight[2, 1])
    assert images(figure)[0].get_clim() == (-4.0, 4.0)
    assert figure.table.query("filter == 2 and weight != 0").values.tolist() == [[2, 1, 1, 1, -4]]


def test_weights_that_are_zero_are_crossed():
    weight = torch.ones(2, 1, 3, 3)
    weight[1, 0, 0, 2] = weight[1, 0, 2, 1] = 0
    figure = plot_filters(weight)
    assert crosses(figure.axes[0]) == []
    assert crosses(figure.axes[1]) == [(0, 2), (2, 1)]
    assert "crosses: weights that are exactly zero" in figure.get_supxlabel()
    wide = plot_filters(torch.zeros(2, 1, 9, 9))
    assert crosses(wide.axes[0]) == []
    assert "crosses" not in wide.get_supxlabel()


def test_filters_over_colours_are_colours_around_grey():
    weight = torch.zeros(2, 3, 1, 2)
    weight[0, :, 0, 0] = torch.tensor([2.0, 0.0, -1.0])
    [first, _] = images(plot_filters(weight))
    assert np.allclose(first.get_array(), [[[1, 0.5, 0.25], [0.5] * 3]])


@pytest.mark.parametrize(
    ("count", "drawn", "said"), [(3, 3, "the first 3 of 20 filters"), (20, 20, "all 20"), (99, 20, "all 20")]
)
def test_the_first_filters_are_drawn(count, drawn, said):
    figure = plot_filters(torch.randn(20, 2, 3, 3), count=count)
    assert len(titles(figure)) == drawn
    assert figure.table["filter"].nunique() == drawn
    assert figure.get_supxlabel().startswith(said)


def test_a_layer_that_is_pruned_entirely_is_drawn():
    assert plot_filters(torch.zeros(2, 2, 3, 3, dtype=torch.bfloat16)).png()


def test_bad_filters_are_errors():
    with pytest.raises(ValueError, match=r"\[4, 4\]; filters are \[out, in, height, width\]"):
        plot_filters(torch.zeros(4, 4))
    with pytest.raises(ValueError, match="count is 0"):
        plot_filters(torch.zeros(4, 1, 3, 3), count=0)


def test_maps_share_one_scale_and_keep_their_order():
    figure = plot_maps({"dense": torch.tensor([[0.0, 2.0]]), "pruned": torch.tensor([[-1.0, 1.0]])})
    assert titles(figure) == ["dense", "pruned"]
    assert [image.get_clim() for image in images(figure)[:2]] == [(-1.0, 2.0)] * 2
    assert figure.get_supxlabel() == "all maps on one scale, -1 to 2"
    assert figure.table["value"].tolist() == [0.0, 2.0, -1.0, 1.0]


def test_pictures_are_pictures_and_leave_the_scale_alone():
    picture = torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(0))
    figure = plot_maps({"picture": picture, "map": torch.tensor([[0.0, 0.25]])})
    shown, mapped = images(figure)[:2]
    assert np.allclose(shown.get_array(), picture.permute(1, 2, 0))
    assert mapped.get_clim() == (0.0, 0.25)
    pixel = figure.table.query("title == 'picture' and channel == 2 and row == 1 and column == 3")
    assert pixel["value"].tolist() == [picture[2, 1, 3].item()]


def test_bytes_and_normalised_pictures():
    eight = torch.tensor([0, 51, 255], dtype=torch.uint8).view(3, 1, 1)
    assert np.allclose(images(plot_maps({"x": eight}))[0].get_array(), [[[0, 0.2, 1]]])
    normalised = plot_maps({"x": torch.tensor([-2.0, 0.0, 2.0]).view(3, 1, 1)})
    assert np.allclose(images(normalised)[0].get_array(), [[[0, 0.5, 1]]])
    assert normalised.get_supxlabel() == "stretched from lowest to highest value: x"


def test_many_maps_wrap():
    figure = plot_maps({str(i): torch.eye(4) for i in range(7)})
    tops = [round(axes.get_subplotspec().rowspan.start) for axes in figure.axes[:7]]
    assert tops == [0] * 5 + [1] * 2


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_values_that_are_not_finite_are_said(value):
    figure = plot_maps({"map": torch.tensor([[0.0, 1.0, value]])})
    assert images(figure)[0].get_clim() == (0.0, 1.0)
    assert figure.get_supxlabel().endswith("1 of 3 values are not finite and left white")
    assert figure.png()
    assert plot_maps({"picture": torch.full((3, 2, 2), value)}).png()


def test_a_constant_map_is_drawn():
    assert plot_maps({"map": torch.zeros(2, 2)}).png()


@pytest.mark.parametrize("shape", [(4,), (4, 2, 2), (1, 3, 2, 2), (0, 2)])
def test_tensors_of_other_shapes_are_errors(shape):
    with pytest.raises(ValueError, match=r"'map' is .*; a map is \[height, width\]"):
        plot_maps({"map": torch.zeros(shape)})


def test_no_map():
    with pytest.raises(ValueError, match="no map to draw"):
        plot_maps({})


@pytest.mark.parametrize("count", [1, 3, 7])
@pytest.mark.parametrize("shape", [(8, 8), (3, 9)])
@pytest.mark.parametrize("size", [0.1, 1.0, 1000.0])
def test_maps_are_drawn_the_same_each_time_and_within_the_figure(count, shape, size):
    generator = torch.Generator().manual_seed(2)
    maps = {
        f"map {place}\nof two lines": size * torch.randn(shape, generator=generator) for place in range(count)
    }
    figure = plot_maps({"picture": torch.rand(3, *shape, generator=generator), **maps})
    assert figure.png() == figure.png()
    for axes in figure.axes:
        inside = Bbox.intersection(figure.bbox, axes.get_tightbbox())
        assert inside is not None
        assert inside.bounds == pytest.approx(axes.get_tightbbox().bounds), axes.get_title()
