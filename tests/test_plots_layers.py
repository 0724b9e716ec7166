"""Bars and heat maps by layer."""

import numpy as np
import pandas as pd
import pytest

import perpkit as pk
from perpkit.interactive.plots.card import short_names
from perpkit.interactive.plots.layers import MOST_NAMES, plot_heatmap, plot_layers


def rows(**columns) -> pd.DataFrame:
    names = [f"model.layers.{block}.{kind}.weight" for block in (0, 1) for kind in ("attn.q", "fc")]
    return pd.DataFrame({"layer": names, "sparsity": [0.1, 0.2, 0.3, 0.4]}).assign(**columns)


def labels(axis) -> list[str]:
    return [label.get_text() for label in axis.get_ticklabels()]


def widths(figure) -> list:
    return [
        [bar.get_width() for bar in group] for group in figure.axes[0].containers if hasattr(group, "patches")
    ]


def cells(figure) -> np.ndarray:
    return figure.axes[0].get_images()[0].get_array().filled(np.nan)


def test_a_bar_for_each_layer_from_the_top():
    figure = plot_layers(rows())
    assert widths(figure) == [[0.1, 0.2, 0.3, 0.4]]
    assert labels(figure.axes[0].yaxis) == ["0.attn.q", "0.fc", "1.attn.q", "1.fc"]
    low, high = figure.axes[0].get_ylim()
    assert low > high
    assert figure.get_supxlabel() == "4 layers"


def test_groups_stand_below_each_other_and_need_not_be_complete():
    both = pd.concat([rows(method="wanda"), rows(method="ria", sparsity=0.5)[1:]])
    figure = plot_layers(both, hue="method")
    first, second = widths(figure)
    assert first == [0.1, 0.2, 0.3, 0.4]
    assert np.allclose(second, [np.nan, 0.5, 0.5, 0.5], equal_nan=True)
    tops = [group[1].get_y() for group in figure.axes[0].containers]
    assert tops[1] == pytest.approx(tops[0] + 0.4)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["wanda", "ria"]


def test_bars_are_means_over_seeds_with_lines_from_lowest_to_highest():
    seeds = pd.concat([rows(seed=0), rows(seed=1, sparsity=[0.3, 0.2, 0.3, 0.4])])
    figure = plot_layers(seeds)
    container = next(group for group in figure.axes[0].containers if hasattr(group, "patches"))
    assert container[0].get_width() == pytest.approx(0.2)
    spread = container.errorbar.lines[2][0].get_segments()[0]
    assert spread[:, 0].tolist() == pytest.approx([0.1, 0.3])
    assert figure.get_supxlabel().splitlines() == [
        "4 layers",
        "mean of 2 seeds, lines from lowest to highest",
    ]


def test_of_many_layers_not_all_are_named():
    many = pd.DataFrame({"layer": [f"h.{i}.fc" for i in range(150)], "sparsity": 0.5})
    figure = plot_layers(many)
    assert len(labels(figure.axes[0].yaxis)) == 50 <= MOST_NAMES
    assert figure.get_supxlabel() == "150 layers, one in 3 named"


def test_the_sparsity_of_real_masks_is_drawn():
    model, _ = pk.load_model("tiny-opt", device="cpu")
    masks = pk.prune(model, "magnitude", sparsity=0.5, allocation="global", progress=False)
    table = masks.sparsity(by="layer")
    [drawn] = widths(plot_layers(table))
    assert drawn == table["sparsity"].tolist()
    assert cells(plot_heatmap(table)).ravel().tolist() == table["sparsity"].tolist()


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["a.b.0.x.weight", "a.b.1.x.weight"], ["0.x", "1.x"]),
        (["conv1.weight", "layer1.0.conv.weight", "all"], ["conv1", "layer1.0.conv", "all"]),
        (["a.b", "a.b.c", "all"], ["b", "b.c", "all"]),
        (["only.one.weight"], ["only.one"]),
    ],
)
def test_names_lose_what_all_share(names, short):
    assert short_names(names) == short


def test_a_heat_map_has_blocks_downwards_and_kinds_to_the_right():
    figure = plot_heatmap(rows())
    axes = figure.axes[0]
    assert labels(axes.yaxis) == ["0", "1"]
    assert labels(axes.xaxis) == ["attn.q", "fc"]
    assert cells(figure).tolist() == [[0.1, 0.2], [0.3, 0.4]]
    assert [text.get_text() for text in axes.texts] == ["10.0 %", "20.0 %", "30.0 %", "40.0 %"]
    assert list(figure.table.columns) == ["block", "kind", "layer", "sparsity"]


def test_figures_are_read_on_dark_and_light_cells():
    colours = [text.get_color() for text in plot_heatmap(rows()).axes[0].texts]
    assert colours[0] == "white"
    assert colours[-1] == "black"


def test_missing_cells_are_left_open_and_counted():
    table = rows(layer=["conv1.weight", "layer1.0.conv1.weight", "layer1.0.conv2.weight", "fc.weight"])
    figure = plot_heatmap(table)
    nan = np.nan
    expected = [[0.1, nan, nan], [nan, 0.2, 0.3], [0.4, nan, nan]]
    assert np.array_equal(cells(figure), expected, equal_nan=True)
    assert figure.get_supxlabel() == "4 values, 5 cells without one hatched"


def test_other_columns_and_seeds_can_be_mapped():
    table = pd.DataFrame(
        {"criterion": ["a", "a", "b", "b"], "rank": 4, "seed": [0, 1, 0, 1], "error": [1.0, 3.0, 5.0, 5.0]}
    )
    figure = plot_heatmap(table, x="criterion", y="rank", value="error")
    assert cells(figure).tolist() == [[2.0, 5.0]]
    assert figure.get_supxlabel().splitlines() == ["4 values", "mean of 2 seeds"]


def test_values_far_apart_are_coloured_by_their_logarithm():
    norm = plot_heatmap(rows(sparsity=[1e-4, 1e-3, 1e-2, 1e-1])).axes[0].get_images()[0].norm
    assert norm(1e-3) == pytest.approx(1 / 3)
    assert plot_heatmap(rows()).axes[0].get_images()[0].norm(0.2) == pytest.approx(1 / 3)


@pytest.mark.parametrize("plot", [plot_layers, plot_heatmap])
def test_bad_tables_are_errors(plot):
    with pytest.raises(ValueError, match="no rows"):
        plot(rows()[:0])
    with pytest.raises(ValueError, match="no column 'sparsity'"):
        plot(rows().drop(columns="sparsity"))
    with pytest.raises(ValueError, match="no value of 'sparsity' is finite"):
        plot(rows(sparsity=np.nan))
    with pytest.raises(ValueError, match="several rows have"):
        plot(pd.concat([rows(), rows()]))
    with pytest.raises(ValueError, match=r"no column '(layer|kind)'"):
        plot(rows().drop(columns="layer"))
