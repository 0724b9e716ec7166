"""What all plots share: a figure that carries its table, colours that everybody can tell apart, files."""

import contextlib
import io
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imsave

# Okabe and Ito's colours, told apart by people with any colour vision; markers and dashes for print in grey.
COLOURS = ["#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X"]
DASHES: list = [
    "-",
    (0, (6, 2)),
    (0, (2, 1.5)),
    (0, (6, 2, 1.5, 2)),
    (0, (9, 3)),
    (0, (1, 1)),
    (0, (4, 1, 1, 1)),
]
GREY = "#666666"
ENDINGS = (".pdf", ".svg", ".png", ".csv")
# Matplotlib promises nothing for drawing in two threads at once, and explorers draw beside the cells.
DRAWING = threading.RLock()
# Every colour was chosen against white, and figures are as wide as they are laid out, whatever is set.
_OURS = {name: value for name, value in matplotlib.rcParamsDefault.items() if "color" in name} | {
    name: matplotlib.rcParamsDefault[name]
    for name in ("axes.prop_cycle", "image.origin", "savefig.bbox", "savefig.transparent")
}
# Drawn finer than it is shown, for projectors and high-resolution screens.
DPI = 160
# A tenth larger than with the usual 6, in half the time: explorers send many.
_COMPRESSED = {"compress_level": 3}
# No date inside, so that the same figure is the same file.
_WRITTEN: dict[str, dict] = {
    ".pdf": {"metadata": {"CreationDate": None}},
    ".svg": {"metadata": {"Date": None}},
    ".png": {"dpi": 200},
}


@contextlib.contextmanager
def on_white() -> Iterator[None]:
    """Draw dark on white, also where a style such as dark_background is set; for one thread at a time.

    >>> with matplotlib.rc_context({"text.color": "white"}), on_white():
    ...     matplotlib.rcParams["text.color"]
    'black'
    """
    with DRAWING:
        settings = matplotlib.rcParams
        before = {name: settings[name] for name in _OURS}
        settings.update(_OURS)
        ours = {name: settings[name] for name in _OURS}
        try:
            yield
        finally:
            # Explorers draw beside the cells: what one has set meanwhile stays. rc_context would undo it.
            settings.update({name: before[name] for name in _OURS if settings[name] == ours[name]})


class DataFigure(Figure):
    """A figure that carries the table it was drawn from as `table` and shows itself in a notebook."""

    table: pd.DataFrame

    def savefig(self, *args, **kwargs) -> None:
        with on_white():
            super().savefig(*args, **kwargs)

    def png(self, dpi: float = DPI) -> bytes:
        """The picture as a PNG file's bytes."""
        picture = io.BytesIO()
        self.savefig(picture, format="png", dpi=dpi, pil_kwargs=_COMPRESSED)
        return picture.getvalue()

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        width, height = (round(100 * inches) for inches in self.get_size_inches())
        return self.png(), {"width": width, "height": height}


class Backdrop:
    """A drawn figure into which a few artists, those above all others, are drawn again and again.

    >>> figure = DataFigure()
    >>> axes = figure.subplots()
    >>> backdrop = Backdrop(figure)
    >>> line = axes.axhline(0.5, zorder=9)
    >>> backdrop.png([line]) == figure.png()
    True
    """

    def __init__(self, figure: DataFigure, dpi: float = DPI):
        figure.set_dpi(dpi)
        self._canvas = FigureCanvasAgg(figure)
        with DRAWING:
            self._canvas.draw()
        self._drawn = self._canvas.copy_from_bbox(figure.bbox)

    def pixels(self, artists: Iterable[Artist]) -> np.ndarray:
        """The picture with artists of the figure, `[height, width, 4]` in bytes."""
        with DRAWING:
            self._canvas.restore_region(self._drawn)
            for artist in artists:
                artist.draw(self._canvas.get_renderer())
            return np.array(self._canvas.buffer_rgba())

    def png(self, artists: Iterable[Artist]) -> bytes:
        """The same as a PNG file's bytes, those of the figure's own."""
        picture = io.BytesIO()
        dpi = self._canvas.figure.dpi
        imsave(picture, self.pixels(artists), format="png", origin="upper", dpi=dpi, pil_kwargs=_COMPRESSED)
        return picture.getvalue()


def save_figure(figure: DataFigure, path: str | Path, endings: Sequence[str] = ENDINGS) -> list[Path]:
    """Write a figure as PDF, SVG and PNG and the table behind it as CSV; returns the files.

    `path` is the name without an ending; its folder is created. `endings` may name fewer. The same figure
    gives the same files.

    Raises ValueError for what is no figure, a name that has an ending, an unknown ending and when the files
    cannot be written.

    >>> import tempfile
    >>> figure = DataFigure()
    >>> figure.table = pd.DataFrame({"sparsity": [0.5]})
    >>> files = save_figure(figure, Path(tempfile.mkdtemp()) / "curve")
    >>> [file.suffix for file in files]
    ['.pdf', '.svg', '.png', '.csv']
    """
    if not isinstance(figure, DataFigure):
        hint = "; give its figure()" if callable(getattr(figure, "figure", None)) else ""
        raise ValueError(f"want a figure of perpkit, got a {type(figure).__name__}{hint}")
    path = Path(path)
    if not path.name or path.suffix in ENDINGS:
        raise ValueError(f"the name is {str(path)!r}; write it without an ending, such as 'figures/curve'")
    endings = [endings] if isinstance(endings, str) else endings
    if unknown := set(endings) - set(ENDINGS):
        raise ValueError(f"unknown ending {min(unknown)!r}; figures are written as {', '.join(ENDINGS)}")
    files = [path.with_name(path.name + ending) for ending in endings]
    # No random names inside; letters that journals and drawing programs can edit.
    fixed: dict = {"svg.hashsalt": "perpkit", "pdf.fonttype": 42}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with DRAWING, matplotlib.rc_context(fixed):
            for ending, file in zip(endings, files, strict=True):
                if ending == ".csv":
                    figure.table.to_csv(file, index=False)
                else:
                    figure.savefig(file, **_WRITTEN[ending])
    except OSError as error:
        raise ValueError(f"cannot write the figure {str(path)!r}: {error}") from error
    return files
