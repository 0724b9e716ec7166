"""What the tests of the explorers share: runs that cost nothing, and what a widget says."""

import html
import re
import threading

from perpkit.experiments.sweep import Cancelled

SOON = 60


class Runs(list):
    """What was run; a run costs nothing, its perplexity follows a formula, and tests can get in its way."""

    def __init__(self):
        self.before = lambda experiment: None

    def __call__(self, experiment, cancelled=None) -> dict:
        self.append(experiment)
        self.before(experiment)
        for _ in range(experiment.steps):
            if cancelled is not None and cancelled():
                raise Cancelled
        return made_row(experiment)

    def fail(self, error: Exception) -> None:
        def raise_it(experiment):
            raise error

        self.before = raise_it

    def hold(self) -> threading.Event:
        """Let runs wait, deaf to a cancel, until the event is set."""
        go = threading.Event()
        self.before = lambda experiment: go.wait(SOON)
        return go


def made_row(experiment) -> dict:
    trained = experiment.retrain != "none"
    reached = 2 + (1 if trained else 10) * experiment.sparsity + 0.1 * experiment.seed
    asked = {"accuracy": 1 - reached / 20, "dense_accuracy": 0.95} if experiment.tasks else {}
    return {
        **experiment.asdict(),
        **asked,
        "perplexity": reached,
        "dense_perplexity": 2.0,
        "floor": 1.5,
        "trainable_share": 0.01 * trained,
        "seconds": 1.0,
        "protocol": "story world",
    }


def words(explorer) -> str:
    """The message as it is read."""
    return read(explorer.message)


def read(widget) -> str:
    return html.unescape(re.sub("<[^>]*>", "", widget.value))


def shown(explorer, sparsity, retrain="none") -> str:
    explorer.show(sparsity, retrain)
    assert explorer.wait(SOON)
    return words(explorer)
