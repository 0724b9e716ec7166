"""Curves: several panels with one legend, and published numbers beside one's own."""

import numpy as np
import pandas as pd
import pytest

import perpkit as pk


def rows(**columns) -> pd.DataFrame:
    made = pd.DataFrame(
        {
            "retrain": ["none", "none", "biases", "biases"],
            "sparsity": [0.5, 0.7] * 2,
            "perplexity": [4.0, 40.0, 3.0, 6.0],
            "accuracy": [0.6, 0.5, 0.9, 0.8],
            "dense_perplexity": 2.0,
            "dense_accuracy": 0.95,
        }
    )
    return made.assign(**columns)


def published(**columns) -> pd.DataFrame:
    made = pd.DataFrame(
        {
            "sparsity": [0.7, 0.5, 0.5, 0.6],
            "perplexity": [50.0, 5.0, 2.5, 12.0],
            "label": ["none", "none", "perp", "none"],
        }
    )
    return made.assign(**columns)


def lines(axes) -> dict:
    return {line.get_label(): line for line in axes.get_lines()}


def test_several_values_stand_side_by_side_under_one_legend():
    figure = pk.plot_curves(rows(), y=("perplexity", "accuracy"))
    left, right = figure.axes
    assert [axes.get_ylabel() for axes in figure.axes] == ["perplexity (test)", "mean accuracy"]
    assert lines(left)["biases"].get_ydata().tolist() == [3.0, 6.0]
    assert lines(right)["biases"].get_ydata().tolist() == [0.9, 0.8]
    assert (left.get_yscale(), right.get_yscale()) == ("log", "linear")
    [legend] = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "none",
        "biases",
        "dense model (2.00; 95.0 %)",
    ]


def test_each_panel_says_what_it_leaves_out():
    figure = pk.plot_curves(rows(perplexity=[4.0, np.inf, 3.0, 6.0]), y=("perplexity", "accuracy"))
    assert figure.get_supxlabel() == "perplexity (test): 1 of 4 rows are not finite and not shown"


def test_shares_are_percentages():
    figure = pk.plot_curves(rows(), y="accuracy")
    assert figure.axes[0].yaxis.get_major_formatter()(0.625, 0) == "62.5 %"


def test_two_published_points_are_not_joined():
    results = pd.DataFrame({"steps": [0, 1, 2], "perplexity": [9.0, 4.0, 3.0], "retrain": "full"})
    theirs = pd.DataFrame({"steps": [0, 2], "perplexity": [8.0, 2.0], "label": "full"})
    figure = pk.plot_curves(results, x="steps", y="perplexity", published=theirs)
    assert [line.get_linestyle() for line in figure.axes[0].lines] == ["-", "None"]


def test_published_numbers_are_dashed_with_open_markers_in_their_namesakes_colour():
    axes = pk.plot_curves(rows(), published=published()).axes[0]
    drawn = lines(axes)
    theirs, ours = drawn["none, published"], drawn["none"]
    assert theirs.get_xydata().tolist() == [[0.5, 5.0], [0.6, 12.0], [0.7, 50.0]]
    assert theirs.get_color() == ours.get_color()
    assert theirs.get_markerfacecolor() == "white"
    assert theirs.get_linestyle() == "--"
    assert drawn["perp, published"].get_color() not in {ours.get_color(), drawn["biases"].get_color()}


def test_published_numbers_make_the_axis_logarithmic():
    few = rows(perplexity=[4.0, 5.0, 3.0, 6.0])
    assert pk.plot_curves(few).axes[0].get_yscale() == "linear"
    assert pk.plot_curves(few, published=published()).axes[0].get_yscale() == "log"


def test_the_caption_and_the_table_tell_published_numbers_apart():
    results = rows(retrain=pd.Categorical(["none"] * 2 + ["biases"] * 2))
    figure = pk.plot_curves(results, published=published())
    assert figure.get_supxlabel() == "open markers: published numbers"
    table = figure.table
    assert table["published"].tolist() == [False] * 4 + [True] * 4
    assert table["retrain"].tolist() == ["none"] * 2 + ["biases"] * 2 + ["none", "none", "perp", "none"]
    assert table["perplexity"].tolist() == [4.0, 40.0, 3.0, 6.0, 50.0, 5.0, 2.5, 12.0]


def test_published_numbers_stay_out_of_panels_they_have_no_values_for():
    left, right = pk.plot_curves(rows(), y=("perplexity", "accuracy"), published=published()).axes
    assert "perp, published" in lines(left)
    assert "perp, published" not in lines(right)


def test_no_published_numbers_are_as_none():
    figure = pk.plot_curves(rows(), published=published()[:0])
    pd.testing.assert_frame_equal(figure.table, rows())


@pytest.mark.parametrize("column", ["sparsity", "perplexity", "label"])
def test_published_numbers_need_their_columns(column):
    with pytest.raises(ValueError, match=f"no column '{column}'"):
        pk.plot_curves(rows(), published=published().drop(columns=column))


def test_no_value_to_draw():
    with pytest.raises(ValueError, match="y names no column"):
        pk.plot_curves(rows(), y=())


def test_a_column_of_words_has_no_curve():
    with pytest.raises(ValueError, match="'model' holds no numbers"):
        pk.plot_curves(rows(model="tiny-opt"), y="model")
