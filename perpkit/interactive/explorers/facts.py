"""What a figure was made of, said in its caption and in its table."""

from typing import Any

import pandas as pd

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


def of_versions(versions: pd.Series, sparsity: float, retrain: str, steps: int) -> dict[str, pd.Series]:
    """What was done to each version, told by how its name begins: "pruned", "retrained", others are dense.

    >>> facts = of_versions(pd.Series(["dense", "pruned 70 %", "retrained"]), 0.7, "biases", 9)
    >>> pd.DataFrame(facts).values.tolist()
    [[0.0, 'none', 0], [0.7, 'none', 0], [0.7, 'biases', 9]]
    """
    retrained = versions.str.startswith("retrained")
    pruned = versions.str.startswith("pruned") | retrained
    return {
        "sparsity": pruned.map({True: sparsity, False: 0.0}),
        "retrain": retrained.map({True: retrain, False: "none"}),
        "steps": retrained.map({True: steps, False: 0}),
    }
