"""Checkpoints of a retraining: written whole or not at all, and taken up only by the same run."""

import functools
import hashlib
import os
import zlib
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...pruning.masks import Masks
from ..adapters.attach import adapter_masks, adapters_of
from .settings import Settings, check_whole

FORMAT = "perpkit retraining 1"
PARTS = {"same", "start", "now", "weights", "optimizer", "scaler", "history"}


class Checkpoint:
    """The file of one run: what the run is, and where it stands.

    `same` are digests of everything that the outcome depends on, by a name that an error can say.
    """

    def __init__(self, path: str | Path, same: dict[str, str]):
        self.path, self.same = Path(path).expanduser(), same

    def load(self) -> dict[str, Any] | None:
        """What `save` wrote, or None when there is no file yet.

        Raises ValueError for a file that is no checkpoint, or one of a run with other settings.
        """
        if not self.path.exists():
            return None
        try:
            found = torch.load(self.path, map_location="cpu", weights_only=True)
        # A damaged file raises whatever its bytes happen to lead to.
        except Exception as error:
            raise self._damaged() from error
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise ValueError(f"{str(self.path)!r} is no checkpoint of a retraining; name another file")
        if PARTS - set(found):
            raise self._damaged()
        others = [name for name in self.same if found["same"].get(name) != self.same[name]]
        if others:
            raise ValueError(
                f"the checkpoint {str(self.path)!r} belongs to a run with another {' and '.join(others)}; "
                "resume with the same, or delete the file or name another to start from the beginning"
            )
        return found

    def _damaged(self) -> ValueError:
        return ValueError(
            f"cannot read the checkpoint {str(self.path)!r}, it is damaged or something else. Delete it to "
            "start from the beginning"
        )

    def save(self, **state: Any) -> None:
        """Write the state; the old file stays until the new one is complete.

        Raises ValueError when it cannot be written.
        """
        partial = self.path.with_name(f"{self.path.name}.{os.getpid()}.part")
        try:
            torch.save({"format": FORMAT, "same": self.same, **state}, partial)
            os.replace(partial, self.path)
        except (OSError, RuntimeError) as error:
            partial.unlink(missing_ok=True)
            raise ValueError(
                f"cannot write the checkpoint {str(self.path)!r}: {error}. The model is as the finished "
                "steps left it, and an earlier checkpoint is still there"
            ) from error


def check_checkpoint(path: str | Path, every: int) -> None:
    """Raise ValueError where no checkpoint can be written, and for an interval that is no number of steps.

    >>> check_checkpoint("run.pt", every=10)
    """
    check_whole(checkpoint_every=every)
    if every < 1:
        raise ValueError(f"checkpoint_every is {every}; it is a number of steps, at least 1")
    file = Path(path).expanduser().absolute()
    if file.is_dir():
        raise ValueError(f"the checkpoint {str(path)!r} is a folder; name a file")
    if not file.parent.is_dir():
        raise ValueError(f"the checkpoint {str(path)!r} lies in a folder that does not exist; make it first")
    if not os.access(file.parent, os.W_OK):
        raise ValueError(
            f"the checkpoint {str(path)!r} lies in a folder that cannot be written; name another"
        )


def identity(
    settings: Settings,
    model: nn.Module,
    trained: dict[str, nn.Parameter],
    masks: Masks,
    data: tuple[torch.Tensor, ...],
    moved: Container[str] = (),
) -> dict[str, str]:
    """Digests of all that a run's outcome depends on but what it moves, which a checkpoint holds.

    It moves the `trained` parameters and the buffers called `moved`.

    >>> model = nn.Linear(2, 1)
    >>> settings, data = Settings(subset="biases", lr=0.1), (torch.zeros(1, 2),)
    >>> one = identity(settings, model, {"bias": model.bias}, Masks({}), data)
    >>> _ = model.weight.data.zero_()
    >>> two = identity(settings, model, {"bias": model.bias}, Masks({}), data)
    >>> [name for name in one if one[name] != two[name]]
    ['model']
    """
    named = {name: str(getattr(settings, name)) for name in ("subset", "batch", "accumulate", "seed", "clip")}
    named |= {name: str(getattr(settings, name)) for name in ("optimizer", "momentum", "weight_decay")}
    named |= {"autocast": str(settings.autocast), "learning rates": _digest(str(settings.rates).encode())}
    named["augment"] = _name(settings.augment)
    shapes = [(name, tuple(p.shape), str(p.dtype)) for name, p in model.named_parameters()]
    # Buffers that are not stored, such as tables of angles, follow from the rest or from the last call.
    stored = model.state_dict()
    buffers = {n: b for n, b in model.named_buffers() if n in stored and n not in moved}
    frozen = {name: p for name, p in model.named_parameters() if name not in trained} | buffers
    named["model"] = _digest(repr((shapes, checksum(frozen))).encode())
    named["masks"] = _digest(repr(checksum(dict(masks))).encode())
    named["data"] = _digest(repr(checksum({str(i): part for i, part in enumerate(data)})).encode())
    adapters = {name: str(adapter) for name, adapter in adapters_of(model).items()}
    named["adapters"] = _digest(repr((adapters, checksum(adapter_masks(model)))).encode())
    return named


def checksum(tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """A checksum of each tensor's bytes.

    >>> checksum({"a": torch.zeros(2)}) == checksum({"a": torch.tensor([0.0, 1.0])})
    False
    """
    return {
        name: zlib.crc32(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        for name, value in tensors.items()
    }


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _name(function: Callable | None) -> str:
    """What a function is called, the same in every process, for its address is not."""
    if isinstance(function, functools.partial):
        return f"{_name(function.func)} {function.args} {sorted(function.keywords.items())}"
    if function is None:
        return ""
    named: Any = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}.{named.__qualname__}"
