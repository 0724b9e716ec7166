"""Recipes of the figures of language models: perplexity after retraining."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from ..experiment import Experiment
from .recipe import Recipe
from .scales import Scale
from .tables import PERP_V1, curve, table

PERP = "biases+norms+lora"
NESTED = ("none", "biases", "biases+norms", "biases+norms+head", PERP, "full")
ALONE = ("none", "biases", "norms", "mask_lora", "full")
PROGRESS = "% of all iterations"
DENSE = {"retrain": "none", "sparsity": 0.0}

TEXT = (
    "The papers calibrate and retrain on C4 and measure on WikiText-2, as the text c4-wikitext2 of the "
    "larger scales does. At the embedded scale all is story world, with another text all is that one."
)
HEAD = (
    "The papers' linear probing trains a low-rank adapter on the head (0.07 % of OPT-2.7B with the biases "
    "and normalisations), here it is the whole head (5 % of it)."
)
RATES = (
    "The papers tune the rate of each cell; here every retraining has one rate for all sparsities, the "
    "recommended one of its model."
)
LORA = (
    "PERP of version 1 trains low-rank adapters on queries, values and head. Here they are on all pruned "
    "matrices and not on the head: biases, normalisations and plain LoRA, kept unmerged."
)


def subsets(scale: Scale, model: str, names: Sequence[str], **more) -> list[Experiment]:
    """Magnitude pruning to every sparsity and each retraining, every seed."""
    asked = "tasks" in more
    sparsities, seeds = (
        (scale.asked_sparsities, scale.asked_seeds) if asked else (scale.sparsities, scale.seeds)
    )
    return [
        experiment(scale, model, sparsity=sparsity, retrain=name, seed=seed, **more)
        for sparsity in sparsities
        for name in names
        for seed in seeds
    ]


def experiment(scale: Scale, model: str, retrain: str = "none", **inputs: Any) -> Experiment:
    """One row; adapters have the rank of the scale."""
    changes: dict[str, Any] = {"rank": scale.rank} if "lora" in retrain else {}
    if retrain == "none":
        inputs["seed"] = 0
    return Experiment(**{**scale.retraining(model=model, retrain=retrain, **changes), **inputs})


def with_dense(rows: pd.DataFrame, value: str, **place) -> pd.DataFrame:
    """Rows of a sweep and, before them, one for the dense model where `place` says."""
    first = rows.iloc[0].to_dict()
    same: dict[str, Any] = {name: first[name] for name in ("model", "criterion", "protocol") if name in first}
    dense: dict[str, Any] = {
        **same,
        value: first[f"dense_{value}"],
        "seed": 0,
        "trainable_share": 0.0,
        **place,
    }
    return pd.DataFrame([dense, *rows.to_dict("records")])


def _published(model: str, names: Sequence[str], methods: Mapping[str, str], **others: str) -> pd.DataFrame:
    found = table("perp_v1_table5_subset_perplexity")
    value = "wikitext2_perplexity"
    rows = curve(found, model, methods, names, value, "perplexity", others)
    return pd.DataFrame(rows, columns=["sparsity", "perplexity", "label"]).rename(
        columns={"label": "retrain"}
    )


def _with_perp(model: str) -> pd.DataFrame:
    return _published(model, NESTED, PERP_V1, perp=PERP)


def _nested(scale: Scale, model: str) -> list[Experiment]:
    names: Sequence[str] = NESTED
    if scale.of_the_papers:
        # Of the largest models nothing was published for full retraining: it fits on no single GPU.
        there = set(_with_perp(model.removeprefix("facebook/"))["retrain"])
        names = [name for name in NESTED if name in there]
    return subsets(scale, model, names)


TABLE_1 = Recipe(
    name="table-1",
    title="Few parameters against full retraining",
    source="PERP v1 (arXiv 2312.15230), tables 1 and 5",
    caption="Perplexity after magnitude pruning and retraining of nested subsets of the parameters.",
    keys=("retrain", "sparsity"),
    value="perplexity",
    experiments=_nested,
    tidy=lambda rows: with_dense(rows, "perplexity", **DENSE),
    published=_with_perp,
    reference="opt-2.7b",
    models=("opt-1.3b", "opt-2.7b", "opt-13b", "opt-30b"),
    base=DENSE,
    differs=(LORA, HEAD, RATES, TEXT),
)
SUBSETS = Recipe(
    name="perplexity-subsets",
    title="Perplexity against sparsity, subset by subset",
    source="PERP, later version, figure of OPT-2.7B; talk of May 2025",
    caption="Perplexity after magnitude pruning and retraining of one subset alone, or of MaskLoRA.",
    keys=("retrain", "sparsity"),
    value="perplexity",
    experiments=lambda scale, model: subsets(scale, model, ALONE),
    tidy=lambda rows: with_dense(rows, "perplexity", **DENSE),
    published=lambda model: _published(model, ("none", "biases", "full"), PERP_V1),
    reference="opt-2.7b",
    models=("opt-2.7b",),
    base=DENSE,
    differs=(
        "The figure was published without its numbers. Drawn beside are those of version 1 for what trains "
        "the same: biases and everything; normalisations alone and MaskLoRA have none.",
        RATES,
        TEXT,
    ),
)


def _iterations(scale: Scale, model: str, name: str) -> list[Experiment]:
    return [
        experiment(scale, model, sparsity=sparsity, retrain=retrain, seed=seed, steps=steps)
        for sparsity in scale.sparsities
        for steps in (0, *scale.iterations, scale.steps)
        for seed in scale.seeds
        for retrain in (("none",) if steps == 0 else (name,))
    ]


def _over_iterations(rows: pd.DataFrame) -> pd.DataFrame:
    found = with_dense(rows, "perplexity", sparsity=0.0, steps=0)
    # Nothing is retrained yet where only half is computed.
    share = 100 * found["steps"] / max(1, found["steps"].max())
    return found.assign(**{"pruned": [_percent(s) for s in found["sparsity"]], PROGRESS: share})


def _percent(share: float) -> str:
    return f"{100 * share:g} %" if share else "dense"


def _ends_of_table_2(model: str) -> pd.DataFrame:
    found = table("perp_v1_table2_criteria_perplexity")
    rows = found[(found["model"] == model) & found["pattern"].isin(["dense", "unstructured-50"])]
    ends = {"dense": ("dense", 0.0), "magnitude": ("50 %", 0.0), "magnitude+perp": ("50 %", 100.0)}
    numbers = dict(zip(rows["method"], rows["wikitext2_perplexity"], strict=True))
    return pd.DataFrame(
        [{"pruned": ends[name][0], PROGRESS: ends[name][1], "perplexity": numbers[name]} for name in ends]
    )


FIGURE_3 = Recipe(
    name="figure-3",
    title="How many iterations it takes: PERP",
    source="PERP v1, figure 3 (OPT-6.7B)",
    caption="Perplexity after retraining biases, normalisations and LoRA for as many iterations as said.",
    keys=("pruned", PROGRESS),
    value="perplexity",
    experiments=lambda scale, model: _iterations(scale, model, PERP),
    tidy=_over_iterations,
    published=_ends_of_table_2,
    reference="opt-6.7b",
    models=("opt-6.7b",),
    base={"pruned": "dense", PROGRESS: 0.0},
    differs=(
        "The curves were published without their numbers. Drawn beside are the two that table 2 has: 50 %, "
        "not retrained and after all 1000 iterations.",
        LORA,
        RATES,
        TEXT,
    ),
)
ITERATIONS = replace(
    FIGURE_3,
    name="iterations",
    title="How many iterations it takes: MaskLoRA",
    source="PERP, later version, figure of OPT-6.7B",
    caption="Perplexity after retraining MaskLoRA for as many iterations as said.",
    experiments=lambda scale, model: _iterations(scale, model, "mask_lora"),
    published=lambda model: _ends_of_table_2(model).head(2),
    differs=(
        "The curves were published without their numbers; beside stands the model that is not retrained.",
        RATES,
        TEXT,
    ),
)


PERPLEXITY = (TABLE_1, FIGURE_3, SUBSETS, ITERATIONS)
