"""The papers' published tables, and which of the kit's retrainings train what the papers' methods do."""

from collections.abc import Iterable, Mapping
from functools import lru_cache

import pandas as pd

from ...sources.embedded import data_folder

# The papers' methods by the retrainings that train the same parameters. Those of PERP v1 are nested.
PERP_V1 = {
    "none": "none",
    "biases": "biases",
    "perp_v1:biases": "biases",
    "biases+norms": "ln_parameters",
    "perp_v1:norms": "ln_parameters",
    "biases+norms+head": "linear_probing",
    "perp_v1:linear_probing": "linear_probing",
    "full": "full_ft",
    "perp_v1:full": "full_ft",
}
TALK = {
    "none": "none",
    "biases": "biases",
    "norms": "ln_parameters",
    "mask_lora": "masklora",
    "full": "full_ft",
}


@lru_cache
def table(name: str) -> pd.DataFrame:
    """A published table by the name of its file in `data/paper`; not to be changed.

    >>> table("perp_v1_throughput")["train_tokens_per_second"].tolist()
    [3500, 6400, 7600]
    """
    return pd.read_csv(data_folder("paper", f"{name}.csv"))


def curve(
    found: pd.DataFrame,
    model: str,
    methods: Mapping[str, str],
    names: Iterable[str],
    value: str,
    column: str,
    others: Mapping[str, str],
) -> list[dict]:
    """The rows of a model over sparsity, under the names of our retrainings and of the others.

    `methods` are the papers' by our names, of which those in `names` are taken, `others` the papers' by
    labels. The dense model is the retraining "none" at sparsity 0.

    >>> numbers = table("perp_v1_table5_subset_perplexity")
    >>> curve(numbers, "opt-30b", PERP_V1, ["biases"], "wikitext2_perplexity", "perplexity", {})[-1]
    {'sparsity': 0.7, 'perplexity': 408.04, 'label': 'biases'}
    """
    theirs = [("none", "dense"), *((name, methods[name]) for name in names if name in methods)]
    theirs += [(label, method) for method, label in others.items()]
    rows = found[found["model"] == model]
    return [
        {"sparsity": row["sparsity_pct"] / 100, column: row[value], "label": label}
        for label, method in theirs
        for row in rows[rows["method"] == method].to_dict("records")
    ]
