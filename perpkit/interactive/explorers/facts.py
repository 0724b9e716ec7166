"""What a figure was made of, said in its caption and in its table."""

from typing import Any

from ..plots.card import write_caption
from ..plots.figure import DataFigure


def described(figure: DataFigure, words: str = "", **facts: Any) -> DataFigure:
    """The figure with words at the end of its caption, and a column for each fact that its table lacks.

    >>> import pandas as pd
    >>> from ..plots.card import card
    >>> figure = described(card(pd.DataFrame({"loss": [1.5]}), height=2), "tiny-opt at 70 %", sparsity=0.7)
    >>> figure.get_supxlabel(), figure.table.iloc[0].to_dict()
    ('tiny-opt at 70 %', {'loss': 1.5, 'sparsity': 0.7})
    """
    write_caption(figure, [words])
    new = {name: value for name, value in facts.items() if name not in figure.table}
    figure.table = figure.table.assign(**new)
    return figure
