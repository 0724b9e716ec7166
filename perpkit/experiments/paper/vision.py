"""Jobs with image classifiers: one-shot pruning, gradual freezing, soups, feature maps, counted shares."""

import copy
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from ...evaluation.accuracy import accuracy
from ...evaluation.distortion import feature_maps, map_layers, relative_error
from ...pruning.prune import prune
from ...retraining.adapters.attach import attach
from ...retraining.adapters.merge import merge
from ...retraining.batchnorm import recalibrate_batchnorm
from ...retraining.freezing import gradual_plan
from ...retraining.iterative import geometric_sparsities, imp
from ...retraining.loop.retrain import retrain
from ...retraining.soups.sms import sms
from ...retraining.subsets import head_of, trainable_share
from ...sources.augment import crop_and_flip
from ...sources.classifiers import load_classifier
from ...sources.images import Images, load_images
from ..run import NotLoaded
from .scales import SGD

# PERP v1, section 3.1; PERP has linear probing's parameters, and adapters on all layers but the head.
NESTED = {
    "none": None,
    "bn_recalibrate": "perp_v1:bn_recalibrate",
    "norms": "perp_v1:norms",
    "linear_probing": "perp_v1:linear_probing",
    "perp": "perp_v1:linear_probing+lora",
    "full": "perp_v1:full",
}
FINAL, PHASES = 0.9, 3
TRAINING: dict[str, Any] = {**SGD, "augment": crop_and_flip, "progress": False}


@lru_cache(maxsize=2)
def _loaded(classifier: str, images: str, counts: tuple | None) -> tuple[nn.Module, Images]:
    try:
        found = load_images(images, counts=dict(counts) if counts else None, progress=False)
        return load_classifier(classifier), found
    except ValueError as error:
        raise NotLoaded(str(error)) from error


def _sources(classifier: str, images: str, counts: Mapping[str, int] | None) -> tuple[nn.Module, Images]:
    """A dense network, not to be changed, and its pictures."""
    return _loaded(classifier, images, _pairs(counts))


def _pairs(counts: Mapping[str, int] | None) -> tuple | None:
    return tuple(counts.items()) if counts else None


@lru_cache(maxsize=2)
def _dense_accuracy(classifier: str, images: str, counts: tuple | None) -> float:
    dense, pictures = _loaded(classifier, images, counts)
    return accuracy(dense, pictures.test)


def one_shot(
    classifier: str,
    images: str,
    counts: Mapping[str, int] | None,
    method: str,
    sparsity: float,
    steps: int,
    lr: float,
    batch: int,
    settle: bool,
    rank: int,
    seed: int,
) -> list[dict]:
    """Prune globally by magnitude and retrain what a method retrains: one row with its test accuracy."""
    dense, pictures = _sources(classifier, images, counts)
    model = copy.deepcopy(dense)
    masks = prune(model, "magnitude", sparsity=sparsity, group="global", progress=False)
    subset = NESTED[method]
    if method == "perp":
        attach(model, masks, "mask_lora", rank=rank, alpha=2.0 * rank, seed=seed)
    share = trainable_share(model, subset) if subset else 0.0
    if method == "bn_recalibrate":
        recalibrate_batchnorm(model, pictures.train[0])
    elif subset is not None:
        settings: dict[str, Any] = {"steps": steps, "lr": lr, "batch": batch, "seed": seed}
        retrain(model, pictures.train, masks=masks, subset=subset, **settings, **TRAINING)
    if method == "perp":
        merge(model)
    if settle and subset is not None:
        recalibrate_batchnorm(model, pictures.train[0])
    masks.check(model)
    row = {"method": method, "sparsity": sparsity, "seed": seed, "trainable_share": share}
    reached = accuracy(model, pictures.test)
    measured = {"accuracy": reached, "dense_accuracy": _dense_accuracy(classifier, images, _pairs(counts))}
    return [row | measured | {"protocol": pictures.protocol}]


def gradual(
    classifier: str,
    images: str,
    counts: Mapping[str, int] | None,
    freezing: str | None,
    reverse: bool,
    cycles: int,
    epoch: int,
    lr: float,
    batch: int,
    settle: bool,
    seed: int,
) -> list[dict]:
    """Iterative pruning to 90 % with gradual freezing, five epochs a cycle, or without: one row."""
    dense, pictures = _sources(classifier, images, counts)
    model = copy.deepcopy(dense)
    share = 1.0
    if freezing is not None:
        plan = gradual_plan(model, freezing, reverse=reverse)
        share = float(plan["trainable_share"].mean())
    masks, _ = imp(
        model,
        "magnitude",
        pictures.train,
        sparsity=FINAL,
        cycles=cycles,
        pruning={"group": "global"},
        gradual=freezing,
        reverse=reverse,
        seed=seed,
        subset="full",
        steps=5 * epoch,
        lr=lr,
        batch=batch,
        **TRAINING,
    )
    if settle:
        recalibrate_batchnorm(model, pictures.train[0])
    masks.check(model)
    row = {"freezing": freezing, "reverse": reverse, "cycles": cycles, "seed": seed}
    measured = {"accuracy": accuracy(model, pictures.test), "trainable_share": share}
    return [row | measured | {"protocol": pictures.protocol}]


def soup(
    classifier: str,
    images: str,
    counts: Mapping[str, int] | None,
    m: int,
    phase: int,
    epoch: int,
    lr: float,
    batch: int,
    seed: int,
) -> list[dict]:
    """A soup of m after some of three phases on the way to 90 %, and its baselines: a row for each.

    The first phases are the same whether or not others follow.
    """
    dense, pictures = _sources(classifier, images, counts)
    made = sms(
        dense,
        "magnitude",
        pictures.train,
        sparsity=geometric_sparsities(FINAL, PHASES)[phase - 1],
        m=m,
        cycles=phase,
        pruning={"group": "global"},
        score=lambda model: accuracy(model, pictures.validation),
        evaluate=lambda model: accuracy(model, pictures.test),
        baselines=["imp", "imp_m", "best"],
        seed=100 * seed,
        subset="full",
        steps=epoch,
        lr=lr,
        batch=batch,
        **TRAINING,
    )
    made.masks.check(made.model)
    common = {"phase": phase, "m": m, "seed": seed, "protocol": pictures.protocol}
    return [
        {"method": row["method"], "accuracy": row["score"], **common}
        for row in made.comparison.to_dict("records")
    ]


def maps(
    classifier: str,
    images: str,
    counts: Mapping[str, int] | None,
    sparsity: float,
    steps: int,
    lr: float,
    batch: int,
) -> list[dict]:
    """The map of one first-layer filter on one picture: dense, pruned, and after normalisations' retraining.

    The filter is the one that pruning distorts most among those that see anything, on the first test picture.
    """
    dense, pictures = _sources(classifier, images, counts)
    # The normalisation after the convolution, where there is one, is part of the feature.
    layer = list(map_layers(dense))[:2][-1]
    models = {"dense": dense, "pruned": copy.deepcopy(dense)}
    masks = prune(models["pruned"], "magnitude", sparsity=sparsity, group="layer", progress=False)
    models["retrained"] = copy.deepcopy(models["pruned"])
    settings: dict[str, Any] = {
        "subset": "perp_v1:norms",
        "steps": steps,
        "lr": lr,
        "batch": batch,
        "seed": 0,
    }
    retrain(models["retrained"], pictures.train, masks=masks, **settings, **TRAINING)
    picture = pictures.test[0][:1]
    seen = {name: feature_maps(model, picture, layer)[0].float().cpu() for name, model in models.items()}
    spread = seen["dense"].flatten(1).std(1)
    errors = (seen["dense"] - seen["pruned"]).flatten(1).norm(dim=1) / seen["dense"].flatten(1).norm(dim=1)
    # A filter that sees nothing is distorted by anything.
    errors[spread < spread.median()] = -1
    chosen = int(errors.argmax())
    shown = {name: each[chosen] for name, each in seen.items()}
    original = _picture(picture[0], pictures)
    rows: list[dict] = [{"title": "picture", "values": original.tolist(), "error": None}]
    for name, each in shown.items():
        error = relative_error(shown["dense"], each)
        rows.append({"title": name, "values": each.tolist(), "error": error})
    said = {"layer": layer, "filter": chosen, "sparsity": sparsity, "protocol": pictures.protocol}
    return [row | said for row in rows]


def _picture(picture: torch.Tensor, pictures: Images) -> torch.Tensor:
    mean, std = (torch.tensor(each)[:, None, None] for each in (pictures.mean, pictures.std))
    return (picture.cpu() * std + mean).clamp(0, 1)


def shares(ranks: tuple[int, ...] | list[int]) -> list[dict]:
    """The share of ResNet-50's parameters that each method of PERP v1, section 3.1, trains: counted, exact.

    There are no weights, only their number is asked for. PERP has the head and adapters of a rank on all
    other layers.
    """
    model = _resnet50()
    names = {"biases": "perp_v1:biases", "norms": "perp_v1:norms"}
    names |= {"linear_probing": "perp_v1:linear_probing", "full": "perp_v1:full"}
    rows = [{"method": "bn_recalibrate", "trainable_share": 0.0}]
    rows += [
        {"method": name, "trainable_share": trainable_share(model, each)} for name, each in names.items()
    ]
    whole = sum(parameter.numel() for parameter in model.parameters())
    head: Any = head_of(model)
    probing = rows[3]["trainable_share"]
    for rank in ranks:
        # A, [r, in], and B, [out, r], of every layer as the matrix that its convolution is viewed as.
        factors = sum(
            rank * (layer.weight[0].numel() + len(layer.weight))
            for layer in model.modules()
            if isinstance(layer, nn.Conv2d | nn.Linear) and layer is not head
        )
        share = (probing * whole + factors) / (whole + factors)  # type: ignore[operator]
        rows.append({"method": f"perp, rank {rank}", "trainable_share": share})
    return rows


def plans() -> list[dict]:
    """The share of ResNet-50's parameters that a cycle of five epochs trains, by the order of freezing."""
    model = _resnet50()
    return [
        {
            **{"freezing": freezing, "reverse": reverse},
            "trainable_share": float(
                gradual_plan(model, freezing, reverse=reverse)["trainable_share"].mean()
            ),
        }
        for freezing in ("freeze", "unfreeze")
        for reverse in (False, True)
    ]


def _resnet50() -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    config: Any = ResNetConfig
    with torch.device("meta"):
        return ResNetForImageClassification(config(num_labels=1000))
