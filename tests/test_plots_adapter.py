"""A matrix, its adapter and their sum above the loss."""

import pytest
import torch

from perpkit.interactive.plots.adapter import CORNER, plot_adapter


def test_zeros_are_white_and_larger_entries_darker():
    matrix = torch.tensor([[0.0, 1.0], [-2.0, 0.5]])
    pixels = plot_adapter({"W": matrix}, [], steps=3).axes[0].images[0].get_array().sum(2)
    assert pixels[0, 0] == 3
    assert pixels[1, 0] < pixels[0, 1] < pixels[1, 1] < 3


def test_the_zeros_of_the_whole_matrix_are_said_and_a_corner_drawn():
    matrix = torch.ones(100, 40)
    matrix[50:] = 0
    figure = plot_adapter({"W": matrix, "BA": 0 * matrix}, [1.0], steps=3)
    first, second, loss = figure.axes
    assert first.get_xlabel() == "50 % zeros\nsizes up to 1"
    assert second.get_xlabel() == "all zeros"
    assert first.images[0].get_array().shape == (CORNER, CORNER, 3)
    assert loss.get_xlim() == (0, 3)
    assert "first 32 rows and 32 columns of 100 × 40" in figure.texts[0].get_text()


def test_the_table_holds_the_entries_and_the_losses():
    matrix = torch.tensor([[0.0, 1.0], [-2.0, 0.5]])
    table = plot_adapter({"W": matrix, "BA": 2 * matrix}, [3.0, 2.5], steps=2).table
    assert table[table.part == "BA"][["row", "column", "value"]].to_numpy().tolist() == [
        [0, 0, 0],
        [0, 1, 2],
        [1, 0, -4],
        [1, 1, 1],
    ]
    assert table[table.part == "loss"][["step", "value"]].to_numpy().tolist() == [[1, 3], [2, 2.5]]


def test_drawn_twice_it_is_the_same_picture():
    figure = plot_adapter({"W": torch.eye(40), "BA": torch.ones(40, 40)}, [2.0, 1.0], steps=5)
    assert figure.png() == figure.png()


def test_what_is_no_matrix_is_refused():
    with pytest.raises(ValueError, match=r"'b' is \[2\]; a matrix is"):
        plot_adapter({"b": torch.zeros(2)}, [], steps=1)
    with pytest.raises(ValueError, match="no matrix to draw"):
        plot_adapter({}, [], steps=1)
