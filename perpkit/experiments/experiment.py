"""What a run is made of: one experiment's inputs, checked, and the name of its row."""

import dataclasses
import difflib
import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from ..evaluation.tasks import check_tasks, task_names
from ..pruning.allocation import ALLOCATIONS
from ..pruning.method import CRITERIA, GROUPS, Method
from ..pruning.selection import checked_pattern, parse_pattern
from ..retraining.adapters.modules import KINDS, STARTS
from ..retraining.layerwise.units import parse_unit
from ..retraining.schedules import factors
from ..sources.embedded import EMBEDDED_MODELS, data_folder
from ..sources.models import DTYPES
from ..sources.storyworld import ABILITIES
from .files import digest, language, model_files, task_files, text_files
from .inputs import RETRAININGS, in_order, plain

# Rows computed under another format are never mixed with these: raise it when a result changes its meaning.
RESULT_FORMAT = 5
# Of every kind the best of six rates for the embedded model (tools/measure_retraining.py).
ADAPTER_RATE = 0.03

# What a generator takes.
SEEDS = range(-(2**63), 2**63)


@dataclass(frozen=True)
class Experiment:
    """All inputs of one run: prune, reconstruct, retrain, measure.

    - `model` and `text` are what `load_model` and `load_text` take, `dtype` that of the weights, `length` the
      tokens of a window (None: the model's context).
    - `criterion`, `sparsity`, `pattern`, `group` and `allocation` are those of `prune`; a pattern such as
      "2:4" says the sparsity itself.
    - `unit` is the unit of `reconstruct` ("matrix", "submodule", "block", "window:2"), None without;
      gradients take `unit_steps` at `unit_lr`, a matrix is solved exactly.
    - `retrain` is "none" or a union of parameter subsets and at most one kind of adapter, such as "biases",
      "mask_lora" or "biases+norms+mask_lora", kept in this order however it is written; adapters have `rank`,
      `alpha` (None: 2 · rank) and, for scale_lora, `start`. `lr` None takes the recommended rate of the model
      (`recommended_lr`).
    - `tasks` are those of `zero_shot` ("storyworld", "papers", "boolq,rte"), None without, read from
      `tasks_dir` or the Hub.
    - `seed` changes the order of the training windows, the adapters' start and random pruning.

    What a run does not use is set to one value, so that equal runs are equal: without retraining there are no
    `steps`, without an adapter no `rank`. A `group` or an `allocation` stays as it is told, also where it is
    the default of its criterion: a figure may be about it.

    Raises ValueError naming a bad value and the valid ones.

    >>> experiment = Experiment(sparsity=0.5, retrain="biases")
    >>> experiment.steps, Experiment(**experiment.asdict()) == experiment
    (100, True)
    """

    model: str = "tiny-opt"
    text: str = "storyworld"
    dtype: str = "float32"
    length: int | None = None
    criterion: str = "magnitude"
    sparsity: float = 0.5
    pattern: str | None = None
    group: str | None = None
    allocation: str | None = None
    unit: str | None = None
    unit_steps: int = 200
    unit_lr: float = 1e-3
    retrain: str = "none"
    rank: int | None = None
    alpha: float | None = None
    start: str | None = None
    steps: int = 100
    lr: float | None = None
    batch: int = 8
    accumulate: int = 1
    schedule: str = "llr"
    weight_decay: float = 0.0
    tasks: str | None = None
    tasks_dir: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            self._set(field.name, plain(field.name, getattr(self, field.name), field.default))
        if self.seed not in SEEDS:
            raise ValueError(f"seed is {self.seed}; it must fit into 64 bits, with its sign")
        self._check_sources()
        self._check_pruning()
        self._check_reconstruction()
        self._check_retraining()
        if not self._random():
            self._set("seed", 0)

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _check_sources(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(unknown("dtype", self.dtype, DTYPES))
        if self.length is not None and self.length < 2:
            raise ValueError(f"length is {self.length}; a window needs at least 2 tokens")
        if self.tasks is None:
            self._set("tasks_dir", None)
        else:
            check_tasks(self.tasks, self.tasks_dir)
            self._set("tasks", ",".join(dict.fromkeys(map(str.strip, self.tasks.split(",")))))

    def _check_pruning(self) -> None:
        if self.criterion not in CRITERIA:
            raise ValueError(unknown("criterion", self.criterion, CRITERIA))
        if self.group not in (None, *GROUPS):
            raise ValueError(unknown("group", self.group, GROUPS))
        if self.allocation not in (None, *ALLOCATIONS):
            raise ValueError(unknown("allocation", self.allocation, ALLOCATIONS))
        pattern = None
        if self.pattern is not None:
            pattern = checked_pattern(parse_pattern(self.pattern))
            self._set("pattern", f"{pattern[0]}:{pattern[1]}")
            self._set("sparsity", 1 - pattern[0] / pattern[1])
            if self.allocation not in (None, "uniform"):
                raise ValueError(
                    f"a pattern prunes every layer alike; allocation {self.allocation!r} does not go with it"
                )
        elif not 0 <= self.sparsity <= 1:
            raise ValueError(f"sparsity is {self.sparsity}; it is a fraction between 0 and 1")
        else:
            # What a range of floats calls 0.30000000000000004; and no -0.
            self._set("sparsity", round(self.sparsity, 12) + 0.0)
        Method.checked(self.criterion, self.group, self.allocation, pattern, 0, (), {})

    def _check_reconstruction(self) -> None:
        if self.unit is not None:
            kind, blocks = parse_unit(self.unit)
            if (kind, blocks) == ("window", 1):
                self._set("unit", "block")
            if kind != "matrix":
                if self.unit_steps < 1 or not 0 < self.unit_lr < math.inf:
                    raise ValueError(
                        f"unit_steps is {self.unit_steps} and unit_lr is {self.unit_lr}; want at least one "
                        "step and a positive rate"
                    )
                return
        self._set("unit_steps", 0)
        self._set("unit_lr", 0.0)

    def _check_retraining(self) -> None:
        if self.retrain == "none":
            settings = {"steps": 0, "batch": 0, "accumulate": 0, "lr": 0.0, "weight_decay": 0.0}
            for name, value in {**settings, "schedule": "none"}.items():
                self._set(name, value)
        else:
            for part in self.retrain.split("+"):
                if part == "none":
                    raise ValueError(f"retrain is {self.retrain!r}; 'none' stands alone")
                if part not in RETRAININGS:
                    raise ValueError(unknown("retrain", part, RETRAININGS))
            for name in ("steps", "batch", "accumulate"):
                if getattr(self, name) < 1:
                    raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
            if self.lr is None:
                self._set("lr", recommended_lr(self.model, self.retrain))
            if not 0 < (self.lr or 0) < math.inf:
                raise ValueError(f"lr is {self.lr}; it must be positive")
            if not 0 <= self.weight_decay < math.inf:
                raise ValueError(f"weight_decay is {self.weight_decay}; it must not be negative")
            factors(self.schedule, min(self.steps, 100), 0.1)
        self._check_adapter()
        self._set("retrain", in_order(self.retrain))

    def _check_adapter(self) -> None:
        kinds = list(dict.fromkeys(part for part in self.retrain.split("+") if part in KINDS))
        if len(kinds) > 1:
            raise ValueError(f"retrain is {self.retrain!r}; one kind of adapter at a time")
        if not kinds:
            self._set("rank", None)
            self._set("alpha", None)
            self._set("start", None)
            return
        if self.rank is None:
            self._set("rank", 16)
        assert self.rank is not None
        if self.alpha is None:
            self._set("alpha", 2.0 * self.rank)
        if self.rank < 1 or not 0 < (self.alpha or 0) < math.inf:
            raise ValueError(f"rank is {self.rank} and alpha is {self.alpha}; both must be positive")
        if kinds != ["scale_lora"]:
            self._set("start", None)
        elif self.start is None:
            self._set("start", STARTS[0])
        elif self.start not in STARTS:
            raise ValueError(unknown("start", self.start, STARTS))

    def _random(self) -> bool:
        """Whether anything of this run depends on the seed."""
        return self.retrain != "none" or self.unit_steps > 0 or self.criterion == "random"

    @property
    def adapter(self) -> str | None:
        """The kind of adapter that is attached, None without."""
        return next((part for part in self.retrain.split("+") if part in KINDS), None)

    def asdict(self) -> dict:
        """The inputs as a plain dictionary, one column of a result each."""
        # dataclasses.asdict copies deeply, which costs more than all else of a stored row.
        return dict(self.__dict__)

    def key(self) -> str:
        """A digest of the inputs, what the text and the model are read from, and the result format."""
        inputs = {**self.asdict(), "files": self.files(), "format": RESULT_FORMAT}
        if self.text == "storyworld" or self._asks_stories():
            inputs["language"] = language()
        return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:24]

    def _asks_stories(self) -> bool:
        return self.tasks is not None and not set(ABILITIES).isdisjoint(task_names(self.tasks))

    def files(self) -> tuple[str, ...]:
        """Digests of the local files that the model, the text and the tasks are read from."""
        found = model_files(self.model), text_files(self.text), task_files(self.tasks_dir)
        return tuple(digest(files) for files in found)


def recommended_lr(model: str, retrain: str) -> float:
    """The learning rate that recovered most in our own search over rates.

    For the embedded model it is read from its recipe; for any other model it is the same table scaled down
    and held within what PERP searched (at most 5e-4, section 4): a start, not an optimum.

    Raises ValueError for a subset that the search did not cover.

    >>> recommended_lr("tiny-opt", "full") < recommended_lr("tiny-opt", "biases")
    True
    """
    rates = _recommended()
    parts = retrain.split("+")
    if unsearched := [part for part in parts if part not in rates]:
        raise ValueError(f"there is no recommended rate for retrain={unsearched[0]!r}; say one with lr=")
    # A union takes the rate of its most delicate part.
    rate = min(rates[part] for part in parts)
    return rate if model in EMBEDDED_MODELS else min(rate / 100, 5e-4)


@lru_cache
def _recommended() -> dict[str, float]:
    recipe = json.loads(data_folder("models", "tiny-opt", "recipe.json").read_text())
    return {**recipe["retraining_rates"], **dict.fromkeys(KINDS, ADAPTER_RATE)}


def unknown(what: str, value: object, valid: Iterable[str]) -> str:
    """The words for a name that is none of the valid ones, with the nearest of them."""
    valid = list(valid)
    near = difflib.get_close_matches(str(value), valid, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return f"unknown {what} {value!r}{hint} Valid are {', '.join(valid)}"
