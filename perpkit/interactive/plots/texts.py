"""Texts of several models, side by side."""

import textwrap
from functools import cache

import pandas as pd

from .card import CAPTION, LINE, card, check_table, plain, write_caption
from .figure import COLOURS, DataFigure, on_white

# So many letters of 8 points stand in the width of a card.
LETTERS = 104
TALLEST = 9.0
LINE_HEIGHT = 0.14
# Lines for a version and its perplexity.
HEAD = 2.7


@on_white()
def plot_texts(table: pd.DataFrame, *, prompt: str = "", words: str = "") -> DataFigure:
    """Write texts side by side, a column for each row of a table with `version` and `text`.

    A column `perplexity` is written above them, `words` below. What the font has no picture for is drawn as a
    box. Texts that are longer than a page are cut, as the caption says; the figure's table has them whole.

    Raises ValueError for an empty table and a missing column.

    >>> figure = plot_texts(pd.DataFrame({"version": ["dense"], "text": ["once upon a time"]}), prompt="Tell")
    >>> [text.get_text() for text in figure.axes[0].texts]
    ['dense', 'once upon a time']
    """
    check_table(table, ["version", "text"])
    width = LETTERS // len(table) - 2
    columns = [_lines(str(text).lstrip(" "), width) for text in table["text"]]
    most = int((TALLEST - 1) / LINE_HEIGHT)
    longest = max(map(len, columns))
    begun = _lines(f"prompt: {prompt}", LETTERS - 10) if prompt else []
    lines = min(longest, most)
    caption = ["texts that are longer are cut" if longest > most else "", *_lines(words, LINE)]
    below = len([line for line in caption if line])
    figure = card(table, height=0.4 + LINE_HEIGHT * (HEAD + lines + len(begun) + below))
    axes = figure.subplots()
    axes.set_axis_off()
    axes.set(xlim=(0, len(table)), ylim=(lines + HEAD, 0))
    for i, (version, column) in enumerate(zip(table["version"], columns, strict=True)):
        axes.text(i, 0, _drawn(str(version)), va="top", weight="bold", fontsize=9, color=COLOURS[4])
        if "perplexity" in table:
            said = f"perplexity {table['perplexity'].iloc[i]:.2f}"
            axes.text(i, 1.3, said, va="top", fontsize=8, color=CAPTION)
        axes.text(i, HEAD, _drawn("\n".join(column[:most])), va="top", fontsize=8, linespacing=1.3)
    if begun:
        axes.set_title(_drawn("\n".join(begun)), loc="left", fontsize=8.5, style="italic")
    write_caption(figure, caption)
    return figure


def _lines(text: str, width: int) -> list[str]:
    return [
        line for part in text.splitlines() for line in textwrap.wrap(part, max(8, width), tabsize=4) or [""]
    ]


def _drawn(text: str) -> str:
    known = _known()
    return plain("".join(c if c == "\n" or ord(c) in known else "□" for c in text))


@cache
def _known() -> frozenset[int]:
    """The characters that the font has a picture for; another would be a warning."""
    from matplotlib.font_manager import findfont, get_font

    return frozenset(get_font(findfont("DejaVu Sans")).get_charmap())
