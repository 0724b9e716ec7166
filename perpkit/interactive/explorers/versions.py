"""A model in three versions, dense, pruned and shortly retrained, made once and kept."""

import copy
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ...experiments.shared import Cancelled
from ...pruning.masks import Masks
from ...pruning.prune import prune
from ...retraining.loop.retrain import retrain
from ...retraining.loop.settings import check_whole
from ...retraining.loop.tasks import Data
from ...sources.classifiers import load_classifier
from ...sources.embedded import EMBEDDED_CLASSIFIERS
from ...sources.images import load_images
from ...sources.models import load_model
from ...sources.text import Text, load_text

RETRAININGS = ("biases+norms", "biases", "norms", "full")
SPARSITIES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
# Of models that have been retrained, for coming back to them at once.
BYTES_KEPT = 2**30


@dataclass
class Versions:
    """The dense model, and what pruning by magnitude and a short retraining make of it.

    Every layer loses the same share. `settings` are those of each retraining, `rates` its learning rates by
    subset. The dense model is not
    touched; of the others as many are kept as fit in a gigabyte, at least one.
    """

    dense: nn.Module
    train: Data
    settings: dict[str, Any]
    rates: dict[str, float]
    _pruned: tuple[float, nn.Module, Masks] | None = field(default=None, repr=False)
    _retrained: OrderedDict[tuple[float, str], nn.Module] = field(default_factory=OrderedDict, repr=False)

    @property
    def steps(self) -> int:
        """The length of a retraining."""
        return self.settings["steps"]

    def pruned(self, sparsity: float) -> nn.Module:
        """The pruned model; not to be changed."""
        return self._masked(sparsity)[0]

    def retrained(self, sparsity: float, subset: str, cancelled: Callable[[], bool]) -> nn.Module:
        """The pruned and retrained model; not to be changed.

        Raises Cancelled when `cancelled()`, asked before each step, says so.
        """
        key = sparsity, subset
        if key not in self._retrained:
            pruned, masks = self._masked(sparsity)
            model = copy.deepcopy(pruned)
            settings = {**self.settings, "subset": subset, "lr": self.rates[subset]}
            retrain(model, self.train, masks=masks, progress=False, cancelled=cancelled, **settings)
            if cancelled():
                raise Cancelled
            make_room(self._retrained, [model])
            self._retrained[key] = model
        self._retrained.move_to_end(key)
        return self._retrained[key]

    def has(self, sparsity: float, subset: str) -> bool:
        """Whether the retrained model is there already."""
        return (sparsity, subset) in self._retrained

    def _masked(self, sparsity: float) -> tuple[nn.Module, Masks]:
        if self._pruned is None or self._pruned[0] != sparsity:
            model = copy.deepcopy(self.dense)
            # Of a classifier prune would take one threshold for all, which leaves the first layers alone.
            masks = prune(model, "magnitude", sparsity=sparsity, allocation="uniform", progress=False)
            self._pruned = sparsity, model, masks
        return self._pruned[1:]


def check_steps(steps: int | None) -> None:
    """Raise ValueError for a length of a retraining that is no whole number of at least 1; None is one.

    >>> check_steps(0)
    Traceback (most recent call last):
    ValueError: steps is 0; it must be at least 1
    """
    if steps is not None:
        check_whole(steps=steps)
        if steps < 1:
            raise ValueError(f"steps is {steps}; it must be at least 1")


def is_classifier(name: str) -> bool:
    """Whether an explorer's model looks at pictures.

    >>> is_classifier("shapes-resnet"), is_classifier("tiny-opt")
    (True, False)
    """
    return name in EMBEDDED_CLASSIFIERS


def make_room(kept: OrderedDict, models: Sequence[nn.Module]) -> None:
    """Drop the oldest values, each models like these, so that with these one more fits in a gigabyte.

    >>> make_room(kept := OrderedDict(a=1), [nn.Linear(2, 2)])
    >>> len(kept)
    1
    """
    size = sum(p.numel() * p.element_size() for model in models for p in model.parameters())
    while kept and len(kept) + 1 > BYTES_KEPT // max(1, size):
        kept.popitem(last=False)


def picture_versions(name: str, steps: int | None = None) -> Versions:
    """Versions of the embedded classifier, retrained on the shapes.

    >>> versions = picture_versions("shapes-resnet")
    >>> versions.steps, len(versions.train[0])
    (40, 2048)
    """
    check_steps(steps)
    images = load_images("shapes", counts={"train": 2048, "validation": 10, "test": 10}, progress=False)
    settings = {"steps": 40 if steps is None else steps, "batch": 64, "optimizer": "sgd"}
    rates = {"biases+norms": 0.05, "biases": 0.05, "norms": 0.05, "full": 0.03}
    return Versions(load_classifier(name), images.train, settings, rates)


def text_versions(
    name: str, steps: int | None = None, *, test: int | None = None
) -> tuple[Versions, Any, Text]:
    """Versions of a language model, its tokenizer, and the story world as that cuts it.

    The test split has `test` windows, as many as in a sweep unless told.

    >>> versions, tokenizer, text = text_versions("tiny-opt", test=16)
    >>> versions.steps, len(tokenizer), len(text.test)
    (80, 1024, 16)
    """
    check_steps(steps)
    dense, tokenizer = load_model(name)
    windows = {"train": 256, "calibration": 1, **({} if test is None else {"test": test})}
    text = load_text("storyworld", tokenizer, windows=windows)
    rates = {"biases+norms": 0.03, "biases": 0.1, "norms": 0.03, "full": 3e-3}
    return Versions(dense, text.train, {"steps": 80 if steps is None else steps}, rates), tokenizer, text
