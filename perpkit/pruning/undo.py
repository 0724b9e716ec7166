"""Matrices as they were, in a temporary file, so that a run that fails halfway leaves the model as it was."""

import shutil
import tempfile
import warnings
from collections.abc import Iterable
from contextlib import suppress

import torch

from .layers import Matrix


class Undo:
    """Remembers matrices on the disk before they are changed: in memory they would double the model.

    The file lies in the folder for temporary files; where that is kept in memory, name another by TMPDIR.

    Warns when the disk has no room for all of them; then nothing is remembered, and `restore` does nothing.

    >>> from torch import nn
    >>> layer = nn.Linear(2, 1)
    >>> matrix, before = Matrix("weight", "weight", layer), layer.weight.detach().clone()
    >>> with Undo([matrix]) as undo:
    ...     undo.remember(matrix)
    ...     _ = nn.init.zeros_(layer.weight)
    ...     undo.restore()
    >>> torch.equal(layer.weight, before)
    True
    """

    def __init__(self, matrices: Iterable[Matrix]) -> None:
        self._needed = sum(m.part(m.weight()).numel() * m.weight().element_size() for m in matrices)
        self._changed: list[Matrix] = []

    def __enter__(self) -> "Undo":
        self._file = tempfile.TemporaryFile()
        free = shutil.disk_usage(tempfile.gettempdir()).free
        self._room = self._needed < free
        if not self._room:
            warnings.warn(
                f"the folder for temporary files has {free / 1e9:.1f} GB free and the weights take "
                f"{self._needed / 1e9:.1f} GB: an error halfway will leave the model partly pruned",
                stacklevel=2,
            )
        return self

    def __exit__(self, *_) -> None:
        with suppress(OSError):
            self._file.close()

    def remember(self, matrix: Matrix) -> None:
        """Keep the present values of a matrix that is about to be changed in place."""
        if self._room:
            values = matrix.part(matrix.weight()).detach().contiguous().cpu()
            self._file.write(values.view(torch.uint8).numpy().data)
            # Or a full disk would show only after the weights have changed.
            self._file.flush()
            self._changed.append(matrix)

    @torch.no_grad()
    def restore(self) -> None:
        """Write all remembered values back, wherever the weights are by now."""
        # A reader of its own: seeking in the writer would try again to write what did not fit.
        with open(self._file.fileno(), "rb", closefd=False) as file:
            file.seek(0)
            for matrix in self._changed:
                target = matrix.part(matrix.weight())
                buffer = bytearray(file.read(target.numel() * target.element_size()))
                target.copy_(torch.frombuffer(buffer, dtype=target.dtype).view(target.shape))
