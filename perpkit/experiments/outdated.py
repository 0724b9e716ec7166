"""Rows of a store as the experiments that they came from, and whether a sweep would still take them."""

from collections.abc import Hashable, Mapping
from dataclasses import fields
from typing import Any

from ..sources.text import TEXTS
from .experiment import RESULT_FORMAT, Experiment
from .files import model_files, text_files

# Why a row is outdated that may be good elsewhere.
NOT_HERE = "files not here"


def experiment_of(row: Mapping[Hashable, Any]) -> Experiment:
    """The experiment of a row, also of one out of a table, where nothing is NaN.

    Raises ValueError for a row that lacks an input or has one that is no longer valid.

    >>> experiment_of({**Experiment(seed=3, retrain="biases").asdict(), "rank": float("nan")}).seed
    3
    """
    names = [field.name for field in fields(Experiment)]
    if missing := [name for name in names if name not in row]:
        raise ValueError(f"the row has no {missing[0]!r}")
    inputs: dict[str, Any] = {name: None if row[name] != row[name] else row[name] for name in names}
    return Experiment(**inputs)


def outdated(row: Mapping[Hashable, Any]) -> str | None:
    """Why no sweep started here would take a row with its `key`; None when one would.

    Rows that somebody has put there without a `format` are theirs, and never outdated.

    >>> experiment = Experiment()
    >>> row = {**experiment.asdict(), "key": experiment.key(), "format": RESULT_FORMAT}
    >>> outdated(row), outdated({**row, "format": 1}), outdated({**row, "key": "of other files"})
    (None, 'older format', 'other files')
    """
    made = row.get("format")
    if made is None or made != made:
        return None
    if made != RESULT_FORMAT:
        return "older format" if made < RESULT_FORMAT else "newer format"
    try:
        experiment = experiment_of(row)
    except ValueError:
        return NOT_HERE if _only_lacks_tasks(row) else "other inputs"
    if experiment.key() == row["key"]:
        return None
    # From another folder, or without a disk, the files of a good row may not be found: nobody may take it for
    # a useless one.
    return "other files" if _files_are_here(experiment) else NOT_HERE


def _only_lacks_tasks(row: Mapping[Hashable, Any]) -> bool:
    """Whether a row's inputs are valid but for its local tasks, refused where they are not found."""
    if not isinstance(row.get("tasks_dir"), str):
        return False
    try:
        experiment_of({**row, "tasks": None, "tasks_dir": None})
    except ValueError:
        return False
    return True


def _files_are_here(experiment: Experiment) -> bool:
    """Whether the local model and text, if it reads any, are found from here; those of the Hub are not."""
    weights = any(file.suffix == ".safetensors" for file in model_files(experiment.model))
    text = experiment.text in TEXTS or any(file.is_file() for file in text_files(experiment.text))
    return weights and text
