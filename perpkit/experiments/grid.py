"""Many experiments: the product of lists of inputs."""

import dataclasses
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Union

from .experiment import Experiment, unknown

if TYPE_CHECKING:
    from .estimate import Estimate
    from .store import Store

AXES = tuple(field.name for field in dataclasses.fields(Experiment))


class Grid:
    """The product of lists of inputs, each experiment once.

    >>> grid = Grid(sparsity=[0.5, 0.7], retrain=["none", "biases"], seed=range(3))
    >>> len(grid)
    8

    (Without retraining the seed changes nothing, so "none" is run once for each sparsity.) Likewise an axis
    counts only where it means something: `rank` with adapters, `unit_lr` with a unit, and a `pattern` says
    the sparsity itself. Grids are united by `+`.

    Raises ValueError for an axis that no experiment has, an empty axis, or a bad value.
    """

    def __init__(self, **axes):
        for axis in axes:
            if axis not in AXES:
                raise ValueError(unknown("axis", axis, AXES))
        values = {axis: _values(axis, given) for axis, given in axes.items()}
        combinations = itertools.product(*values.values())
        found = (Experiment(**dict(zip(values, combination, strict=True))) for combination in combinations)
        self.experiments = list(dict.fromkeys(found))

    @classmethod
    def of(cls, experiments: Iterable[Experiment]) -> "Grid":
        """A grid of given experiments, each once.

        >>> Grid.of([Experiment(), Experiment()])
        Grid(1 experiment)
        """
        grid = cls()
        grid.experiments = list(dict.fromkeys(experiments))
        return grid

    @classmethod
    def from_file(cls, path: str | Path, **axes) -> "Grid":
        """The grid that a YAML or JSON file describes: a mapping from axes to values or lists, or a list of
        such mappings, which are united. Further `axes` replace those of the file.

        Raises ValueError for a file that cannot be read or understood, naming the line.

        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "grid.yaml"
        >>> _ = file.write_text("sparsity: [0.5, 0.7]\\nretrain: biases\\nseed: [0, 1]")
        >>> Grid.from_file(file, sparsity=0.6)
        Grid(2 experiments)
        """
        path = Path(path).expanduser()
        parts = _read(path)
        try:
            grids = [cls(**{**part, **axes}) for part in parts]
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        return cls.of(itertools.chain.from_iterable(grids))

    def estimate(
        self, store: Union["Store", str, Path, None] = None, *, progress: bool = False
    ) -> "Estimate":
        """How many rows there are, how many are left, and about how long those take here (`Estimate`).

        With `progress` a bar counts the kinds of rows that have to be tried.

        >>> import tempfile
        >>> grid = Grid(sparsity=[0.3, 0.5])
        >>> grid.estimate(Path(tempfile.mkdtemp()) / "results.sqlite").left
        2
        """
        from .estimate import estimate

        return estimate(self, store, progress=progress)

    def __iter__(self) -> Iterator[Experiment]:
        return iter(self.experiments)

    def __len__(self) -> int:
        return len(self.experiments)

    def __add__(self, other: "Grid") -> "Grid":
        return Grid.of([*self, *other])

    def __repr__(self) -> str:
        return f"Grid({len(self)} experiment{'' if len(self) == 1 else 's'})"


def _values(axis: str, given) -> list:
    if isinstance(given, Mapping):
        # Only its keys would be taken.
        raise ValueError(f"the axis {axis!r} is {given!r}; it must be one value or a list of values")
    # Arrays of no dimension say that they can be iterated over.
    single = isinstance(given, str) or not hasattr(given, "__iter__") or getattr(given, "ndim", 1) == 0
    values = [given] if single else list(given)
    if not values:
        raise ValueError(f"the axis {axis!r} is empty")
    return values


def _read(path: Path) -> list[dict]:
    """The mappings of a grid file."""
    import yaml

    try:
        words = path.read_text(encoding="utf-8")
        # JSON first: YAML does not take its tabs.
        found = (
            json.loads(words, object_pairs_hook=_mapping)
            if path.suffix == ".json"
            else yaml.load(words, _loader())
        )
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the grid {str(path)!r}: {error}") from error
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(
            f"cannot understand the grid {str(path)!r}: {' '.join(str(error).split())}"
        ) from error
    parts = found if isinstance(found, list) else [found]
    for part in parts:
        if not isinstance(part, Mapping) or not all(isinstance(axis, str) for axis in part):
            raise ValueError(
                f"the grid {str(path)!r} must be a mapping from axes to values, such as 'sparsity: [0.5, "
                f"0.7]', or a list of mappings; it has {part!r}"
            )
    if not parts:
        raise ValueError(f"the grid {str(path)!r} is empty")
    return [dict(part) for part in parts]


def _mapping(pairs: list[tuple]) -> dict:
    _check_once([key for key, _ in pairs])
    return dict(pairs)


def _check_once(keys: list) -> None:
    """JSON and YAML would take the last of two values without a word."""
    import yaml

    if twice := [key for key in keys if keys.count(key) > 1]:
        raise yaml.YAMLError(f"it has {twice[0]!r} twice; give all its values in one list")


def _loader():
    """YAML's safe loader with the numbers of YAML 1.2: 2:4 is a word, not 124 to the base of sixty."""
    import yaml

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers = {  # noqa: RUF012 - as its base class has it
            first: [(tag, words) for tag, words in resolvers if not tag.endswith((":int", ":float"))]
            for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }

        def construct_mapping(self, node, deep=False):
            # What is merged in may be said again: that is what it is for.
            own = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
            _check_once([self.construct_object(key, deep=True) for key in own])
            return super().construct_mapping(node, deep=deep)

    starts = list("-+.0123456789")
    number = r"[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?"
    Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?\d+$"), starts)
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(f"^{number}$"), starts)
    return Loader
