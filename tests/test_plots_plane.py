"""The plane through three models."""

import numpy as np
import pandas as pd
import pytest

from perpkit.interactive.plots.plane import plot_plane


def plane(loss=lambda x, y: (x - 1) ** 2 + (y - 1) ** 2 + 0.5) -> pd.DataFrame:
    """A bowl over the triangle (0, 0), (2, 0), (1, 3)."""
    grid = [(x, y, loss(x, y), None) for y in np.linspace(-1, 4, 6) for x in np.linspace(-1, 3, 5)]
    corners = [(x, y, loss(x, y), name) for name, x, y in [("a", 0, 0), ("b", 2, 0), ("c", 1, 3)]]
    return pd.DataFrame(grid + corners, columns=["x", "y", "loss", "model"])


def figure_contours(figure):
    return next(each for each in figure.axes[0].collections if hasattr(each, "levels") and each.filled)


def markers(figure) -> dict:
    return {line.get_marker(): line for line in figure.axes[0].get_lines()}


def test_the_three_models_and_their_mean_are_where_they_are():
    figure = plot_plane(plane())
    circles = [
        line.get_xydata()[0].tolist() for line in figure.axes[0].get_lines() if line.get_marker() == "o"
    ]
    assert circles == [[0, 0], [2, 0], [1, 3]]
    assert markers(figure)["D"].get_xydata().tolist() == [[1, 1]]
    assert [text.get_text() for text in figure.axes[0].texts] == ["A 2.5", "B 2.5", "C 4.5", "mean"]


def test_the_contours_are_those_of_the_grid():
    contours = figure_contours(plot_plane(plane()))
    assert contours.levels[0] == 0.5
    assert contours.levels[-1] == 13.5
    # The first band of the bowl lies around its lowest point.
    x, y = contours.get_paths()[0].vertices.T
    assert abs(x.mean() - 1) < 0.3
    assert abs(y.mean() - 1) < 0.3


def test_contours_are_denser_below_where_the_loss_explodes():
    steps = np.diff(figure_contours(plot_plane(plane(lambda x, y: np.exp(x + 2 * y)))).levels)
    assert (np.diff(steps) > 0).all()
    even = np.diff(figure_contours(plot_plane(plane(lambda x, y: x + y))).levels)
    assert np.allclose(even, even[0])


def test_losses_that_are_not_finite_are_left_out_and_said():
    table = plane()
    table.loc[[0, 7], "loss"] = [np.nan, np.inf]
    figure = plot_plane(table)
    assert np.isfinite(figure_contours(figure).levels).all()
    assert figure.get_supxlabel().endswith("2 of 33 points are not finite and left white")


@pytest.mark.parametrize("loss", [0.0, -2.0, 1e-9, 3e5])
def test_a_flat_plane_is_drawn(loss):
    assert plot_plane(plane(lambda x, y: loss)).png()


def test_levels_that_lie_close_read_differently():
    figure = plot_plane(plane(lambda x, y: 5 + 1e-5 * (x + y)))
    figure.png()
    read = [label.get_text() for label in figure.axes[1].get_yticklabels()]
    assert len(set(read)) == len(read) > 3


def test_bad_planes_are_errors():
    with pytest.raises(ValueError, match="no column 'model'"):
        plot_plane(plane().drop(columns="model"))
    with pytest.raises(ValueError, match="the models 'a', 'b'; those of a plane"):
        plot_plane(plane()[:-1])
    with pytest.raises(ValueError, match="the 29 points without a model are no full grid"):
        plot_plane(plane()[1:])
    with pytest.raises(ValueError, match="no value of 'loss' is finite"):
        plot_plane(plane(lambda x, y: np.nan))
    broken = plane()
    broken.loc[broken["model"].isna(), "loss"] = np.inf
    with pytest.raises(ValueError, match="no value of 'loss' is finite"):
        plot_plane(broken)
    row = plane()
    with pytest.raises(ValueError, match="the 5 points without a model are no full grid"):
        plot_plane(row[(row["y"] == 4) | row["model"].notna()])
