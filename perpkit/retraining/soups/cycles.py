"""The prune, retrain and average cycles of a soup, kept in a folder from which a killed run goes on."""

import copy
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from torch import nn

from ...pruning.masks import Masks
from ...pruning.prune import prune
from ..loop.tasks import Data
from ..schedules import allr_start, started
from .average import States, average, greedy, put, tensors_of
from .candidates import VARIED, Candidate
from .files import about, read, write
from .statistics import reestimate, statistics_moved
from .work import Files, Work, here, on, stop_workers, untold

COLUMNS = ["cycle", "candidate", "sparsity", *VARIED, "loss", "seconds", "chosen", "score"]
Score = Callable[[nn.Module], float]


@dataclass(frozen=True)
class SoupCycle:
    """One cycle is done: what `on_cycle` is told; the model is the average, its to look at.

    `cycle` of `cycles` counts from 1; `chosen` are the numbers of the candidates in the soup, from 1.
    """

    cycle: int
    cycles: int
    sparsity: float
    masks: Masks
    model: nn.Module
    chosen: list[int]


@dataclass(frozen=True)
class Plan:
    """What the cycles of SMS and of its baselines share; `advance` is told how many steps are done.

    `share` is T_rt/T where the schedule is ALLR, which every cycle starts by what it has pruned; else None.
    """

    criterion: str
    targets: list[float]
    pruning: Mapping[str, Any]
    data: Data
    common: dict[str, Any]
    adapter: dict[str, Any] | None
    executor: Executor | None
    cancelled: Callable[[], bool]
    advance: Callable[[int], object]
    share: float | None = None


@dataclass
class Cycles:
    """The cycles of one method: `model` is that of the last finished cycle, belongs to them and changes.

    `greedy` is the held-out score of a greedy soup, None for a uniform one. One candidate a cycle is
    iterative pruning: nothing is averaged, and batch normalisations keep the statistics of the training.
    `reestimated` says whether those of the last average were estimated anew.
    """

    plan: Plan
    folder: Path
    model: nn.Module
    candidates: Callable[[int], list[Candidate]]
    greedy: Score | None = None
    on_candidate: Callable[[dict[str, Any]], None] | None = None
    on_cycle: Callable[[SoupCycle], None] | None = None
    masks: Masks = field(default_factory=lambda: Masks({}))
    done: int = 0
    reestimated: bool = False
    seconds: float = 0.0
    rows: list[dict[str, Any]] = field(default_factory=list)
    histories: list[pd.DataFrame] = field(default_factory=list)
    counted: dict[Candidate, int] = field(default_factory=dict)

    def run(self) -> bool:
        """Go through all cycles; False when cancelled before the end."""
        self.folder.mkdir(exist_ok=True)
        stop_workers(self.folder)
        for cycle, sparsity in enumerate(self.plan.targets, start=1):
            if (found := self._pruned(cycle, sparsity)) is None:
                return False
            model, masks = found
            files = self.files(cycle)
            if not self._retrained(model, masks, files, sparsity):
                return False
            chosen = self._averaged(model, masks, files)
            self.model, self.masks, self.done = model, masks, cycle
            if self.on_cycle is not None:
                cycles = len(self.plan.targets)
                self.on_cycle(SoupCycle(cycle, cycles, sparsity, masks, model, chosen))
        return True

    def files(self, cycle: int) -> dict[Candidate, Path]:
        """The file of each candidate of a cycle."""
        return {each: self._file(cycle, f"candidate-{each.number}") for each in self.candidates(cycle)}

    def last(self) -> Iterator[nn.Module]:
        """The candidates of the last finished cycle, as their retraining left them, one after the other."""
        for file in self.files(self.done).values() if self.done else ():
            yield _filled(self.model, read(file))

    def parent(self) -> nn.Module | None:
        """The pruned model that the candidates of the last finished cycle started from."""
        return _filled(self.model, read(self._file(self.done, "pruned"))) if self.done else None

    def like_the_average(self, model: nn.Module) -> nn.Module:
        """A model with batch statistics as this soup's are: a copy with new ones, or the model itself."""
        if self.reestimated:
            model = copy.deepcopy(model)
            self._reestimate(model)
        return model

    def steps(self) -> int:
        """The retraining steps of all cycles and candidates."""
        cycles = range(1, len(self.plan.targets) + 1)
        return sum(each.steps for cycle in cycles for each in self.candidates(cycle))

    def table(self) -> pd.DataFrame:
        """The finished candidates, a row each."""
        rows = sorted(self.rows, key=lambda row: (row["cycle"], row["candidate"]))
        return pd.DataFrame(rows, columns=COLUMNS)

    def history(self) -> pd.DataFrame:
        """The steps of the finished candidates."""
        columns = ["cycle", "candidate", "step", "loss", "lr"]
        if not self.histories:
            return pd.DataFrame(columns=columns)
        joined = pd.concat(self.histories, ignore_index=True)[columns]
        return joined.sort_values(["cycle", "candidate", "step"], ignore_index=True)

    # --- one cycle --------------------------------------------------------------------------------

    def _pruned(self, cycle: int, sparsity: float) -> tuple[nn.Module, Masks] | None:
        """The pruned model that the candidates start from, and its masks; None when cancelled."""
        file, kept = self._file(cycle, "pruned"), self._file(cycle, "masks")
        model = copy.deepcopy(self.model)
        if file.exists():
            # As it was, not pruned again: the candidates of one cycle share one parent to the bit.
            put(model, read(file))
            masks = Masks.load(kept)
            masks.check(model)
            self.seconds += about(file)["seconds"]
            return model, masks
        started = time.perf_counter()
        masks = prune(
            model,
            self.plan.criterion,
            sparsity=sparsity,
            masks=self.masks if cycle > 1 else None,
            progress=False,
            cancelled=self.plan.cancelled,
            **self.plan.pruning,
        )
        if self.plan.cancelled():
            return None
        seconds = time.perf_counter() - started
        self.seconds += seconds
        masks.save(kept)
        write(file, tensors_of(model), seconds=seconds)
        return model, masks

    def _retrained(self, model: nn.Module, masks: Masks, files: Files, sparsity: float) -> bool:
        """Retrain the candidates whose files are not there; False when cancelled before all are."""
        told: set[Candidate] = set()

        def tell_finished() -> None:
            for candidate, file in files.items():
                if candidate not in told and file.exists():
                    told.add(candidate)
                    self._tell(candidate, file, sparsity)

        tell_finished()
        missing = {candidate: file for candidate, file in files.items() if candidate not in told}
        if missing:
            plan = self.plan
            settings = self._settings(model, masks)
            advanced = self._advanced if plan.executor is None else untold
            work = Work(model, masks, plan.data, settings, plan.adapter, advanced)
            finished = (
                here(work, missing, plan.cancelled)
                if plan.executor is None
                else on(plan.executor, work, missing, plan.cancelled, self.folder)
            )
            try:
                with closing(finished):
                    for _ in finished:
                        tell_finished()
            finally:
                # Those that were done while the others were being stopped.
                tell_finished()
        if len(told) < len(files) and not self.plan.cancelled():
            raise ValueError(
                f"the executor's workers stopped before they were done: they must see the folder "
                f"{str(self.folder)!r}, and no other call may use it at the same time"
            )
        return len(told) == len(files)

    def _settings(self, model: nn.Module, masks: Masks) -> dict[str, Any]:
        """The common settings of this cycle's candidates; ALLR starts by what this cycle has pruned."""
        plan = self.plan
        if plan.share is None:
            return plan.common
        before, earlier = dict(self.model.named_parameters()), self.masks if self.done else None
        return started(plan.common, allr_start(model, masks, before, share=plan.share, earlier=earlier))

    def _advanced(self, candidate: Candidate) -> None:
        self.counted[candidate] = self.counted.get(candidate, 0) + 1
        self.plan.advance(1)

    def _tell(self, candidate: Candidate, file: Path, sparsity: float) -> None:
        told = about(file)
        history = pd.DataFrame(told["history"])
        row = {
            "cycle": candidate.cycle,
            "candidate": candidate.number,
            "sparsity": sparsity,
            **{name: getattr(candidate, name) for name in VARIED},
            "loss": float(history["loss"].iloc[-1]) if len(history) else float("nan"),
            "seconds": told["seconds"],
        }
        self.rows.append(row)
        self.histories.append(history.assign(cycle=candidate.cycle, candidate=candidate.number))
        self.seconds += told["seconds"]
        # Those of another process, or found in the folder, are told all at once.
        self.plan.advance(candidate.steps - self.counted.pop(candidate, 0))
        if self.on_candidate is not None:
            self.on_candidate(dict(row))

    def _averaged(self, model: nn.Module, masks: Masks, files: Files) -> list[int]:
        """Give the pruned model the average's values; returns the numbers of the candidates in it."""
        started = time.perf_counter()
        chosen, scores = list(range(len(files))), None
        states = [read(file) for file in files.values()]
        self.reestimated = len(files) > 1 and statistics_moved(model, states)
        prepare = self._reestimate if self.reestimated else _left_alone
        if len(files) == 1:
            put(model, states[0])
        elif self.greedy is None:
            put(model, average(states, masks))
            prepare(model)
        else:
            several = [_filled(model, states.pop(0)) for _ in files]
            soup, chosen, scores = greedy(several, self.greedy, masks, prepare)
            put(model, tensors_of(soup))
        masks.check(model)
        self.seconds += time.perf_counter() - started
        for index, candidate in enumerate(files):
            row = next(
                r for r in self.rows if (r["cycle"], r["candidate"]) == (candidate.cycle, candidate.number)
            )
            row |= {"chosen": index in chosen, "score": float("nan") if scores is None else scores[index]}
        return [index + 1 for index in chosen]

    def _reestimate(self, model: nn.Module) -> None:
        reestimate(model, self.plan.data, self.plan.common)

    def _file(self, cycle: int, what: str) -> Path:
        return self.folder / f"cycle-{cycle}-{what}.safetensors"


def _left_alone(model: nn.Module) -> None:
    """What has no batch statistics, or frozen ones, needs none."""


def _filled(model: nn.Module, state: States) -> nn.Module:
    """A copy of the model with other values."""
    filled = copy.deepcopy(model)
    put(filled, state)
    return filled
