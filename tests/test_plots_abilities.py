"""Abilities: accuracy on question sets, method beside method."""

import numpy as np
import pandas as pd
import pytest

from perpkit.interactive.plots.abilities import plot_abilities


def rows(**columns) -> pd.DataFrame:
    made = pd.DataFrame(
        {
            "task": ["facts", "arc_easy"] * 2,
            "method": ["dense"] * 2 + ["pruned"] * 2,
            "accuracy": [0.98, 0.8, 0.6, 0.02],
            "stderr": [0.05, 0.02, 0.03, 0.05],
            "chance": [0.5, 0.25] * 2,
            "n": 200,
        }
    )
    return made.assign(**columns)


def bars(figure) -> list:
    return [each for each in figure.axes[0].containers if hasattr(each, "patches")]


def spread(container) -> list:
    return [segment[:, 1].tolist() for segment in container.errorbar.lines[2][0].get_segments()]


def test_a_bar_for_each_task_and_method():
    figure = plot_abilities(rows())
    assert [[bar.get_height() for bar in group] for group in bars(figure)] == [[0.98, 0.8], [0.6, 0.02]]
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["facts", "arc\neasy"]
    centres = [group[1].get_x() + group[1].get_width() / 2 for group in bars(figure)]
    assert centres == pytest.approx([0.8, 1.2])


def test_lines_are_one_standard_error_within_none_and_all():
    first, second = bars(plot_abilities(rows()))
    assert np.allclose(spread(first), [[0.93, 1.0], [0.78, 0.82]])
    assert np.allclose(spread(second), [[0.57, 0.63], [0.0, 0.07]])


def test_the_caption_says_how_many_questions_and_what_the_lines_are():
    said = "200 questions in each set; lines: one standard error of the accuracy to each side"
    assert plot_abilities(rows()).get_supxlabel() == said
    some = plot_abilities(rows(n=[100, 200, 100, 200]).drop(columns="stderr"))
    assert some.get_supxlabel() == "100 to 200 questions in each set"


def test_guessing_is_a_line_across_each_task_and_last_in_the_legend():
    figure = plot_abilities(rows())
    black = [line for line in figure.axes[0].get_lines() if line.get_linestyle() == "--"]
    assert [set(line.get_ydata()) for line in black] == [{0.5}, {0.25}]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["dense", "pruned", "guessing"]


def test_what_is_unknown_is_not_drawn():
    figure = plot_abilities(rows().drop(columns=["stderr", "chance", "n"]))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["dense", "pruned"]
    assert all(group.errorbar is None for group in bars(figure))
    assert figure.get_supxlabel() == ""


def test_over_seeds_bars_are_means_and_lines_reach_the_lowest_and_highest():
    seeds = pd.concat([rows(seed=0), rows(seed=1, accuracy=[0.9, 0.8, 0.7, 0.4])])
    figure = plot_abilities(seeds)
    assert np.allclose(spread(bars(figure)[1]), [[0.6, 0.7], [0.02, 0.4]])
    assert bars(figure)[1][0].get_height() == pytest.approx(0.65)
    assert figure.get_supxlabel().endswith("mean of 2 seeds, lines from lowest to highest")


def test_a_method_need_not_have_answered_every_task():
    figure = plot_abilities(rows()[:3])
    assert np.array_equal([bar.get_height() for bar in bars(figure)[1]], [0.6, np.nan], equal_nan=True)
    assert figure.png()


def test_an_accuracy_that_is_not_finite_is_said():
    figure = plot_abilities(rows(accuracy=[0.98, 0.8, 0.6, np.nan]))
    assert figure.get_supxlabel().endswith("1 of 4 rows are not finite and not shown")


def test_bad_tables_are_errors():
    with pytest.raises(ValueError, match="no rows"):
        plot_abilities(rows()[:0])
    with pytest.raises(ValueError, match="no column 'method'"):
        plot_abilities(rows().drop(columns="method"))
    with pytest.raises(ValueError, match="several rows have task 'facts', method 'dense'"):
        plot_abilities(pd.concat([rows(), rows()]))
