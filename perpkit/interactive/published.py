"""The papers' own numbers that the rows of an experiment can be compared with."""

from collections.abc import Iterable

import pandas as pd

from ..evaluation.tasks import PAPERS, task_names
from ..experiments.experiment import Experiment
from ..experiments.paper.tables import PERP_V1, TALK, curve, table
from ..pruning.method import DEFAULT_GROUPS

COLUMNS = ["sparsity", "perplexity", "accuracy", "label"]
# Biases, normalisations and low-rank adapters of some layers: no retraining of ours trains exactly these.
PERP = "PERP"
# Table 2 retrains what Wanda and SparseGPT have pruned too, and gives the better of both.
BETTER = "none or PERP, the better"
# The texts whose test split is WikiText-2's.
WIKITEXT = ("wikitext2", "c4-wikitext2")
# The papers' is a low-rank adapter on the head of a language model (0.07 % of OPT-2.7B with all that is
# retrained before it), not the whole head (5 %).
NOT_OURS = "linear_probing"


def published(experiment: Experiment, retrainings: str | Iterable[str] = ("none",)) -> pd.DataFrame:
    """The published numbers beside an experiment's: `sparsity`, `perplexity`, `accuracy` and `label`.

    They are those of the experiment's model (an OPT of the Hub), criterion and pattern. The label is the one
    of the `retrainings` that trains the same parameters, "none" without retraining (the dense model stands
    there at sparsity 0), "PERP", the papers' own choice, or "none or PERP, the better". Perplexities are
    given when the text is "wikitext2" or "c4-wikitext2", mean accuracies (in [0, 1]) when the tasks are the
    papers' seven; they are NaN where none was published. The table is empty where nothing can be compared,
    as with a reconstruction.

    PERP v1 (arXiv 2312.15230), Tables 2 and 5, and the talk of May 2025: `data/paper`.

    >>> table = published(Experiment("facebook/opt-2.7b", "wikitext2"), ["none", "biases"])
    >>> table[table.sparsity == 0.5].perplexity.tolist()
    [265.19, 16.86, 16.38]
    >>> len(published(Experiment("tiny-opt")))
    0
    """
    model = experiment.model.lower()
    retrainings = [retrainings] if isinstance(retrainings, str) else retrainings
    names = [name for name in dict.fromkeys(retrainings) if PERP_V1.get(name) != NOT_OURS]
    parts = []
    group = DEFAULT_GROUPS.get(experiment.criterion, "row")
    plain = experiment.unit is None and experiment.allocation in (None, "uniform")
    if model.startswith("facebook/opt-") and plain and experiment.group in (None, group):
        model = model.removeprefix("facebook/")
        if experiment.text in WIKITEXT:
            parts += _perplexities(model, experiment, names)
        if experiment.tasks and set(task_names(experiment.tasks)) == set(PAPERS):
            parts += _accuracies(model, experiment, names)
    found = pd.DataFrame([row for part in parts for row in part], columns=COLUMNS)
    numbers = {"sparsity": float, "perplexity": float, "accuracy": float}
    # One row a point; a number that two tables give is taken from the first.
    return found.astype(numbers).groupby(["label", "sparsity"], sort=False, as_index=False).first()[COLUMNS]


def _perplexities(model: str, experiment: Experiment, names: list[str]) -> list[list[dict]]:
    value = "wikitext2_perplexity"
    parts = []
    if (experiment.criterion, experiment.pattern) == ("magnitude", None):
        curves = table("perp_v1_table5_subset_perplexity")
        parts = [curve(curves, model, PERP_V1, names, value, "perplexity", {"perp": PERP})]
    criteria = table("perp_v1_table2_criteria_perplexity")
    pattern = experiment.pattern or "unstructured-50"
    points = criteria[(criteria["model"] == model) & (criteria["pattern"].isin([pattern, "dense"]))]
    bare = "none" if experiment.criterion == "magnitude" else BETTER
    labels = {"dense": "none", experiment.criterion: bare, f"{experiment.criterion}+perp": PERP}
    kept = points[points["method"].isin(labels)]
    # The dense model alone is no comparison.
    if set(kept["method"]) - {"dense"}:
        parts.append(
            [
                {
                    "sparsity": 0.0 if row.method == "dense" else 0.5,
                    "perplexity": getattr(row, value),
                    "label": labels[str(row.method)],
                }
                for row in kept.itertuples()
            ]
        )
    return parts


def _accuracies(model: str, experiment: Experiment, names: list[str]) -> list[list[dict]]:
    if experiment.pattern is not None:
        return []
    value = "mean_zero_shot_accuracy_pct"
    points = table("talk_reconstruction_zero_shot")
    points = points[(points["model"] == model) & (points["criterion"] == experiment.criterion)]
    bare = points.loc[points["masklora_reconstruction"] == "no", value]
    if bare.empty:
        return []
    curves = table("talk_zero_shot_opt2.7b").assign(**{value: lambda numbers: numbers[value] / 100})
    # The dense model belongs to every criterion.
    retrained = names if experiment.criterion == "magnitude" else []
    return [
        curve(curves, model, TALK, retrained, value, "accuracy", {}),
        [{"sparsity": 0.5, "accuracy": each / 100, "label": "none"} for each in bare],
    ]
