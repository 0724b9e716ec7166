"""What a model is retrained on: token windows or labelled inputs, and its loss on some of them."""

import copy
import math
import sys

import torch
from torch import nn

from ...pruning.layers import is_language_model
from ...sources.text import check_windows
from .checkpoint import checksum
from .evaluating import evaluating
from .loss import Distillation, language_loss, plain_head, rows_loss
from .settings import Augment

Data = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


class Windows:
    """Next-token prediction on token windows `[n, length]`."""

    # A larger mean loss is a perplexity that no float can hold.
    limit, beyond = math.log(sys.float_info.max), " (an infinite perplexity)"

    def __init__(
        self, model: nn.Module, windows: torch.Tensor, dense: nn.Module | None, distillation: Distillation
    ):
        self.data = (windows,)
        self.model, self.head = model, plain_head(model)
        self.teacher = None if dense is None else (dense, plain_head(dense), distillation)

    def teacher_identity(self) -> str:
        """What tells one distillation from another."""
        return _identity(self.teacher[0], self.teacher[2]) if self.teacher else ""

    def loss(
        self,
        called: nn.Module,
        index: torch.Tensor,
        device: torch.device,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """The mean loss of some windows; the model is called through `called`, a wrapper or itself."""
        tokens = self.data[0][index.to(self.data[0].device)].to(device)
        return language_loss(called, self.model, tokens, self.head, self.teacher)


class Labelled:
    """Classification of inputs `[n, ...]` with labels `[n]`; outputs are logits or have them."""

    limit, beyond = math.inf, ""

    def __init__(
        self,
        data: tuple[torch.Tensor, torch.Tensor],
        dense: nn.Module | None,
        distillation: Distillation,
        augment: Augment | None = None,
    ):
        self.data, self.dense, self.distillation, self.augment = data, dense, distillation, augment

    def teacher_identity(self) -> str:
        """What tells one distillation from another."""
        return _identity(self.dense, self.distillation) if self.dense else ""

    def loss(
        self,
        called: nn.Module,
        index: torch.Tensor,
        device: torch.device,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """The mean loss of some inputs, augmented when there is a generator for it."""
        inputs, labels = (part[index.to(part.device)].to(device) for part in self.data)
        if self.augment is not None and generator is not None:
            inputs = _augmented(self.augment, inputs, generator)
        teacher = None
        if self.dense is not None:
            with torch.no_grad():
                teacher = _logits(self.dense, inputs)
        return rows_loss(_logits(called, inputs), labels, teacher, self.distillation) / len(labels)


def make_task(
    model: nn.Module,
    data: Data,
    device: torch.device,
    dense: nn.Module | None,
    distillation: Distillation,
    augment: Augment | None = None,
) -> Windows | Labelled:
    """The task that the data stands for, on the device where it runs.

    Raises ValueError for data that does not fit the model, a dense model of another kind or elsewhere, and
    augmentation of token windows.

    >>> data = torch.zeros(4, 2), torch.arange(4) % 3
    >>> task = make_task(nn.Linear(2, 3), data, torch.device("cpu"), None, Distillation())
    >>> type(task).__name__
    'Labelled'
    """
    language = is_language_model(model)
    if dense is not None:
        _check_dense(model, dense, device)
        dense = _copy_sharing(dense).eval()
    if language and not isinstance(data, tuple):
        if augment is not None:
            raise ValueError("augment is for labelled inputs; token windows are not augmented, leave it out")
        check_windows(model, data)
        return Windows(model, data, dense, distillation)
    if language or not (isinstance(data, tuple) and len(data) == 2):
        wanted = "token windows [n, length]" if language else "a tuple (inputs, labels)"
        raise ValueError(
            f"the data is a {type(data).__name__}; a {type(model).__name__} learns from {wanted}"
        )
    _check_labelled(model, *data)
    return Labelled(data, dense, distillation, augment)


def _check_dense(model: nn.Module, dense: nn.Module, device: torch.device) -> None:
    if dense is model:
        raise ValueError(
            "distill is the model that is retrained; give the dense model, a copy before pruning"
        )
    if is_language_model(dense) != is_language_model(model):
        raise ValueError(f"cannot distil a {type(model).__name__} from a {type(dense).__name__}")
    there = next(dense.parameters()).device
    if there != device:
        raise ValueError(f"the dense model is on {there} and the retraining on {device}; move it there")


def _check_labelled(model: nn.Module, inputs: torch.Tensor, labels: torch.Tensor) -> None:
    if labels.ndim != 1 or labels.dtype != torch.int64 or len(labels) != len(inputs) or len(labels) == 0:
        raise ValueError(
            f"labels have shape {tuple(labels.shape)} and are {labels.dtype} beside {len(inputs)} inputs; "
            "want one int64 label for each"
        )
    with evaluating(model):
        classes = _logits(model, inputs[:1].to(next(model.parameters()).device)).shape[-1]
    lowest, highest = int(labels.min()), int(labels.max())
    if lowest < 0 or highest >= classes:
        raise ValueError(
            f"a label is {lowest if lowest < 0 else highest} but the model has {classes} classes, 0 to "
            f"{classes - 1}"
        )


def _augmented(augment: Augment, inputs: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    made = augment(inputs, generator)
    if not isinstance(made, torch.Tensor) or len(made) != len(inputs) or made.dtype != inputs.dtype:
        said = (
            f"{tuple(made.shape)} of {made.dtype}" if isinstance(made, torch.Tensor) else type(made).__name__
        )
        raise ValueError(
            f"augment made {said} of inputs {tuple(inputs.shape)} of {inputs.dtype}; it must return as many "
            "of the same dtype"
        )
    return made


def _identity(dense: nn.Module, distillation: Distillation) -> str:
    # With what is stored beside the parameters: batch statistics move its predictions as well.
    return f"{distillation} {sum(checksum(dense.state_dict()).values())}"


def _logits(model: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    output = model(inputs)
    return output if isinstance(output, torch.Tensor) else output.logits


def _copy_sharing(model: nn.Module) -> nn.Module:
    """A copy with the same tensors but modules of its own, whose modes and head nobody else looks at."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
