"""How large the papers' figures are computed: which models, texts, sparsities, seeds and steps."""

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...sources.models import check_dtype
from ..files import check_text

RANK = 16
# SGD with momentum, augmented: as in pre-training (PERP v1, appendix A).
SGD = {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 5e-4}


@dataclass(frozen=True)
class Vision:
    """What figures of image classifiers are computed on; `epoch` is the number of steps that stands for one.

    `rates` are the learning rates by what is retrained, `counts` the pictures of each split, `soups` the
    numbers of candidates, `cycles` those of gradual freezing. `settle` re-estimates the statistics of batch
    normalisations after every retraining: an epoch of few steps does not move them to their place.
    """

    classifier: str = "shapes-resnet"
    images: str = "shapes"
    counts: Mapping[str, int] | None = None
    batch: int = 16
    epoch: int = 24
    sparsities: tuple[float, ...] = (0.7, 0.8, 0.9)
    seeds: tuple[int, ...] = (0,)
    rates: Mapping[str, float] = field(
        default_factory=lambda: {"norms": 0.03, "linear_probing": 0.03, "perp": 0.03, "full": 0.01}
    )
    soups: tuple[int, ...] = (3,)
    cycles: tuple[int, ...] = (2,)
    ranks: tuple[int, ...] = (2,)
    settle: bool = True


@dataclass(frozen=True)
class Scale:
    """How large the figures are computed.

    `models` are those of every figure, None those of the papers' own tables. `iterations` are shorter
    retrainings than `steps`, in figures over iterations. `sizes` are batch and accumulation of the models,
    by name, for which these are others. `seeds` are those of figures of perplexity,
    `asked_seeds` and `asked_sparsities` of those of `tasks`, which take longer. `vision` None leaves out the
    figures of image classifiers.
    """

    name: str
    models: tuple[str, ...] | None = ("tiny-opt",)
    text: str = "storyworld"
    dtype: str = "float32"
    tasks: str = "counting,facts"
    tasks_dir: str | None = None
    sparsities: tuple[float, ...] = (0.3, 0.5, 0.7)
    asked_sparsities: tuple[float, ...] = (0.5, 0.7)
    seeds: tuple[int, ...] = (0, 1, 2)
    asked_seeds: tuple[int, ...] = (0,)
    steps: int = 100
    iterations: tuple[int, ...] = (5, 20, 50)
    batch: int = 4
    accumulate: int = 1
    sizes: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    rank: int = 4
    unit_steps: int = 100
    unit_lr: float = 1e-2
    vision: Vision | None = Vision(counts={"train": 2000, "validation": 200, "test": 600})

    @property
    def of_the_papers(self) -> bool:
        """Whether the models are those of the papers, so that values may be compared, not only shapes."""
        return self.models is None

    def retraining(self, **changes: Any) -> dict[str, Any]:
        """The settings of `Experiment` that all retrainings of this scale share, of a model if it is told."""
        name = Path(changes.get("model", "")).name
        batch, accumulate = self.sizes.get(name, (self.batch, self.accumulate))
        common = {"steps": self.steps, "batch": batch, "accumulate": accumulate}
        return {"text": self.text, "dtype": self.dtype, **common, **changes}


_LARGE: dict[str, Any] = {
    "text": "c4-wikitext2",
    "tasks": "papers",
    "sparsities": (0.3, 0.4, 0.5, 0.6, 0.7),
    "asked_sparsities": (0.3, 0.4, 0.5, 0.6, 0.7),
    "asked_seeds": (0, 1, 2),
    "steps": 1000,
    "iterations": (10, 50, 100, 300),
    # PERP v1, appendix.
    "batch": 2,
    "accumulate": 4,
    "sizes": {"opt-30b": (1, 2)},
    "rank": RANK,
    "unit_steps": 200,
    "unit_lr": 1e-3,
    # ImageNet has to be at hand: --classifier and --images name it.
    "vision": None,
}
SCALES = {
    "embedded": Scale("embedded"),
    # For a notebook: fewer points of the same figures.
    "quick": Scale(
        "quick",
        sparsities=(0.5, 0.7),
        tasks="facts",
        asked_sparsities=(0.7,),
        seeds=(0,),
        steps=40,
        iterations=(5, 20),
        unit_steps=20,
        vision=Vision(
            counts={"train": 320, "validation": 100, "test": 300}, batch=16, epoch=6, sparsities=(0.7, 0.9)
        ),
    ),
    "opt-125m": Scale("opt-125m", models=("facebook/opt-125m",), **_LARGE),
    "paper": Scale("paper", models=None, dtype="bfloat16", **_LARGE),
}
# For real networks: an epoch of CIFAR-10 in batches of 128.
REAL_VISION = Vision(
    batch=128, epoch=390, sparsities=(0.5, 0.6, 0.7, 0.8, 0.9, 0.95), seeds=(0, 1, 2), soups=(3, 5, 10),
    cycles=(2, 3, 4, 5), ranks=(1, 2, 5, 10), settle=False,
    rates={"norms": 0.1, "linear_probing": 0.1, "perp": 0.1, "full": 0.03},
)  # fmt: skip


def scale_of(
    name: str | Scale,
    *,
    text: str | None = None,
    tasks_dir: str | None = None,
    classifier: str | None = None,
    images: str | None = None,
    dtype: str | None = None,
) -> Scale:
    """The scale of a name, or that of a local folder with a language model, as OPT-125M's.

    A folder with the name of a model of the papers, such as opt-2.7b, is taken for a copy of that. `text`,
    `tasks_dir` and `dtype` replace the scale's; `classifier` and `images` are what the figures of image
    classifiers are computed with, in epochs of 390 batches of 128.

    Raises ValueError for a name that is neither, for one of classifier and images without the other, and for
    an unknown dtype.

    >>> scale_of("opt-125m").models, scale_of("embedded", text="c4").text
    (('facebook/opt-125m',), 'c4')
    """
    if isinstance(name, Scale):
        found = name
    elif name in SCALES:
        found = SCALES[name]
    elif Path(name).expanduser().is_dir():
        found = dataclasses.replace(SCALES["opt-125m"], name=Path(name).name, models=(str(name),))
    else:
        near = difflib.get_close_matches(name, SCALES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        valid = f"Valid are {', '.join(SCALES)} and the path of a folder with a language model"
        raise ValueError(f"unknown scale {name!r}{hint} {valid}")
    changes: dict[str, Any] = {}
    if text is not None:
        check_text(text)
        changes["text"] = text
    if tasks_dir is not None:
        changes["tasks_dir"] = tasks_dir
    if dtype is not None:
        check_dtype(dtype)
        changes["dtype"] = dtype
    if (classifier is None) != (images is None):
        raise ValueError("give both classifier and images, or neither: a network is measured on its pictures")
    if classifier is not None and images is not None:
        changes["vision"] = dataclasses.replace(REAL_VISION, classifier=classifier, images=images)
    return dataclasses.replace(found, **changes)
