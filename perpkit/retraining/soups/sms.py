"""Sparse Model Soups: prune, retrain several copies, average them, and again from the average."""

import copy
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn
from tqdm.auto import tqdm

from ...pruning.masks import Masks
from ..iterative import checked_pruning, geometric_sparsities, latched
from ..loop.tasks import Data
from ..schedules import check_share, started
from .candidates import DEFAULTS, Vary
from .comparison import (
    COLUMNS,
    ITERATIVE,
    check_baselines,
    check_functions,
    check_held_out,
    compared,
    held_out,
)
from .cycles import Cycles, Plan, Score, SoupCycle
from .files import opened
from .recipe import held_out_identity, pruning_identity, recipe

__all__ = ["Soup", "SoupCycle", "sms"]

SOUPS = ("uniform", "greedy")


@dataclass(frozen=True)
class Soup:
    """What Sparse Model Soups have made: the averaged `model`, sparse as its `masks` say.

    `candidates` has a row for each finished retraining: cycle, candidate, sparsity, what it was retrained
    with (seed, lr, weight_decay, steps), its last loss, its seconds, whether it was chosen for the average,
    and in a greedy soup its held-out score. `history` has their steps. `comparison` has the columns method,
    score, seconds and steps, its first row being the soup's. `cycles` are finished: fewer than asked for when
    the run was cancelled, and the model is then the average of the last of them. `models` are the candidates
    of the last finished cycle, as their retraining left them, and `parent` the pruned model that they started
    from, for `distances`, `segment`, `plane`, `Ensemble` and `average`: m + 1 models more in memory, on the
    device of the soup.
    """

    model: nn.Module
    masks: Masks
    candidates: pd.DataFrame
    history: pd.DataFrame
    comparison: pd.DataFrame
    cycles: int
    models: list[nn.Module]
    parent: nn.Module | None

    def __repr__(self) -> str:
        cycles = f"{self.cycles} cycle{'' if self.cycles == 1 else 's'}"
        return f"Soup({cycles}, {len(self.candidates)} candidates, {self.masks})"


def sms(
    model: nn.Module,
    criterion: str,
    data: Data,
    *,
    sparsity: float,
    m: int,
    cycles: int,
    vary: Vary = "seed",
    soup: str = "uniform",
    score: Score | None = None,
    validation: Data | None = None,
    evaluate: Score | None = None,
    baselines: Sequence[str] = (),
    adapter: str | None = None,
    rank: int = 16,
    alpha: float = 32.0,
    share: float | None = None,
    calibration: torch.Tensor | None = None,
    pruning: Mapping[str, Any] | None = None,
    executor: Executor | None = None,
    folder: str | Path | None = None,
    seed: int = 0,
    progress: bool = True,
    on_candidate: Callable[[dict[str, Any]], None] | None = None,
    on_cycle: Callable[[SoupCycle], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
    **retraining: Any,
) -> Soup:
    """Sparse Model Soups (SMS; Zimmer et al. 2024): iterative pruning that goes on from averages.

    Each cycle prunes as `imp` does, retrains m copies that differ in one thing, and goes on from their
    average, which has their common mask; batch normalisations that the retraining moves are re-estimated for
    it in one pass over 2048 inputs of `data`, or all if there are fewer, in batches and augmented as in the
    retraining. The given model stays as it is. With m = 1 nothing is averaged and SMS is `imp`.

    - `data`, `criterion`, `calibration` and `pruning` are those of `imp`, the further keywords those of
      `retrain`, `subset` and `lr` at least; `schedule="allr"` with `share` as there.
    - `vary` is what candidates differ in: `"seed"`, the order of the batches; `"lr"` or `"weight_decay"`,
      from half to double; `"steps"`, from half to one and a half times; or a mapping from one of them to its
      m values. Explicit seeds are shifted in later cycles, so that none comes twice.
    - `soup="greedy"` averages those that do not lower a held-out score (`greedy`): `score(model)`, higher is
      better, or minus the loss on `validation`, more data of the kind of `data`.
    - `adapter="mask_lora"` (or another that merges, with `rank` and `alpha`; see `attach`) retrains adapters,
      `subset="lora"`, which are merged before the weights are averaged.
    - `evaluate(model)`, by default the score, measures the result, and the `baselines` of the same budget:
      `"imp"` (m = 1), `"imp_m"` (m = 1 with the steps of all m together), the `"best"` candidate of the last
      cycle by the held-out score, their `"mean"`, and their output `"ensemble"` (`Ensemble`). All are scored
      alike: where the soup's batch statistics are re-estimated, so are, in copies, those of every other
      model. Seconds are those of pruning, retraining and averaging, as if all candidates ran one after the
      other.
    - `executor` is any `concurrent.futures.Executor`, on which the candidates of a cycle run side by side.
      Its workers must see the folder; they calculate with as many threads each as this process does, so
      workers that share a CPU are faster after `torch.set_num_threads(1)`.
    - `folder` keeps every finished candidate: the same call goes on where it was killed; functions such as
      `score` are told from others by their names. On a CPU the result is the same to the bit, resumed or not,
      on any executor or none.

    `on_candidate(row)` is called for every finished candidate, those found in the folder too, and
    `on_cycle(SoupCycle(...))` after every cycle. When `cancelled()`, asked before every step, says True, what
    is finished is returned. An exception, Ctrl-C too, carries it as `soup`.

    Raises ValueError for whatever `prune`, `retrain` and `attach` do not accept, m or cycles below 1, bad
    `vary`, a folder of another run, and workers that do not see the folder.

    >>> import perpkit as pk
    >>> dense, tokenizer = pk.load_model("tiny-opt", device="cpu")
    >>> text = pk.load_text("storyworld", tokenizer, windows={"train": 16})
    >>> settings = {"subset": "biases", "steps": 2, "lr": 1e-2, "progress": False}
    >>> soup = sms(dense, "magnitude", text.train, sparsity=0.6, m=3, cycles=2, **settings)
    >>> soup.masks, len(soup.candidates), soup.candidates["seed"].tolist()
    (Masks(18 matrices, sparsity 0.6000), 6, [0, 1, 2, 3, 4, 5])
    """
    targets = geometric_sparsities(sparsity, cycles)
    _check_soup(soup, score, validation)
    check_functions(evaluate=evaluate, score=score)
    asked, pruning = latched(cancelled), checked_pruning(pruning)
    if executor is not None and not isinstance(executor, Executor):
        raise ValueError(f"executor is {executor!r}; give a concurrent.futures.Executor, or None")
    if check_share(retraining.get("schedule"), share):
        retraining = started(retraining, 1.0)
    made = recipe(model, data, m, vary, seed, adapter, rank, alpha, retraining)
    same = {"criterion": criterion, "sparsity": repr(float(sparsity)), "cycles": str(cycles), "soup": soup}
    same |= made.identity() | pruning_identity(calibration, pruning)
    if share is not None:
        # The starts follow from the models; without this the rates would be those of LLR.
        same["learning rates"] += f" allr {float(share)!r}"
    if soup == "greedy":
        same["held-out score"] = held_out_identity(score, validation)
    if validation is not None:
        check_held_out(made.dense, validation)
        score = held_out(validation, retraining.get("batch", DEFAULTS["batch"]))
    evaluate = evaluate or score
    check_baselines(baselines, evaluated=evaluate is not None, scored=score is not None)
    several = [settings["steps"] for settings in made.variation.settings()]
    total = cycles * (sum(several) + sum(made.steps(name) for name in set(baselines) & set(ITERATIVE)))
    bar = tqdm(total=total, desc="soup", unit="step", disable=not progress, leave=False)
    with bar, opened(folder, same) as path:
        options = {"calibration": calibration, "seed": seed, **pruning}
        plan = Plan(
            criterion, targets, options, data, made.common, made.adapter, executor, asked, bar.update, share
        )
        cooking = Cycles(plan, path / "sms", copy.deepcopy(made.dense), made.variation.candidates)
        cooking.greedy = score if soup == "greedy" else None
        cooking.on_candidate, cooking.on_cycle = on_candidate, on_cycle
        rows: list[dict[str, Any]] = []

        def iterative(name: str) -> Cycles:
            return Cycles(plan, path / name, copy.deepcopy(made.dense), made.alone(made.steps(name)))

        try:
            if cooking.run() and evaluate is not None:
                for row in compared(cooking, evaluate, score, baselines, iterative):
                    rows.append(row)
        except BaseException as error:
            error.soup = _soup(cooking, rows)  # type: ignore[attr-defined]
            raise
        return _soup(cooking, rows)


def _soup(cooking: Cycles, rows: list[dict[str, Any]]) -> Soup:
    tables = cooking.table(), cooking.history(), pd.DataFrame(rows, columns=COLUMNS)
    return Soup(cooking.model, cooking.masks, *tables, cooking.done, list(cooking.last()), cooking.parent())


def _check_soup(soup: str, score: Score | None, validation: Data | None) -> None:
    if soup not in SOUPS:
        raise ValueError(f"unknown soup {soup!r}; the soups are {' and '.join(SOUPS)}")
    if score is not None and validation is not None:
        raise ValueError("score and validation are both given; one of them says what is better")
    if soup == "greedy" and score is None and validation is None:
        raise ValueError(
            "a greedy soup needs held-out data: give validation=, or score=, a function of the model"
        )
