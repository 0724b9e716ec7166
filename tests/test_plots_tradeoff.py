"""Trade-offs: quality against cost, one point an experiment."""

import numpy as np
import pandas as pd
import pytest

from perpkit.interactive.plots.figure import COLOURS
from perpkit.interactive.plots.tradeoff import plot_tradeoff


def rows(**columns) -> pd.DataFrame:
    made = pd.DataFrame(
        {
            "retrain": ["none", "biases", "biases", "biases", "full"],
            "seed": [0, 0, 1, 2, 0],
            "sparsity": 0.5,
            "trainable_share": [0.0, 0.01, 0.01, 0.01, 1.0],
            "seconds": [1.0, 2.0, 3.0, 7.0, 8.0],
            "perplexity": [9.0, 2.0, 3.0, 7.0, 2.5],
        }
    )
    return made.assign(**columns)


def points(figure) -> dict:
    """Colour -> where the markers are."""
    found: dict = {}
    for container in figure.axes[0].containers:
        line = container.lines[0]
        found.setdefault(line.get_color(), []).extend(line.get_xydata().tolist())
    return found


def bars(figure) -> list:
    """The error bars of the second method: across, then upwards."""
    container = figure.axes[0].containers[1]
    return [segments.get_segments()[0].tolist() for segments in container.lines[2]]


def test_a_point_is_the_mean_and_its_bars_reach_the_lowest_and_highest_seed():
    figure = plot_tradeoff(rows(), x="seconds")
    assert points(figure)[COLOURS[1]] == [[4.0, 4.0]]
    assert np.allclose(bars(figure), [[[2.0, 4.0], [7.0, 4.0]], [[4.0, 2.0], [4.0, 7.0]]])
    assert (
        "mean of 3 seeds, bars from lowest to highest; points without bars: one run" in figure.get_supxlabel()
    )


def test_equal_seeds_have_no_bars_below_zero():
    # The mean of three equal numbers may lie beside them.
    figure = plot_tradeoff(rows(trainable_share=[0.0, *[0.1] * 3, 1.0], perplexity=[9.0, *[0.7] * 3, 2.5]))
    assert np.allclose(bars(figure)[0], [[0.1, 0.7], [0.1, 0.7]])


@pytest.mark.parametrize(
    ("costs", "scale"),
    [
        ([0.0, 0.01, 0.01, 0.01, 1.0], "symlog"),
        ([0.001, 0.01, 0.01, 0.01, 1.0], "log"),
        ([0.1, 0.2, 0.2, 0.2, 1.0], "linear"),
        ([-1.0, 0.01, 0.01, 0.01, 1.0], "linear"),
    ],
)
def test_costs_far_apart_stand_on_a_logarithmic_axis_with_a_place_for_zero(costs, scale):
    axes = plot_tradeoff(rows(trainable_share=costs)).axes[0]
    assert axes.get_xscale() == scale
    low, high = axes.get_xlim()
    assert low < min(costs)
    assert high > max(costs)


@pytest.mark.parametrize(
    ("x", "value", "said"),
    [("trainable_share", 0.01, "1 %"), ("seconds", 0.5, "0.5"), ("peak_memory", 4e8, "400 MB")],
)
def test_costs_are_written_in_their_units(x, value, said):
    axes = plot_tradeoff(rows(peak_memory=[1e8, 2e8, 2e8, 2e8, 3e9]), x=x).axes[0]
    assert axes.xaxis.get_major_formatter()(value, 0) == said


def several(**columns) -> pd.DataFrame:
    pieces = [rows(sparsity=s, perplexity=rows()["perplexity"] + s) for s in (0.7, 0.3, 0.5)]
    return pd.concat(pieces, ignore_index=True).assign(**columns)


def test_points_of_several_sparsities_are_joined_and_grow():
    figure = plot_tradeoff(several())
    assert np.allclose(points(figure)[COLOURS[0]], [[0.0, 9.3], [0.0, 9.5], [0.0, 9.7]])
    sizes = [container.lines[0].get_markersize() for container in figure.axes[0].containers[:3]]
    assert sizes == sorted(set(sizes))
    said = "joined, from the smallest marker to the largest: sparsity 30 %, 50 %, 70 %"
    assert said in figure.get_supxlabel().splitlines()


def test_an_input_that_follows_another_is_no_second_one():
    ranks = several().assign(rank=several()["sparsity"].map({0.3: 4, 0.5: 8, 0.7: 16}), sparsity=0.5)
    figure = plot_tradeoff(ranks.assign(alpha=2 * ranks["rank"]))
    assert "largest: rank 4, 8, 16" in figure.get_supxlabel()


def test_points_that_differ_in_two_inputs_are_refused():
    criteria = pd.concat([several(criterion="magnitude"), several(criterion="wanda")])
    with pytest.raises(ValueError, match=r"differ in 'criterion', 'sparsity'; select .* hue='sparsity'"):
        plot_tradeoff(criteria)


def test_the_legend_ends_with_the_reference_lines():
    figure = plot_tradeoff(rows(dense_perplexity=1.5), x="seconds")
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["none", "biases (1 %)", "full (100 %)", "dense model (1.50)"]


def test_a_row_without_a_cost_is_left_out_and_said():
    figure = plot_tradeoff(rows(seconds=[1.0, 2.0, np.nan, 7.0, np.inf]), x="seconds")
    assert list(points(figure)) == COLOURS[:2]
    assert figure.get_supxlabel().endswith("2 of 5 rows are not finite and not shown")


def test_bad_tables_are_errors():
    with pytest.raises(ValueError, match="no column 'peak_memory'"):
        plot_tradeoff(rows(), x="peak_memory")
    with pytest.raises(ValueError, match="no rows"):
        plot_tradeoff(rows()[:0])
    halves = rows(seconds=[1.0, *[np.nan] * 4], perplexity=[np.nan, *[1.0] * 4])
    with pytest.raises(ValueError, match="both 'seconds' and 'perplexity'"):
        plot_tradeoff(halves, x="seconds")
    with pytest.raises(ValueError, match="several rows have retrain 'none', seed"):
        plot_tradeoff(pd.concat([rows(), rows()]))
