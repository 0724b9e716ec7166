"""Plots: every number in the picture can be worked out by hand from the table."""

import dataclasses
import subprocess
import sys
import threading

import numpy as np
import pandas as pd
import pytest

import perpkit as pk
from perpkit.interactive.plots.beside import plot_beside
from perpkit.interactive.plots.curves import INPUTS
from perpkit.interactive.plots.figure import COLOURS


def table(**columns) -> pd.DataFrame:
    """Two retrainings at two sparsities; "biases" with three seeds, "none" with one."""
    rows = [("none", 0.5, 0, 4.0), ("none", 0.7, 0, 40.0)]
    rows += [("biases", 0.5, seed, value) for seed, value in enumerate([2.0, 3.0, 4.0])]
    rows += [("biases", 0.7, seed, value) for seed, value in enumerate([5.0, 6.0, 10.0])]
    made = pd.DataFrame(rows, columns=["retrain", "sparsity", "seed", "perplexity"])
    return made.assign(**columns)


def lines(figure) -> dict:
    """Label -> line, of what the legend names."""
    return {line.get_label(): line for line in figure.axes[0].get_lines()}


def words(figure) -> str:
    """What is written under the axes."""
    return figure.get_supxlabel()


def test_a_curve_is_the_mean_over_seeds():
    drawn = lines(pk.plot_curves(table()))
    assert list(drawn) == ["none", "biases"]
    assert drawn["none"].get_xydata().tolist() == [[0.5, 4.0], [0.7, 40.0]]
    assert drawn["biases"].get_xydata().tolist() == [[0.5, 3.0], [0.7, 7.0]]


def test_the_band_goes_from_lowest_to_highest():
    band = pk.plot_curves(table()).axes[0].collections[1].get_paths()[0].vertices
    assert {tuple(corner) for corner in band} == {(0.5, 2.0), (0.5, 4.0), (0.7, 5.0), (0.7, 10.0)}


@pytest.mark.parametrize(
    ("kept", "said"),
    [
        ([True] * 8, "mean of 3 seeds, band from lowest to highest; points without a band: one run"),
        ([False, False, *[True] * 6], "mean of 3 seeds, band from lowest to highest"),
        ([True, True, *[True, False, False] * 2], "one seed, no band"),
        (
            [True] * 7 + [False],
            "mean of 2 to 3 seeds, band from lowest to highest; points without a band: one run",
        ),
    ],
)
def test_the_caption_says_what_the_band_is(kept, said):
    assert words(pk.plot_curves(table()[kept])).splitlines()[-1] == said


def test_the_caption_says_what_was_measured():
    figure = pk.plot_curves(table(model="tiny-opt", criterion="magnitude", protocol="story world, test"))
    assert words(figure).splitlines()[0] == "tiny-opt · magnitude · story world, test"


def test_reference_lines_are_labelled_with_their_values():
    drawn = lines(pk.plot_curves(table(dense_perplexity=2.345, floor=1.5)))
    assert set(drawn["dense model (2.35)"].get_ydata()) == {2.345}
    assert set(drawn["best possible (1.50)"].get_ydata()) == {1.5}


def test_no_reference_line_where_there_is_no_one_value():
    several = [2.0] * 4 + [3.0] * 4
    assert list(lines(pk.plot_curves(table(dense_perplexity=several, floor=None)))) == ["none", "biases"]
    assert list(lines(pk.plot_curves(table(accuracy=0.5, floor=1.5), y="accuracy"))) == ["none", "biases"]


def test_a_retraining_is_labelled_with_the_share_it_trains():
    shares = [0.0] * 2 + [0.00972] * 6
    assert list(lines(pk.plot_curves(table(trainable_share=shares)))) == ["none", "biases (0.972 %)"]


@pytest.mark.parametrize(
    ("values", "scale"),
    [([2.0, 8.0], "linear"), ([2.0, 8.1], "log"), ([0.0, 100.0], "linear"), ([-1.0, 9.0], "linear")],
)
def test_the_axis_is_logarithmic_over_a_factor_of_four(values, scale):
    few = pd.DataFrame({"sparsity": [0.5, 0.7], "perplexity": values, "retrain": "none"})
    assert pk.plot_curves(few).axes[0].get_yscale() == scale


@pytest.mark.parametrize(
    ("highest", "labels"),
    [(45.0, ["2", "3", "5", "10", "20", "30", "50"]), (1e5, ["1", "10", "100", "1000", "10000", "100000"])],
)
def test_ticks_of_a_logarithmic_axis_are_plain_numbers(highest, labels):
    few = pd.DataFrame({"sparsity": [0.5, 0.7], "perplexity": [1.9, highest], "retrain": "none"})
    figure = pk.plot_curves(few)
    figure.png()
    axis = figure.axes[0].yaxis
    ticks = zip(axis.get_ticklocs(minor=True), axis.get_ticklabels(which="minor"), strict=True)
    ticks = [*ticks, *zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=True)]
    low, high = figure.axes[0].get_ylim()
    shown = [label.get_text() for place, label in sorted(ticks, key=lambda t: t[0]) if low <= place <= high]
    assert [label for label in shown if label] == [label for label in labels if low <= float(label) <= high]


def test_what_is_not_finite_is_left_out_and_said():
    figure = pk.plot_curves(table(perplexity=[4.0, np.inf, 2.0, 3.0, 4.0, 5.0, np.nan, 10.0]))
    assert lines(figure)["none"].get_xydata().tolist() == [[0.5, 4.0]]
    assert words(figure).endswith("2 of 8 rows are not finite and not shown")
    with pytest.raises(ValueError, match="no value of 'perplexity' is finite"):
        pk.plot_curves(table(perplexity=np.inf))


def test_a_category_keeps_its_colour_when_others_are_missing():
    names = ["none", "norms", "biases"]
    results = table()
    results["retrain"] = pd.Categorical(results["retrain"], categories=names)
    drawn = lines(pk.plot_curves(results))
    assert [drawn[name].get_color() for name in ("none", "biases")] == [COLOURS[0], COLOURS[2]]


def test_no_two_of_many_curves_look_the_same():
    many = pd.DataFrame({"sparsity": 0.5, "perplexity": 2.0, "retrain": [f"r{i}" for i in range(21)]})
    drawn = pk.plot_curves(many).axes[0].get_lines()
    assert len({(line.get_color(), line.get_marker(), line.get_linestyle()) for line in drawn}) == 21


def test_the_inputs_are_those_of_an_experiment():
    assert {*INPUTS, "seed"} == {field.name for field in dataclasses.fields(pk.Experiment)}


def test_a_curve_never_mixes_experiments():
    mixed = table(criterion=["magnitude"] * 7 + ["random"])
    said = r"'biases' has 2 different values of 'criterion' at sparsity 0.7; .* hue='criterion'"
    with pytest.raises(ValueError, match=said):
        pk.plot_curves(mixed)
    with pytest.raises(ValueError, match="different values of 'retrain'"):
        pk.plot_curves(mixed, hue="criterion")


def test_a_table_that_cannot_be_plotted_is_an_error():
    with pytest.raises(ValueError, match="no rows"):
        pk.plot_curves(pd.DataFrame())
    with pytest.raises(ValueError, match="no column 'loss'; it has retrain, sparsity, seed, perplexity"):
        pk.plot_curves(table(), y="loss")


def test_the_callers_table_is_left_alone():
    results = table()
    figure = pk.plot_curves(results)
    pd.testing.assert_frame_equal(results, table())
    results.loc[0, "perplexity"] = 0
    pd.testing.assert_frame_equal(figure.table, table())


def test_a_figure_is_saved_with_its_table(tmp_path):
    files = pk.save_figure(pk.plot_curves(table()), tmp_path / "new folder" / "curve.v2")
    assert [file.name for file in files] == [f"curve.v2{end}" for end in (".pdf", ".svg", ".png", ".csv")]
    pdf, svg, png, csv = files
    assert pdf.read_bytes().startswith(b"%PDF")
    assert "<svg" in svg.read_text()
    assert png.read_bytes().startswith(b"\x89PNG")
    pd.testing.assert_frame_equal(pd.read_csv(csv), table())


def test_the_same_table_gives_the_same_files(tmp_path):
    first = pk.save_figure(pk.plot_curves(table()), tmp_path / "a")
    again = pk.save_figure(pk.plot_curves(table()), tmp_path / "b")
    assert [file.read_bytes() for file in first] == [file.read_bytes() for file in again]


def test_a_figure_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write the figure"):
        pk.save_figure(pk.plot_curves(table()), tmp_path / "file" / "curve")


@pytest.mark.parametrize(
    ("figure", "name", "endings", "said"),
    [
        (None, "curve", (".png",), "want a figure of perpkit, got a NoneType"),
        (pk.Experiment(), "curve", (".png",), "got a Experiment"),
        ("curve", "", (".png",), r"the name is '.'; write it without an ending, such as 'figures/curve'"),
        ("curve", "curve.png", (".png",), r"the name is 'curve\.png'; write it without an ending"),
        ("curve", "curve", "png", "unknown ending 'png'; figures are written as .pdf, .svg"),
    ],
)
def test_what_is_no_figure_or_no_name_is_an_error(tmp_path, monkeypatch, figure, name, endings, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=said):
        pk.save_figure(pk.plot_curves(table()) if figure == "curve" else figure, name, endings)
    assert not [*tmp_path.iterdir()]


def test_one_ending_is_enough(tmp_path):
    assert pk.save_figure(pk.plot_curves(table()), tmp_path / "curve", ".csv") == [tmp_path / "curve.csv"]


def test_a_notebook_shows_it_finer_than_its_size():
    picture, size = pk.plot_curves(table())._repr_png_()
    width = int.from_bytes(picture[16:20], "big")
    assert size == {"width": 720, "height": 440}
    assert width == pytest.approx(1.6 * size["width"], abs=1)


def test_drawing_in_many_threads_gives_the_same_picture():
    pictures = []
    threads = [
        threading.Thread(target=lambda: pictures.append(pk.plot_curves(table()).png())) for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(pictures) == 6
    assert set(pictures) == {pk.plot_curves(table()).png()}


def test_pyplot_is_never_imported():
    code = (
        "import sys, pandas, perpkit as pk; "
        "table = pandas.DataFrame({'sparsity': [0.5], 'perplexity': [2.0], 'retrain': ['none']}); "
        "pk.plot_curves(table).png(); "
        "sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_whole_numbers_have_whole_ticks():
    table = pd.DataFrame({"block": [1, 2, 3], "error": [0.1, 0.2, 0.3], "retrain": "none"})
    ticks = pk.plot_curves(table, x="block", y="error").axes[0].get_xticks()
    assert [tick for tick in ticks if tick != round(tick)] == []


@pytest.mark.parametrize("hue", ["pattern", "allocation"])
def test_rows_without_a_name_are_drawn_under_a_word(hue):
    word = "unstructured" if hue == "pattern" else "none"
    rows = pd.DataFrame({"sparsity": [0.5, 0.6, 0.5], "perplexity": [2.0, 3.0, 4.0]})
    rows["trainable_share"], rows["layer"] = [0.1, 0.1, 0.2], ["a", "b", "a"]
    rows[hue] = [None, None, "other"]
    curves = pk.plot_curves(rows, hue=hue)
    assert [text.get_text() for text in curves.legends[0].get_texts()] == [word, "other"]
    assert curves.table[hue].tolist() == [word, word, "other"]
    bars = pk.plot_layers(rows, y="perplexity", hue=hue)
    assert [len(each) for each in bars.axes[0].containers if hasattr(each, "patches")] == [2, 2]
    points = pk.plot_tradeoff(rows.drop(index=1), hue=hue)
    assert [text.get_text() for text in points.legends[0].get_texts()] == [word, "other"]
    beside = plot_beside(rows.drop(index=1), x=hue, y="perplexity")
    assert [label.get_text() for label in beside.axes[0].get_xticklabels()] == [word, "other"]
    alone = rows[rows[hue].isna()]
    assert [text.get_text() for text in pk.plot_curves(alone, hue=hue).legends[0].get_texts()] == [word]
