"""The candidates of a cycle at work: here one after the other, or on any executor."""

import copy
import io
import time
import uuid
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...pruning.masks import Masks
from ..adapters.attach import attach
from ..adapters.merge import merge
from ..loop.retrain import retrain
from ..loop.tasks import Data
from .average import tensors_of
from .candidates import Candidate
from .files import write

SECONDS_BETWEEN_LOOKS = 0.1
# A training step takes no longer on the models of a lecture.
SECONDS_TO_STOP = 3.0

Files = Mapping[Candidate, Path]


def untold(candidate: Candidate) -> None:
    """Steps that nobody counts, as on an executor."""


@dataclass(frozen=True)
class Work:
    """What all candidates of a cycle share: the pruned model, its masks, the data and the other settings.

    `adapter` has the keywords of `attach`, None for a retraining of the weights themselves;
    `advanced(candidate)` is called after every step.
    """

    model: nn.Module
    masks: Masks
    data: Data
    common: dict[str, Any]
    adapter: dict[str, Any] | None
    advanced: Callable[[Candidate], None] = untold

    def retrained(self, candidate: Candidate, file: Path, cancelled: Callable[[], bool]) -> bool:
        """Retrain a copy and write its weights and history to the file; False when cancelled before."""
        started = time.perf_counter()
        model = copy.deepcopy(self.model)
        settings = {name: getattr(candidate, name) for name in ("seed", "lr", "weight_decay", "steps")}
        try:
            if self.adapter is not None:
                attach(model, self.masks, seed=candidate.seed, **self.adapter)
            history = retrain(
                model,
                self.data,
                masks=self.masks,
                progress=False,
                on_step=lambda step, loss: self.advanced(candidate),
                cancelled=cancelled,
                **settings,
                **self.common,
            )
            if len(history) < candidate.steps:
                return False
            if self.adapter is not None:
                merge(model)
            self.masks.check(model)
        except Exception as error:
            error.add_note(f"in candidate {candidate.number} of cycle {candidate.cycle}, {settings}")
            raise
        seconds = time.perf_counter() - started
        write(file, tensors_of(model), history=history.to_dict("list"), seconds=seconds)
        return True


def here(work: Work, files: Files, cancelled: Callable[[], bool]) -> Generator[Candidate, None, None]:
    """Retrain the candidates one after the other in this thread, and yield each when its file is there."""
    for candidate, file in files.items():
        if cancelled() or not work.retrained(candidate, file, cancelled):
            return
        yield candidate


def on(
    executor: Executor, work: Work, files: Files, cancelled: Callable[[], bool], folder: Path
) -> Generator[Candidate, None, None]:
    """Retrain the candidates on an executor, and yield each when its file is there.

    Workers look for a file in the folder before every step and stop when it is gone, as it is after this call
    however it ends; and when the run is killed and begun anew (`stop_workers`).
    """
    running = folder / f"running-{uuid.uuid4().hex[:8]}"
    packed = _packed(work)
    running.touch()
    waiting: dict[Future, Candidate] = {}
    try:
        for candidate, file in files.items():
            told = (packed, candidate, file, running, torch.get_num_threads())
            waiting[executor.submit(retrain_packed, *told)] = candidate
        while waiting and not cancelled():
            for future in wait(waiting, SECONDS_BETWEEN_LOOKS, FIRST_COMPLETED).done:
                candidate = waiting.pop(future)
                if future.result():
                    yield candidate
    finally:
        running.unlink(missing_ok=True)
        wait([future for future in waiting if not future.cancel()], SECONDS_TO_STOP)


def stop_workers(folder: Path) -> None:
    """Stop the workers of a run that was killed: nobody waits for them, and what they do is done again."""
    for left in folder.glob("running-*"):
        left.unlink(missing_ok=True)


def retrain_packed(packed: bytes, candidate: Candidate, file: Path, running: Path, threads: int) -> bool:
    """What a worker does: retrain one candidate, with as many threads as the run itself has.

    Another number of threads adds in another order, and the candidates would not be the same to the bit.
    """
    before = torch.get_num_threads()
    if before != threads:
        torch.set_num_threads(threads)
    try:
        work = torch.load(io.BytesIO(packed), weights_only=False)
        return work.retrained(candidate, file, lambda: not running.exists())
    finally:
        if before != threads:
            torch.set_num_threads(before)


def _packed(work: Work) -> bytes:
    """The work as bytes, for tensors sent as such lie in memory that is shared, and often scarce."""
    buffer = io.BytesIO()
    try:
        torch.save(work, buffer)
    except Exception as error:
        raise ValueError(
            f"an executor cannot be sent this model, data or settings: {error}. Functions among the settings "
            "must be importable by name, no lambdas"
        ) from error
    return buffer.getvalue()
