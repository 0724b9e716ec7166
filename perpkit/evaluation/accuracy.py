"""Accuracy: the share of pictures that a classifier gets right, also when they are corrupted."""

import math
from collections.abc import Callable

import pandas as pd
import torch
from torch import nn
from tqdm.auto import tqdm

from ..sources.corruptions import KINDS, SEVERITIES
from ..sources.images import Images


@torch.no_grad()
def accuracy(
    model: nn.Module,
    data: tuple[torch.Tensor, torch.Tensor],
    *,
    batch: int = 256,
    progress: bool = False,
    cancelled: Callable[[], bool] | None = None,
) -> float:
    """Top-1 accuracy: the share of inputs whose highest logit is that of their label.

    `data` are inputs `[n, ...]` and int64 labels `[n]`; the model's outputs are logits or have them. Its mode
    is left as it was. Returns NaN when cancelled.

    Raises ValueError for data of another form, or a label that the model has no class for.

    >>> import perpkit.sources.images as sources
    >>> images = sources.load_images("shapes", counts={"train": 10, "validation": 10, "test": 50})
    >>> always_heart = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))
    >>> _ = always_heart[1].weight.data.zero_(), always_heart[1].bias.data.copy_(torch.eye(10)[7])
    >>> accuracy(always_heart, images.test)
    0.1
    """
    if isinstance(data, Images):
        raise ValueError("these are all splits; give one of them, such as images.test")
    if not (isinstance(data, tuple) and len(data) == 2):
        raise ValueError(f"the data is a {type(data).__name__}; give a tuple (inputs, labels)")
    inputs, labels = data
    if labels.ndim != 1 or labels.dtype != torch.int64 or len(labels) != len(inputs) or not len(labels):
        raise ValueError(
            f"labels have shape {tuple(labels.shape)} and are {labels.dtype} beside {len(inputs)} inputs; "
            "want one int64 label for each"
        )
    if batch < 1:
        raise ValueError(f"batch is {batch}; it must be at least 1")
    parameter = next(model.parameters())
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    right = 0
    try:
        bar = tqdm(inputs.split(batch), desc="accuracy", disable=not progress, leave=False)
        for some, wanted in zip(bar, labels.split(batch), strict=True):
            if cancelled is not None and cancelled():
                bar.close()
                return math.nan
            # A network in 16 bits takes pictures in 16 bits; tokens stay whole numbers.
            output = model(some.to(parameter) if some.is_floating_point() else some.to(parameter.device))
            logits = output if isinstance(output, torch.Tensor) else output.logits
            lowest, highest = int(wanted.min()), int(wanted.max())
            if lowest < 0 or highest >= logits.shape[-1]:
                raise ValueError(
                    f"a label is {lowest if lowest < 0 else highest} but the model has {logits.shape[-1]} "
                    f"classes, 0 to {logits.shape[-1] - 1}"
                )
            right += int((logits.argmax(-1).cpu() == wanted.cpu()).sum())
    finally:
        for module, mode in modes:
            module.training = mode
    return right / len(labels)


def corrupted_accuracy(
    model: nn.Module,
    images: Images,
    *,
    batch: int = 256,
    seed: int = 0,
    progress: bool = True,
    cancelled: Callable[[], bool] | None = None,
) -> pd.DataFrame:
    """Top-1 accuracy on the test split corrupted in each way: columns kind, severity and accuracy, 20 rows.

    The mean of the accuracies is the corrupted test accuracy. Cancelled, it has the finished rows only.

    >>> import perpkit.sources.images as sources
    >>> images = sources.load_images("shapes", counts={"train": 10, "validation": 10, "test": 10})
    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))
    >>> found = corrupted_accuracy(model, images, progress=False)
    >>> len(found), bool(0 <= found.accuracy.mean() <= 1)
    (20, True)
    """
    rows = []
    ways = [(kind, severity) for kind in KINDS for severity in SEVERITIES]
    for kind, severity in tqdm(ways, desc="corrupted accuracy", disable=not progress, leave=False):
        found = math.nan
        if cancelled is None or not cancelled():
            data = images.corrupted(kind, severity, seed)
            found = accuracy(model, data, batch=batch, cancelled=cancelled)
        if math.isnan(found):
            break
        rows.append((kind, severity, found))
    return pd.DataFrame(rows, columns=["kind", "severity", "accuracy"])
