"""What a run is made of: one experiment's inputs, and the grid that is their product."""

import dataclasses
import difflib
import hashlib
import inspect
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ..pruning.prune import CRITERIA
from ..retraining.subsets import SUBSETS
from ..sources import grammar, storyworld, world
from ..sources.embedded import EMBEDDED_MODELS, data_folder

# Rows computed under another format are never mixed with these: raise it when a result changes its meaning.
RESULT_FORMAT = 2
# What defines the embedded language. Its code, not a sample of it: some choices show only after thousands
# of stories.
LANGUAGE = (world, grammar, storyworld)

_TYPES = {
    "model": str,
    "text": str,
    "sparsity": float,
    "steps": int,
    "lr": float,
    "batch": int,
    "length": int,
    "seed": int,
}


@dataclass(frozen=True)
class Experiment:
    """All inputs of one run: prune, retrain, measure.

    `retrain` is "none" or a parameter subset; `lr` None takes the recommended rate of the model
    (`recommended_lr`). A seed changes the order of the training windows and random pruning.

    Raises ValueError naming a bad value and the valid ones.

    >>> experiment = Experiment(sparsity=0.5, retrain="biases")
    >>> experiment.steps, Experiment(**experiment.asdict()) == experiment
    (100, True)
    """

    model: str = "tiny-opt"
    text: str = "storyworld"
    criterion: str = "magnitude"
    sparsity: float = 0.5
    retrain: str = "none"
    steps: int = 100
    lr: float | None = None
    batch: int = 8
    length: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        # The same value names the same row, whether it came as 1, 1.0 or numpy's.
        for name, kind in _TYPES.items():
            value = getattr(self, name)
            if value is not None and type(value) is not kind:
                object.__setattr__(self, name, kind(value))
        if self.criterion not in CRITERIA:
            raise ValueError(_unknown("criterion", self.criterion, CRITERIA))
        if not 0 <= self.sparsity <= 1:
            raise ValueError(f"sparsity is {self.sparsity}; it is a fraction between 0 and 1")
        if self.retrain == "none":
            # Without retraining these change nothing: one row, not one for every combination.
            object.__setattr__(self, "steps", 0)
            object.__setattr__(self, "batch", 0)
            object.__setattr__(self, "lr", 0.0)
            if self.criterion != "random":
                object.__setattr__(self, "seed", 0)
            return
        for part in self.retrain.split("+"):
            if part == "none":
                raise ValueError(f"retrain is {self.retrain!r}; 'none' stands alone")
            if part not in SUBSETS:
                raise ValueError(_unknown("retrain", part, ("none", *SUBSETS)))
        if self.steps < 1 or self.batch < 1:
            raise ValueError(f"steps is {self.steps} and batch is {self.batch}; both must be at least 1")
        if self.lr is not None and self.lr <= 0:
            raise ValueError(f"lr is {self.lr}; it must be positive")
        if self.lr is None:
            object.__setattr__(self, "lr", recommended_lr(self.model, self.retrain))

    def asdict(self) -> dict:
        """The inputs as a plain dictionary, one column of a result each."""
        return dataclasses.asdict(self)

    def key(self) -> str:
        """A digest of the inputs, what the text and the model are read from, and the result format."""
        inputs = {**self.asdict(), "files": self.files(), "format": RESULT_FORMAT}
        if self.text == "storyworld":
            inputs["language"] = _language()
        return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:24]

    def files(self) -> tuple[str, str]:
        """Digests of the local files that the model and the text are read from."""
        return _digest(_model_files(self.model)), _digest([Path(self.text).expanduser()])


def recommended_lr(model: str, subset: str) -> float:
    """The learning rate that recovered most in our own search over rates.

    For the embedded model it is read from its recipe; for any other model it is the same table scaled down
    and held within what PERP searched (at most 5e-4, section 4): a start, not an optimum.

    >>> recommended_lr("tiny-opt", "full") < recommended_lr("tiny-opt", "biases")
    True
    """
    recipe = json.loads(data_folder("models", "tiny-opt", "recipe.json").read_text())
    rates = recipe["retraining_rates"]
    # A union takes the rate of its most delicate part.
    rate = min(rates[part] for part in subset.split("+"))
    return rate if model in EMBEDDED_MODELS else min(rate / 100, 5e-4)


@lru_cache
def _language() -> str:
    """A digest of the code that tells the stories."""
    return hashlib.sha256("".join(map(inspect.getsource, LANGUAGE)).encode()).hexdigest()


def _model_files(model: str) -> list[Path]:
    folder = data_folder("models", "tiny-opt") if model in EMBEDDED_MODELS else Path(model).expanduser()
    return sorted([*folder.glob("*.safetensors"), folder / "config.json", folder / "tokenizer.json"])


def _digest(files: list[Path]) -> str:
    """What tells one version of local files from another; what is on the Hub goes by its name."""
    digest = hashlib.sha256()
    for file in filter(Path.is_file, files):
        facts = file.stat()
        # Large files are told apart by size and time: reading them would cost more than the run.
        small = facts.st_size < 2**24
        digest.update(file.read_bytes() if small else f"{facts.st_size} {facts.st_mtime_ns}".encode())
    return digest.hexdigest()


def _unknown(axis: str, value: object, valid: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(str(value), valid, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return f"unknown {axis} {value!r}{hint} Valid are {', '.join(valid)}"


class Grid:
    """The product of lists of inputs, each experiment once.

    >>> grid = Grid(sparsity=[0.5, 0.7], retrain=["none", "biases"], seed=range(3))
    >>> len(grid)
    8

    (Without retraining the seed changes nothing, so "none" is run once for each sparsity.)

    Raises ValueError for an axis that no experiment has, an empty axis, or a bad value.
    """

    def __init__(self, **axes):
        fields = [field.name for field in dataclasses.fields(Experiment)]
        for axis in axes:
            if axis not in fields:
                raise ValueError(_unknown("axis", axis, tuple(fields)))
        values = {axis: _values(axis, given) for axis, given in axes.items()}
        combinations = itertools.product(*values.values())
        found = (Experiment(**dict(zip(values, combination, strict=True))) for combination in combinations)
        self.experiments = list(dict.fromkeys(found))

    def __iter__(self) -> Iterator[Experiment]:
        return iter(self.experiments)

    def __len__(self) -> int:
        return len(self.experiments)

    def __repr__(self) -> str:
        return f"Grid({len(self)} experiments)"


def _values(axis: str, given) -> list:
    values = [given] if isinstance(given, str) or not hasattr(given, "__iter__") else list(given)
    if not values:
        raise ValueError(f"the axis {axis!r} is empty")
    return values
