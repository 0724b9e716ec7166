"""Recipes of the figures of language models: criteria, zero-shot accuracy, reconstruction and speed."""

from typing import Any

import pandas as pd

from ..experiment import Experiment
from .jobs import Job
from .language import ALONE, DENSE, LORA, PERP, RATES, TEXT, experiment, subsets, with_dense
from .recipe import POINTS, Recipe
from .reconstruction import reconstructed
from .scales import Scale
from .tables import TALK, curve, table

HALF = 0.5
CRITERIA = ("magnitude", "wanda", "sparsegpt")
PATTERNS = {None: "50 %", "2:4": "2:4", "4:8": "4:8"}
BIG = ("opt-2.7b", "opt-6.7b", "opt-13b", "opt-30b")


def _criteria(scale: Scale, model: str) -> list[Experiment]:
    return [
        experiment(scale, model, sparsity=HALF, pattern=pattern, criterion=criterion, retrain=name, seed=seed)
        for pattern in PATTERNS
        for criterion in CRITERIA
        for name in ("none", PERP)
        for seed in scale.seeds
    ]


def _best_of_criteria(rows: pd.DataFrame) -> pd.DataFrame:
    """Wanda and SparseGPT are retrained too, and stand as the better of both, as in the paper."""
    found = [{"pattern": "dense", "method": "dense", "perplexity": rows["dense_perplexity"].iloc[0]}]
    groups = rows.assign(named=[PATTERNS[each] for each in _none(rows["pattern"])])
    for (pattern, criterion), some in groups.groupby(["named", "criterion"], sort=False):
        bare = float(some.loc[some["retrain"] == "none", "perplexity"].mean())
        mended = some.loc[some["retrain"] != "none", ["seed", "perplexity"]]
        if criterion == "magnitude":
            found.append({"pattern": pattern, "method": "magnitude", "perplexity": bare})
        for seed, value in mended.itertuples(index=False):
            magnitude = criterion == "magnitude"
            name = "magnitude+perp" if magnitude else criterion
            value = value if magnitude else min(value, bare)
            found.append({"pattern": pattern, "method": name, "seed": seed, "perplexity": value})
    same = {name: rows[name].iloc[0] for name in ("model", "protocol")}
    return pd.DataFrame(found).fillna({"seed": 0}).assign(**same)


def _none(column: pd.Series) -> list:
    return [None if value != value else value for value in column]


def _table_2(model: str) -> pd.DataFrame:
    found = table("perp_v1_table2_criteria_perplexity")
    rows = found[found["model"] == model].rename(columns={"wikitext2_perplexity": "perplexity"})
    patterns = rows["pattern"].replace({"unstructured-50": "50 %"})
    return rows.assign(pattern=patterns)[["pattern", "method", "perplexity"]]


TABLE_2 = Recipe(
    name="table-2",
    title="Criteria, and patterns that hardware likes",
    source="PERP v1, table 2",
    caption="Perplexity at 50 %, 2:4 and 4:8. Wanda and SparseGPT are retrained too, the better counts.",
    keys=("method", "pattern"),
    value="perplexity",
    experiments=_criteria,
    tidy=_best_of_criteria,
    published=_table_2,
    reference="opt-2.7b",
    models=BIG,
    base={"method": "dense", "pattern": "dense"},
    drawn=POINTS,
    differs=(LORA, RATES, TEXT),
)


def _talk(model: str) -> pd.DataFrame:
    value = "mean_zero_shot_accuracy_pct"
    rows = curve(table("talk_zero_shot_opt2.7b"), model, TALK, ALONE, value, "accuracy", {})
    found = pd.DataFrame(rows, columns=["sparsity", "accuracy", "label"]).rename(columns={"label": "retrain"})
    return found.assign(accuracy=found["accuracy"] / 100)


ZERO_SHOT = Recipe(
    name="zero-shot",
    title="Zero-shot accuracy against sparsity",
    source="Talk of May 2025, table of OPT-2.7B; PERP, later version, figure of the same",
    caption="Mean accuracy on question sets after magnitude pruning and retraining.",
    keys=("retrain", "sparsity"),
    value="accuracy",
    experiments=lambda scale, model: subsets(
        scale, model, ALONE, tasks=scale.tasks, tasks_dir=scale.tasks_dir
    ),
    tidy=lambda rows: with_dense(rows, "accuracy", **DENSE),
    published=_talk,
    reference="opt-2.7b",
    models=("opt-2.7b",),
    base=DENSE,
    difference=True,
    differs=(
        "The papers ask seven sets of questions. The embedded model is asked two of story world's, where "
        "guessing is right more or less often than in the papers' sets.",
        RATES,
        TEXT,
    ),
)


def _not_reconstructed(scale: Scale, model: str) -> list[Experiment]:
    asked: dict[str, Any] = {"tasks": scale.tasks, "tasks_dir": scale.tasks_dir}
    return [experiment(scale, model, sparsity=HALF, criterion=criterion, **asked) for criterion in CRITERIA]


def _reconstructed(scale: Scale, model: str) -> list[Job]:
    common: dict[str, Any] = {"model": model, "text": scale.text, "dtype": scale.dtype, "rank": scale.rank}
    common |= {"tasks": scale.tasks, "tasks_dir": scale.tasks_dir, "sparsity": HALF}
    common |= {"steps": scale.unit_steps, "lr": scale.unit_lr}
    return [
        Job(reconstructed, {**common, "criterion": criterion, "seed": seed}, steps=scale.unit_steps)
        for criterion in CRITERIA
        for seed in scale.asked_seeds
    ]


def _talk_reconstruction(model: str) -> pd.DataFrame:
    found = table("talk_reconstruction_zero_shot")
    rows = found[found["model"] == model]
    return pd.DataFrame(
        {
            "criterion": rows["criterion"],
            "reconstructed": rows["masklora_reconstruction"],
            "accuracy": rows["mean_zero_shot_accuracy_pct"] / 100,
        }
    )


RECONSTRUCTION = Recipe(
    name="reconstruction",
    title="Reconstruction by MaskLoRA, layer by layer",
    source="Talk of May 2025, table of reconstruction",
    caption="Mean accuracy at 50 % sparsity, as pruned and after reconstruction by MaskLoRA.",
    keys=("reconstructed", "criterion"),
    value="accuracy",
    experiments=_not_reconstructed,
    jobs=_reconstructed,
    tidy=lambda rows: rows.assign(reconstructed=["yes" if r else "no" for r in rows["of_job"]]),
    published=_talk_reconstruction,
    reference="opt-2.7b",
    models=BIG,
    base={"reconstructed": "no"},
    base_name="without reconstruction",
    difference=True,
    drawn=POINTS,
    differs=(
        "The talk reconstructs one matrix after the other. Here the unit is the attention or the MLP part of "
        "a block, and its target what that part gives in the dense model.",
        "Steps and rate are ours: the talk does not say its own.",
        TEXT,
    ),
)


def _throughput(model: str) -> pd.DataFrame:
    found = table("perp_v1_throughput")
    names = {"full_ft": "full", "perp": PERP, "biases+norms": "biases+norms"}
    rows = found[found["model"] == model]
    return pd.DataFrame(
        {"retrain": rows["method"].map(names), "tokens_per_second": rows["train_tokens_per_second"]}
    )


THROUGHPUT = Recipe(
    name="throughput",
    title="Training speed",
    source="PERP v1, section 3.2 (OPT-2.7B on one A100)",
    caption="Tokens a second of retraining.",
    keys=("retrain",),
    value="tokens_per_second",
    experiments=lambda scale, model: [
        experiment(scale, model, sparsity=HALF, retrain=name, seed=seed)
        for name in ("full", PERP, "biases+norms")
        for seed in scale.seeds
    ],
    tidy=lambda rows: rows,
    published=_throughput,
    reference="opt-2.7b",
    models=("opt-2.7b",),
    base={"retrain": "full"},
    base_name="that of full retraining",
    drawn=POINTS,
    differs=(
        LORA,
        "The embedded model is so small that the loss and what Python does between operations cost as much "
        "as its matrices. For real sizes without weights, 30B too: perpkit bench --model opt-30b.",
    ),
)
CRITERIA_AND_ABILITIES = (TABLE_2, ZERO_SHOT, RECONSTRUCTION, THROUGHPUT)
