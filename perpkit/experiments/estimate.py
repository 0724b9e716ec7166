"""How long a grid will take, before it runs."""

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from tqdm.auto import tqdm

from ..evaluation.cost import device_name
from ..sources.models import best_device
from .experiment import Experiment
from .files import check_text
from .outdated import experiment_of
from .run import NotLoaded, prepared_key, run
from .store import Store

# Retraining steps of a trial, and of one before it: first steps load and prepare what later ones have.
TRIAL_STEPS, WARM_UP_STEPS = 4, 1


@dataclass(frozen=True)
class Estimate:
    """What a grid costs: `rows` in all, `finished` and `failed` ones in the store, those `left`, and
    about the `seconds` that these take one after the other on this machine.

    >>> print(Estimate(rows=65, finished=20, failed=0, left=45, seconds=150.0))
    65 rows: 20 finished, 45 left, about 2.5 min
    """

    rows: int
    finished: int
    failed: int
    left: int
    seconds: float

    def __str__(self) -> str:
        parts = [f"{self.finished} finished"]
        if self.failed:
            parts.append(f"{self.failed} failed")
        parts.append(f"{self.left} left")
        if self.left and not math.isnan(self.seconds):
            parts.append(f"about {_spoken(self.seconds)}")
        return f"{self.rows} row{'' if self.rows == 1 else 's'}: {', '.join(parts)}"


def estimate(
    experiments: Iterable[Experiment], store: Store | str | Path | None = None, *, progress: bool = False
) -> Estimate:
    """Count the rows of a grid and estimate the time of those that are left.

    Rows like it that the store holds from this device say how long a row takes, the retraining in proportion
    to its tokens; where there is none, one row with few steps is tried, which loads the model, and before it
    one for what only the first step takes. A row that fails when it is tried counts as no time.

    Raises ValueError for a model or text that cannot be loaded and a store that cannot be used.
    """
    store = store if isinstance(store, Store) else Store(store)
    wanted = {experiment.key(): experiment for experiment in experiments}
    rows = store.get(wanted)
    failed = sum(1 for row in rows.values() if row.get("error"))
    left = [experiment for key, experiment in wanted.items() if key not in rows]
    for text in dict.fromkeys(experiment.text for experiment in left):
        check_text(text)
    seconds = _seconds(left, store, progress) if left else 0.0
    return Estimate(len(wanted), len(rows) - failed, failed, len(left), seconds)


def _seconds(left: list[Experiment], store: Store, progress: bool) -> float:
    kinds: dict[tuple, list[Experiment]] = defaultdict(list)
    for experiment in left:
        kinds[_kind(experiment)].append(experiment)
    known = _known(store, {e.model for e in left})
    total = 0.0
    new = [kind for kind in kinds if kind not in known]
    for kind in tqdm(new, desc="try", unit="kind", disable=not progress, leave=False, delay=1):
        known[kind] = _tried(kinds[kind][0])
    for kind, some in kinds.items():
        shared, measured, per_step = known[kind]
        total += shared * len({prepared_key(each) for each in some})
        total += sum(measured + per_step * each.steps for each in some)
    return total


def _kind(experiment: Experiment) -> tuple:
    """Rows of a kind take as long as each other, but for the steps."""
    e = experiment
    sizes = (e.model, e.text, e.dtype, e.length, e.batch * e.accumulate)
    return (*sizes, e.criterion, e.allocation, e.unit, e.unit_steps, e.retrain, e.rank, e.tasks)


def _known(store: Store, models: set[str]) -> dict[tuple, tuple[float, ...]]:
    """Seconds of pruning, measuring and each retraining step, by kind, of finished rows from this device."""
    here = device_name(best_device())
    try:
        table = store.table({"model": sorted(models), "device": here})
    except ValueError:
        # A store whose rows have no such columns has nothing to tell.
        return {}
    found: dict[tuple, list[tuple[float, ...]]] = defaultdict(list)
    for row in table.to_dict("records"):
        try:
            experiment, seconds = experiment_of(row), _split(row)
        except (KeyError, ValueError):
            continue
        # Rows of an older format may lack some.
        if not any(map(math.isnan, seconds)):
            found[_kind(experiment)].append(seconds)
    return {kind: tuple(map(median, zip(*splits, strict=True))) for kind, splits in found.items()}


def _split(row: dict) -> tuple[float, float, float]:
    per_step = row["seconds_retrain"] / row["steps"] if row["steps"] else 0.0
    return row["seconds"] - row["seconds_retrain"], row["seconds_measure"], per_step


def _tried(experiment: Experiment) -> tuple[float, float, float]:
    """The same of one row with few steps, really run."""
    steps = min(experiment.steps, TRIAL_STEPS)
    try:
        if not steps:
            return _split(run(experiment))
        run(replace(experiment, steps=WARM_UP_STEPS))
        return _split(run(replace(experiment, steps=steps)))
    except NotLoaded:
        raise
    except Exception:
        return 0.0, 0.0, 0.0


def _spoken(seconds: float) -> str:
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
