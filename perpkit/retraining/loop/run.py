"""One retraining in progress: its steps, the last good weights, and its checkpoint."""

import hashlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pandas as pd
import torch
from torch import nn

from .checkpoint import Checkpoint, checksum, identity
from .evaluating import evaluating
from .machine import Machine
from .noise import Noise
from .settings import Settings
from .tasks import Labelled, Windows
from .weights import Weights


class Run:
    """The optimiser, the order of the batches and the history of one retraining."""

    def __init__(self, machine: Machine, task: Windows | Labelled, weights: Weights, settings: Settings):
        self.machine, self.task, self.weights, self.settings = machine, task, weights, settings
        self.history: list[tuple[int, float, float]] = []
        self.model: nn.Module = machine.model
        self.called, self.optimizer = machine.prepare(weights)
        self.noise = Noise(self.model, machine.device, settings.seed)
        self.file: Checkpoint | None = None
        self._begin(0)

    def _begin(self, done: int) -> None:
        """Stand after so many steps: the order of the batches and the weights that are good so far."""
        per_step = self.settings.accumulate * self.machine.processes
        batches = batch_order(len(self.task.data[0]), self.settings.batch, self.settings.seed)
        self.order = itertools.islice(batches, done * per_step, None)
        self.latest: torch.Tensor | None = None
        self._keep(done)

    def step(self) -> tuple[int, float]:
        """One step: its number, counted from 1, and the loss before it.

        Raises ValueError when the loss or the weights are not finite; the last good weights are back then.
        """
        done = len(self.history)
        rate = self.settings.rates[done]
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss = self._gradients(done)
        self._require_loss(loss, f"at step {done + 1}")
        self._keep(done)
        self.machine.step(self.optimizer, self.weights)
        self.weights.settle()
        self._require(self.weights.finite(), f"weights became infinite or NaN in step {done + 1}")
        self.weights.check()
        self.history.append((done + 1, loss, rate))
        if self.file is not None and len(self.history) % self.every == 0:
            # A checkpoint must never hold weights that have exploded.
            self._look()
            self._save()
        return done + 1, loss

    def _gradients(self, done: int) -> float:
        """Gradients of the mean loss of this step's batches, and that loss over all processes."""
        machine, count = self.machine, self.settings.accumulate
        self.optimizer.zero_grad(set_to_none=True)
        batches = list(itertools.islice(self.order, count * machine.processes))
        losses = []
        for i in range(count):
            # Batch by batch in turn: the processes read together what one would read alone.
            number = i * machine.processes + machine.rank
            self.latest = batches[number]
            # Counted from the start of the run: a resumed run or other processes draw the same.
            drawn = done * len(batches) + number
            generator = self._generator(drawn)
            with self.noise.batch(drawn):
                with machine.forward(self.called, last=i == count - 1):
                    loss = self.task.loss(self.called, self.latest, machine.device, generator) / count
                machine.backward(loss)
            self.weights.collect()
            losses.append(loss.detach())
        return machine.mean(torch.stack(losses).sum())

    def _generator(self, number: int) -> torch.Generator | None:
        """What the augmentation of a batch draws from."""
        if self.settings.augment is None:
            return None
        # A digest: seeds side by side would share the streams of their batches.
        seed = hashlib.sha256(f"augment {self.settings.seed} {number}".encode()).digest()[:7]
        return torch.Generator().manual_seed(int.from_bytes(seed, "big"))

    def _keep(self, done: int) -> None:
        self.weights.keep()
        self.good = done

    def _require_loss(self, loss: float, when: str) -> None:
        beyond = self.task.beyond if math.isfinite(loss) else ""
        self._require(loss < self.task.limit, f"the loss became {loss:g}{beyond} {when}")

    def _require(self, healthy: bool, trouble: str) -> None:
        if healthy:
            return
        self.weights.restore()
        lr, left = (
            self.settings.lr,
            "is as it was" if self.good == 0 else f"has the weights of step {self.good}",
        )
        raise ValueError(f"{trouble} with lr={lr:g}; the model {left}. Try lr={lr / 10:g}")

    def stopped(self, stop: Callable[[Sequence[float]], bool] | None) -> bool:
        """Whether the early stop, a function of the losses so far, ends the run."""
        return stop is not None and bool(self.history) and stop([loss for _, loss, _ in self.history])

    def cancelled(self, cancelled: Callable[[], bool] | None) -> bool:
        """Whether any process has been cancelled."""
        return cancelled is not None and self.machine.mean(torch.tensor(float(cancelled()))) > 0

    def finish(self) -> None:
        """Look at what the last step has led to, and write the checkpoint."""
        self._look()
        if self.file is not None:
            self._save()
        self.weights.check()

    def _look(self) -> None:
        """Require a healthy loss of the weights as they are, which no step has seen yet."""
        if self.latest is None:
            return
        with evaluating(self.model), self.machine.forward(self.called, last=True):
            loss = self.machine.mean(self.task.loss(self.called, self.latest, self.machine.device))
        self._require_loss(loss, f"after step {len(self.history)}")

    def table(self) -> pd.DataFrame:
        """The finished steps."""
        return pd.DataFrame(self.history, columns=["step", "loss", "lr"])

    def close(self) -> None:
        """Give the model back as it came, masked even when a step was interrupted."""
        self.weights.settle()
        self.machine.close(self.called)

    # --- the checkpoint ---------------------------------------------------------------------------

    def open(self, path: str | Path, every: int) -> None:
        """Keep the run in a file from now on, and go on from what the file holds.

        Raises ValueError for a file of another run and a model spread by FSDP.
        """
        if self.weights.spread():
            raise ValueError(
                "a checkpoint cannot hold a model that is spread over processes; use accelerator.save_state"
            )
        weights = self.weights
        same = identity(
            self.settings, self.model, weights.trained, weights.masks, self.task.data, weights.buffers
        )
        same |= {"distillation": self.task.teacher_identity(), "processes": str(self.machine.processes)}
        self.every, self.file = every, Checkpoint(path, same)
        self.start = checksum(dict(self.weights.trained))
        if (found := self.file.load()) is None:
            return
        if self.start not in (found["start"], found["now"]):
            raise ValueError(
                f"the checkpoint {str(path)!r} began from other weights; prune the same model in the same "
                "way to resume, or delete the file or name another to start from the beginning"
            )
        self.start = found["start"]
        self.weights.load(found["weights"])
        self.optimizer.load_state_dict(found["optimizer"])
        self.machine.scaler.load_state_dict(found["scaler"])
        self.history = [tuple(row) for row in found["history"]]
        self._begin(len(self.history))

    def _save(self) -> None:
        assert self.file is not None
        if self.machine.rank == 0:
            self.file.save(
                **{"start": self.start, "now": checksum(dict(self.weights.trained))},
                **{"weights": self.weights.state(), "optimizer": self.optimizer.state_dict()},
                **{"scaler": self.machine.scaler.state_dict(), "history": self.history},
            )


def batch_order(count: int, batch: int, seed: int) -> Iterator[torch.Tensor]:
    """Indices of each batch without end, everything once before anything comes again.

    >>> sorted(torch.cat(list(itertools.islice(batch_order(6, 2, seed=0), 3))).tolist())
    [0, 1, 2, 3, 4, 5]
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64)
    while True:
        while len(order) < batch:
            order = torch.cat([order, torch.randperm(count, generator=generator)])
        yield order[:batch]
        order = order[batch:]
