"""The sparsity explorer's controls, and the choice that they say."""

import dataclasses

import ipywidgets as widgets

from .choices import Choice, Choices
from .points import percent

SPARSITIES = [round(0.05 * step, 2) for step in range(19)]


class Controls:
    """A slider, three dropdowns, each shown when there is a choice to make, and a box for published numbers.

    >>> from ...experiments.grid import Grid
    >>> controls = Controls(Choices(Grid(sparsity=[0.3, 0.5], retrain="biases")))
    >>> controls.choice()
    Choice(sparsity=0.5, retrain='none', criterion='magnitude', pattern='unstructured')
    """

    def __init__(self, choices: Choices):
        self._choices = choices
        sparsities = choices.sparsities or [0.5]
        self.sparsity = widgets.SelectionSlider(
            options=[(percent(value), value) for value in sorted({*SPARSITIES, *sparsities})],
            value=sparsities[len(sparsities) // 2],
            description="sparsity",
            continuous_update=False,
            layout=widgets.Layout(width="320px"),
        )
        self.criterion = _dropdown("criterion", choices.criteria)
        self.pattern = _dropdown("pattern", choices.patterns)
        self.retrain = _dropdown("retrain", choices.retrainings, alone=True)
        self.compare = widgets.Checkbox(
            False, description="compare with the paper", indent=False, layout=widgets.Layout(width="190px")
        )
        names = ("sparsity", "criterion", "pattern", "retrain", "compare")
        self.all = {name: getattr(self, name) for name in names}

    def choice(self) -> Choice:
        """What they say; a pattern such as 2:4 says the sparsity."""
        choice = Choice(self.sparsity.value, self.retrain.value, self.criterion.value, self.pattern.value)
        return dataclasses.replace(choice, sparsity=self._choices.pruned(choice).sparsity)


def _dropdown(name: str, options: list[str], *, alone: bool = False) -> widgets.Dropdown:
    """A choice, hidden when there is none to make."""
    layout = widgets.Layout(width="215px", display=None if alone or len(options) > 1 else "none")
    return widgets.Dropdown(options=options, value=options[0], description=name, layout=layout)
