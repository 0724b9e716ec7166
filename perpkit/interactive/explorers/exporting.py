"""Writing a figure for somebody who sits at a browser."""

import base64
import html
from pathlib import Path

from ..plots.figure import DataFigure, save_figure

KINDS = {".pdf": "application/pdf", ".svg": "image/svg+xml", ".png": "image/png", ".csv": "text/csv"}


def written(figure: DataFigure, path: Path, ending: str) -> str:
    """Write a figure and say where, in HTML, with a link that has the file in itself.

    For the kernel may run on another machine than the browser.

    Raises ValueError as `save_figure` does.

    >>> import tempfile
    >>> import pandas as pd
    >>> figure = DataFigure()
    >>> figure.table = pd.DataFrame({"loss": [1.5]})
    >>> written(figure, Path(tempfile.mkdtemp()) / "curve", ".csv")[-26:]
    'bG9zcwoxLjUK">download</a>'
    """
    [file] = save_figure(figure, path, [ending])
    data = base64.b64encode(file.read_bytes()).decode()
    link = f'<a download="{file.name}" href="data:{KINDS[ending]};base64,{data}">download</a>'
    return f"written to {html.escape(str(file))} · {link}"
