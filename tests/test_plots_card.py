"""What holds for every plot: a white card as wide as a notebook, nothing hidden, the same files each time."""

import itertools

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib import style
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

import perpkit as pk
from perpkit.interactive.plots.abilities import plot_abilities
from perpkit.interactive.plots.adapter import plot_adapter
from perpkit.interactive.plots.beside import plot_beside
from perpkit.interactive.plots.card import check_table, figure_of, plain
from perpkit.interactive.plots.features import plot_filters, plot_maps
from perpkit.interactive.plots.figure import on_white
from perpkit.interactive.plots.layers import plot_heatmap, plot_layers
from perpkit.interactive.plots.mask_view import Frame, MaskView
from perpkit.interactive.plots.masks import plot_mask
from perpkit.interactive.plots.plane import plot_plane
from perpkit.interactive.plots.texts import plot_texts
from perpkit.interactive.plots.tradeoff import plot_tradeoff
from perpkit.interactive.plots.weights import plot_weights

METHODS = ["none", "biases", "norms", "biases+norms+mask_lora", "full"]
TASKS = ["boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa"]


def sweep() -> pd.DataFrame:
    rows = [
        (method, s, seed, 2 + 90 * s**4 / (i + 1) + 0.1 * seed, 0.9 - s / (i + 2), i / 400, 3.0 * i + 0.1)
        for i, method in enumerate(METHODS)
        for s in (0.3, 0.5, 0.7)
        for seed in range(3)
    ]
    names = ["retrain", "sparsity", "seed", "perplexity", "accuracy", "trainable_share", "seconds"]
    table = pd.DataFrame(rows, columns=names)
    protocol = "storyworld (seed 0), test split, 160 windows of 128 tokens"
    return table.assign(dense_perplexity=1.96, floor=1.77, criterion="magnitude", protocol=protocol)


def layers() -> pd.DataFrame:
    kinds = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.out_proj", "mlp.gate_proj", "mlp.down_proj"]
    names = [f"model.layers.{block}.{kind}.weight" for block in range(12) for kind in kinds]
    return pd.DataFrame({"layer": names, "sparsity": np.linspace(0.3, 0.9, len(names))})


def abilities() -> pd.DataFrame:
    rows = [(task, method, 0.3 + i / 9, 0.02, 0.5) for task in TASKS for i, method in enumerate(METHODS)]
    return pd.DataFrame(rows, columns=["task", "method", "accuracy", "stderr", "chance"])


def plane() -> pd.DataFrame:
    grid = [(x, y, x * x + y + 2.345678, None) for y in (0, 1, 2) for x in (0, 1, 2)]
    corners = [(0.5, 0.5, 2.4, "a"), (1.5, 0.5, 3.4, "b"), (1.0, 1.5, 3.9, "c")]
    return pd.DataFrame(grid + corners, columns=["x", "y", "loss", "model"])


def matrix(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def published() -> pd.DataFrame:
    return pd.DataFrame({"sparsity": [0.3, 0.7], "perplexity": [3.0, 70.0], "label": "none"})


PLOTS = {
    "curves": lambda: pk.plot_curves(sweep(), published=published()),
    "panels": lambda: pk.plot_curves(sweep(), y=("perplexity", "accuracy")),
    "tradeoff": lambda: plot_tradeoff(sweep()),
    "seconds": lambda: plot_tradeoff(sweep(), x="seconds"),
    "layers": lambda: plot_layers(layers()),
    "grouped layers": lambda: plot_layers(
        pd.concat([layers().assign(allocation=name) for name in ("uniform", "global", "owl")]),
        hue="allocation",
    ),
    "heat map": lambda: plot_heatmap(layers()),
    "mask": lambda: plot_mask(matrix(200, 60), matrix(200, 60) > 0, title="layers.0.fc1", threshold=0.1),
    "masks": lambda: plot_mask(
        {name: (matrix(64, 96), matrix(64, 96) > 0) for name in ("magnitude", "wanda")}, nm=(2, 4)
    ),
    "filters": lambda: plot_filters(matrix(24 * 16, 9).view(24, 16, 3, 3)),
    "colour filters": lambda: plot_filters(matrix(4 * 3, 25).view(4, 3, 5, 5)),
    "maps": lambda: plot_maps(
        {"picture": matrix(24, 8).view(3, 8, 8).sigmoid(), **{name: matrix(8, 8) for name in METHODS[:3]}}
    ),
    "abilities": lambda: plot_abilities(abilities()),
    "weights": lambda: plot_weights({"dense": matrix(50, 60), "pruned": matrix(50, 60).relu()}),
    "plane": lambda: plot_plane(plane()),
}


@pytest.fixture(scope="module", params=PLOTS)
def figure(request):
    """Each plot, made once."""
    return PLOTS[request.param]()


def boxes(figure) -> list:
    """Every word that is seen, with the room it takes in pixels."""
    # Saving at another resolution leaves the words where they stood there.
    FigureCanvasAgg(figure).draw()
    words = {text for text in figure.findobj(Text) if text.get_text().strip() and text.get_visible()}
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
                # Ticks beyond the ends of an axis have words that are never drawn.
                if not axes.axison or not low <= tick.get_loc() <= high:
                    words -= {tick.label1, tick.label2}
    return [(text.get_text(), text.get_window_extent(), text.get_rotation()) for text in words]


def test_it_is_as_wide_as_a_notebook_and_white_in_every_theme(figure):
    width, height = figure.get_size_inches()
    assert width == 7.2
    assert 1.5 < height <= 11
    assert figure.get_facecolor() == (1, 1, 1, 1)


def test_no_words_are_cut_off(figure):
    found = boxes(figure)
    assert len(found) > 3
    for text, box, _ in found:
        assert box.x0 >= -1, text
        assert box.y0 >= -1, text
        assert box.x1 <= figure.bbox.width + 1, text
        assert box.y1 <= figure.bbox.height + 1, text


def test_no_words_lie_on_others(figure):
    for (one, a, turned), (other, b, _) in itertools.combinations(boxes(figure), 2):
        # Slanted words have boxes wider than they are.
        if turned % 90:
            continue
        across = min(a.x1, b.x1) - max(a.x0, b.x0)
        up = min(a.y1, b.y1) - max(a.y0, b.y0)
        assert min(across, up) <= 1, f"{one!r} lies on {other!r}"


def test_it_carries_the_table_that_it_saves(figure, tmp_path):
    [file] = pk.save_figure(figure, tmp_path / "plot", [".csv"])
    back = pd.read_csv(file)
    assert list(back.columns) == list(figure.table.columns)
    assert len(back) == len(figure.table) > 0


def test_the_same_input_gives_the_same_picture():
    for name in ("tradeoff", "mask"):
        assert PLOTS[name]().png(50) == PLOTS[name]().png(50)


def mask_view() -> MaskView:
    return MaskView(matrix(8, 8), "score", names=("magnitude", "wanda"))


FRAME = Frame(matrix(8, 8) > 0, matrix(8, 8) > 1, torch.tensor([0.3]), "half of it")
WITHOUT_CARD = {
    "adapter": lambda: plot_adapter({"W": matrix(4, 4)}, [1.0, 0.5], steps=2),
    "beside": lambda: plot_beside(sweep().query("sparsity == 0.5"), x="trainable_share", y="perplexity"),
    "mask view": lambda: mask_view().figure(FRAME),
    "texts": lambda: plot_texts(pd.DataFrame({"version": ["dense"], "text": ["once"]}), prompt="Say"),
}


@pytest.mark.parametrize("plot", (PLOTS | WITHOUT_CARD).values(), ids=PLOTS | WITHOUT_CARD)
def test_a_dark_style_changes_nothing(plot):
    # Its white words would stand on white, black curves on black.
    white = plot().png(50)
    with style.context("dark_background"):
        assert plot().png(50) == white
        assert matplotlib.rcParams["text.color"] == "white"


def test_a_style_that_a_cell_sets_while_something_is_drawn_stays():
    with style.context("default"):
        with on_white():
            style.use("dark_background")
        assert matplotlib.rcParams["axes.facecolor"] == "black"
        assert matplotlib.rcParams["text.color"] == "white"


def test_a_dark_style_changes_nothing_of_the_mask_that_is_dragged():
    white = mask_view().png(FRAME)
    with style.context("dark_background"):
        assert mask_view().png(FRAME) == white


@pytest.mark.parametrize(
    ("plot", "table"),
    [
        (plot_tradeoff, sweep),
        (plot_layers, layers),
        (plot_heatmap, layers),
        (plot_abilities, abilities),
        (plot_plane, plane),
    ],
)
def test_the_callers_table_is_left_alone(plot, table):
    given = table()
    figure = plot(given)
    pd.testing.assert_frame_equal(given, table())
    before = figure.table.copy()
    given.iloc[:-1, 0] = given.iloc[-1, 0]
    pd.testing.assert_frame_equal(figure.table, before)


@pytest.mark.parametrize("name", [r"$\frac$", "_<b>"])
def test_names_from_people_are_drawn_as_they_are(name):
    curves = pk.plot_curves(sweep().replace({"retrain": {"none": name}}).assign(criterion=name))
    ability = plot_abilities(abilities().replace({"method": {"none": name}}))
    others = [
        plot_layers(layers().assign(layer=[f"{name}{i}" for i in range(60)]), hue=None),
        plot_mask({name: (matrix(4, 4), None)}),
        plot_maps({name: matrix(4, 4)}),
        plot_weights({name: matrix(4, 4)}),
    ]
    assert all(figure.png(50) for figure in (curves, ability, *others))
    for figure in (curves, ability):
        assert plain(name) in [text.get_text() for text in figure.legends[0].get_texts()]


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        ("sparsity", 0.123456, "12.35 %"),
        ("accuracy_facts", 1.0, "100 %"),
        ("peak_memory", 999e6, "999 MB"),
        ("peak_memory", 1.234567e9, "1.235 GB"),
        ("perplexity", 1234567.0, "1.23457e+06"),
    ],
)
def test_values_are_written_in_their_units(column, value, said):
    assert figure_of(column, value) == said


def test_a_column_that_is_no_text_is_named_too():
    with pytest.raises(ValueError, match="no column 'x'; it has 0, 1"):
        check_table(pd.DataFrame([[1, 2]]), ["x"])
