"""Recipes of the figures of image classifiers."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pandas as pd

from .jobs import Job
from .recipe import MAPS, POINTS, Recipe
from .scales import Scale, Vision
from .tables import table
from .vision import NESTED, gradual, maps, one_shot, plans, shares, soup

# PERP v1, table 3: what happens to the layers, from where, by the columns unfreeze and reverse.
ORDERS = {
    ("yes", "yes"): "unfreeze from the output",
    ("no", "no"): "freeze from the input",
    ("yes", "no"): "unfreeze from the input",
    ("no", "yes"): "freeze from the output",
}
EPOCHS = 5
DEVIATION = "points of accuracy above full IMP"
RESNET = (("resnet-50", "resnet-50"),)
SMALL = "ResNet-50 on ImageNet there; here, at the embedded scale, a ResNet-20 on 32×32 shapes."
SHORT = (
    "An epoch of the embedded scale is 24 steps of 16 pictures, at one rate for all sparsities. Running "
    "statistics of batch normalisations would lag behind so few, so they are re-estimated after every "
    "retraining. Of one seed, on 600 pictures, differences of two points or less are chance."
)
CURVES_ONLY = "The paper has printed the curves only, no numbers: nothing can be set beside."


def _vision(scale: Scale) -> Vision:
    # Without one there are no pairs, and nobody asks.
    assert scale.vision is not None
    return scale.vision


def _common(vision: Vision) -> dict[str, Any]:
    counts = dict(vision.counts) if vision.counts else None
    return {
        "classifier": vision.classifier,
        "images": vision.images,
        "counts": counts,
        "batch": vision.batch,
        "settle": vision.settle,
    }


def _unsettled(vision: Vision) -> dict[str, Any]:
    return {name: value for name, value in _common(vision).items() if name != "settle"}


def _one_shot(scale: Scale, epochs: int) -> list[Job]:
    vision = _vision(scale)
    jobs = []
    for sparsity in vision.sparsities:
        for method in NESTED:
            trained = method in vision.rates
            for rank in vision.ranks if method == "perp" else (0,):
                for seed in vision.seeds if trained else (0,):
                    steps = epochs * vision.epoch if trained else 0
                    settings = {"method": method, "sparsity": sparsity, "steps": steps, "seed": seed}
                    settings |= {"lr": vision.rates.get(method, 0.0), "rank": rank}
                    jobs.append(Job(one_shot, {**_common(vision), **settings}, steps, evaluations=1))
    return jobs


def _named_rank(rows: pd.DataFrame) -> pd.DataFrame:
    """PERP of several ranks as several methods."""
    perp = rows["method"] == "perp"
    several = rows.loc[perp, "trainable_share"].round(6).nunique() > 1
    names = [
        f"{method} ({100 * share:.1f} %)" if several and method == "perp" else method
        for method, share in zip(rows["method"], rows["trainable_share"], strict=True)
    ]
    return rows.assign(method=names)


FIGURE_2 = Recipe(
    name="figure-2",
    title="A ResNet after one epoch",
    source="PERP v1, figure 2",
    caption="Accuracy after global magnitude pruning in one shot and one epoch of retraining.",
    keys=("method", "sparsity"),
    value="accuracy",
    jobs=lambda scale, _: _one_shot(scale, 1),
    tidy=_named_rank,
    reference="ResNet-50",
    vision=True,
    unpublished=CURVES_ONLY,
    differs=(SMALL, SHORT, "PERP's adapters are masked and merged, and the shares leave them out."),
)
FIGURE_4 = replace(
    FIGURE_2,
    name="figure-4",
    title="A ResNet after five epochs",
    source="PERP v1, figure 4",
    caption="Accuracy after global magnitude pruning in one shot and five epochs of retraining.",
    jobs=lambda scale, _: _one_shot(scale, EPOCHS),
)


def _gradual(scale: Scale) -> list[Job]:
    vision = _vision(scale)
    ways: Iterable[tuple[str | None, bool]] = (
        (None, False),
        *(("unfreeze" if unfreeze == "yes" else "freeze", reverse == "yes") for unfreeze, reverse in ORDERS),
    )
    common = {**_common(vision), "epoch": vision.epoch, "lr": vision.rates["full"]}
    return [
        Job(
            gradual,
            {**common, "freezing": freezing, "reverse": reverse, "cycles": cycles, "seed": seed},
            steps=cycles * EPOCHS * vision.epoch,
            evaluations=1,
        )
        for cycles in vision.cycles
        for freezing, reverse in ways
        for seed in vision.seeds
    ]


def _named_orders(rows: pd.DataFrame) -> pd.DataFrame:
    names = [
        ORDERS["yes" if freezing == "unfreeze" else "no", "yes" if reverse else "no"]
        for freezing, reverse in zip(rows["freezing"], rows["reverse"], strict=True)
    ]
    return rows.assign(order=names)


def _deviation(rows: pd.DataFrame) -> pd.DataFrame:
    """Points of accuracy above full IMP with as many cycles and the same seed."""
    whole = rows["freezing"].isna()
    full = rows[whole].set_index(["cycles", "seed"])["accuracy"]
    rest = _named_orders(rows[~whole])
    of_full = full.reindex(pd.MultiIndex.from_frame(rest[["cycles", "seed"]])).to_numpy()
    return rest.assign(**{DEVIATION: 100 * (rest["accuracy"] - of_full)})


def _table_3(_: str) -> pd.DataFrame:
    found = table("perp_v1_table3_gradual_freezing")
    orders = [ORDERS[pair] for pair in zip(found["unfreeze"], found["reverse"], strict=True)]
    deviation = found["accuracy_deviation_from_full_imp_pct"]
    return pd.DataFrame({"order": orders, "cycles": found["cycles"], DEVIATION: deviation})


def _table_3_shares(_: str) -> pd.DataFrame:
    found = table("perp_v1_table3_gradual_freezing").drop_duplicates(["unfreeze", "reverse"])
    orders = [ORDERS[pair] for pair in zip(found["unfreeze"], found["reverse"], strict=True)]
    shares = found["aggregated_trainable_pct"] / 100
    return pd.DataFrame({"order": orders, "trainable_share": shares})


TABLE_3 = Recipe(
    name="table-3",
    title="Gradual freezing and unfreezing",
    source="PERP v1, table 3",
    caption="Accuracy at 90 % after cycles of five epochs, in points above full iterative pruning (IMP).",
    keys=("order", "cycles"),
    value=DEVIATION,
    jobs=lambda scale, _: _gradual(scale),
    tidy=_deviation,
    published=_table_3,
    reference="ResNet-50",
    vision=True,
    drawn=POINTS,
    differs=(SMALL, SHORT),
)
TABLE_3_SHARES = Recipe(
    name="table-3-shares",
    title="What gradual freezing trains",
    source="PERP v1, table 3, third column",
    caption="Share of ResNet-50's parameters trained, summed over the five epochs of a cycle: counted.",
    keys=("order",),
    value="trainable_share",
    jobs=lambda *_: [Job(plans, {})],
    tidy=_named_orders,
    published=_table_3_shares,
    drawn=POINTS,
    fixed=RESNET,
    differs=("The paper does not say where a part of the layers ends; here all parts have as many layers.",),
)
SHARES = Recipe(
    name="trainable-share",
    title="What the methods train",
    source="PERP v1, section 3.1",
    caption="Share of ResNet-50's parameters that each method trains: counted.",
    keys=("method",),
    value="trainable_share",
    jobs=lambda *_: [Job(shares, {"ranks": [1, 10]})],
    tidy=lambda rows: rows.assign(
        method=rows["method"].replace({"perp, rank 1": "perp_min", "perp, rank 10": "perp_max"})
    ),
    published=lambda _: (
        table("perp_v1_resnet50_trainable_share")
        .assign(trainable_share=lambda found: found["trainable_pct"] / 100)
        .replace({"method": {"bn_parameters": "norms", "full_ft": "full"}})[["method", "trainable_share"]]
    ),
    drawn=POINTS,
    fixed=RESNET,
    differs=("PERP's smallest and largest share are taken for its smallest and largest rank, 1 and 10.",),
)


def _maps(scale: Scale) -> list[Job]:
    vision = _vision(scale)
    settings = {"sparsity": 0.7, "steps": vision.epoch, "lr": vision.rates["norms"]}
    return [Job(maps, {**_unsettled(vision), **settings}, steps=vision.epoch)]


FIGURE_1 = Recipe(
    name="figure-1",
    title="What pruning does to a feature",
    source="PERP v1, figure 1",
    caption="What one filter of the first layer sees: dense, pruned, and with retrained normalisations.",
    keys=("title",),
    value="error",
    jobs=lambda scale, _: _maps(scale),
    tidy=lambda rows: rows,
    reference="AlexNet",
    vision=True,
    drawn=MAPS,
    unpublished="The paper prints pictures, no numbers. The error is relative to the dense model's map.",
    differs=(
        "AlexNet on a photograph there. Every layer is pruned to 70 % here: globally, the first one would "
        "hardly lose a weight.",
    ),
)


def _soups(scale: Scale) -> list[Job]:
    vision = _vision(scale)
    # Soups and their baselines re-estimate statistics by themselves.
    common = {**_unsettled(vision), "epoch": vision.epoch, "lr": vision.rates["full"]}
    # Every phase on its own has the soups, IMP and IMP with m times the epochs of those before it.
    return [
        Job(
            soup,
            {**common, "m": m, "phase": phase, "seed": seed},
            steps=phase * vision.epoch * (2 * m + 1),
            evaluations=4,
        )
        for m in vision.soups
        for phase in (1, 2, 3)
        for seed in vision.seeds
    ]


SOUP_NAMES = {
    "sms": "SMS of {m}",
    "best": "best of {m}",
    "best_candidate": "best of {m}",
    "imp_m": "IMP, {m} × the epochs",
    "imp_mx": "IMP, {m} × the epochs",
    "imp": "IMP",
}


def _named_soups(rows: pd.DataFrame) -> pd.DataFrame:
    names = [SOUP_NAMES[method].format(m=m) for method, m in zip(rows["method"], rows["m"], strict=True)]
    # IMP is computed beside the soups of every m, and is the same.
    return rows.assign(method=names).drop_duplicates(
        [name for name in ("method", "phase", "seed") if name in rows]
    )


def _table_soups(_: str) -> pd.DataFrame:
    found = _named_soups(table("talk_sms_imagenet"))
    return found.assign(accuracy=found["test_accuracy_pct"] / 100)[["method", "phase", "accuracy"]]


SMS = Recipe(
    name="sms",
    title="Sparse model soups",
    source="Talk of May 2025, table of ResNet-50; Sparse Model Soups (arXiv 2306.16788)",
    caption="Accuracy after each of three phases: 53.6, 78.5 and 90 % sparsity.",
    keys=("method", "phase"),
    value="accuracy",
    jobs=lambda scale, _: _soups(scale),
    tidy=_named_soups,
    published=_table_soups,
    reference="ResNet-50",
    vision=True,
    base={"method": "IMP"},
    base_name="IMP",
    difference=True,
    drawn=POINTS,
    differs=(SMALL, SHORT, "The candidates differ in the order of their batches."),
)
CLASSIFIERS = (FIGURE_1, FIGURE_2, FIGURE_4, TABLE_3, TABLE_3_SHARES, SHARES, SMS)
