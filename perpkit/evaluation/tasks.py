"""Zero-shot tasks: their names, and their questions from the story world, local files or the Hub."""

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ..sources.hub import reading_dataset
from ..sources.storyworld import ABILITIES, questions

# The papers' seven, and the folder of the harness that holds the definition of each.
PAPERS = {
    "boolq": "super_glue/boolq",
    "rte": "glue/rte",
    "hellaswag": "hellaswag",
    "winogrande": "winogrande",
    "arc_easy": "arc",
    "arc_challenge": "arc",
    "openbookqa": "openbookqa",
}
SETS = {"storyworld": ABILITIES, "papers": tuple(PAPERS)}
STORYWORLD_QUESTIONS = 200

Check = tuple[str, Callable[[Any], bool]]


def task_names(tasks: str) -> list[str]:
    """The tasks meant by `"storyworld"`, `"papers"`, names of tasks, or several of these joined by commas.

    Raises ValueError for an unknown name.

    >>> task_names("recall, boolq, recall")
    ['recall', 'boolq']
    """
    if not isinstance(tasks, str):
        raise ValueError(f"tasks is {tasks!r}; it must be a text such as 'storyworld' or 'boolq,rte'")
    valid = [*SETS, *ABILITIES, *PAPERS]
    found: dict[str, None] = {}
    for name in map(str.strip, tasks.split(",")):
        if name not in valid:
            near = get_close_matches(name, valid, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise ValueError(f"unknown task {name!r}{hint} Valid are {', '.join(valid)}, joined by commas")
        found |= dict.fromkeys(SETS.get(name, (name,)))
    return list(found)


def check_tasks(tasks: str, tasks_dir: str | Path | None = None) -> None:
    """Raise ValueError for an unknown task, a folder that is none, or a task that has no file there.

    >>> check_tasks("storyworld,rte")
    """
    for name in task_names(tasks):
        if tasks_dir is not None:
            task_file(name, tasks_dir)


def task_file(name: str, tasks_dir: str | Path) -> Path | None:
    """The file of a task in a folder, None for one of the story world, which needs none.

    Raises ValueError for a folder that is none and for one without the file.
    """
    folder = Path(tasks_dir).expanduser()
    if not folder.is_dir():
        raise ValueError(f"tasks_dir is {str(tasks_dir)!r}, which is no folder")
    if name in ABILITIES:
        return None
    wanted = [f"{name}.jsonl", f"{name}_val.jsonl", f"{name}_validation.jsonl"]
    for file in wanted:
        if (folder / file).is_file():
            return folder / file
    there = sorted(path.name for path in folder.iterdir() if path.is_file())
    shown = ", ".join(there[:10]) + (", …" if len(there) > 10 else "") if there else "no files"
    raise ValueError(
        f"tasks_dir {str(folder)!r} has no questions for {name!r}: "
        f"want {' or '.join(wanted)} but there is {shown}"
    )


def describe(
    name: str, tasks_dir: str | Path | None, count: int | None, seed: int
) -> tuple[dict, str | None]:
    """A task for the harness's `TaskManager.load`, and the folder of definitions that it refers to.

    The papers' tasks keep the harness's definition and only the data may come from a file. `count` is the
    number of questions, the first ones of a file; those of the story world are made when the task is loaded.

    Raises ValueError for a damaged file.
    """
    if name in ABILITIES:
        return _story_task(name, lambda: questions(name, count or STORYWORLD_QUESTIONS, seed)), None
    changes: dict = {"task": name, "num_fewshot": 0}
    if tasks_dir is not None:
        file = task_file(name, tasks_dir)
        assert file is not None
        asked = read_questions(name, file)[:count]
        changes |= {**_from_memory(lambda: asked), "training_split": None, "validation_split": None}
    # In a group of its own, since changes to a task that is defined already can be told in a group only.
    return {"group": "perpkit", "task": [changes]}, PAPERS[name]


def _story_task(name: str, asked: Callable[[], list[dict]]) -> dict:
    return {
        "task": f"storyworld_{name}",
        **_from_memory(asked),
        "num_fewshot": 0,
        "output_type": "multiple_choice",
        "doc_to_text": "context",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }


def _from_memory(asked: Callable[[], list[dict]]) -> dict:
    # Not the harness's way by a JSON file: that leaves a cache behind and takes dates for times.
    def load(**_) -> dict:
        from datasets import Dataset

        return {"test": Dataset.from_list(asked())}

    return {"custom_dataset": load, "test_split": "test"}


def from_hub(name: str, reachable: bool) -> AbstractContextManager[None]:
    """Load a task from the Hub, from its local cache alone when the Hub cannot be reached.

    Raises ValueError when it is in neither.
    """
    ways = (
        f". For tasks: ask tasks='storyworld', or put {name}.jsonl, one question a line in the data set's "
        "own fields, into a folder and name that with tasks_dir="
    )
    return reading_dataset(f"the task {name!r}", reachable, source=" from the Hub", ways=ways)


# --- local files ----------------------------------------------------------------------------------


def read_questions(name: str, file: Path) -> list[dict]:
    """The questions of one of the papers' tasks from a JSONL file, reduced to the fields that it needs.

    Raises ValueError naming file, line and field for what the harness could not read.
    """
    found = []
    try:
        # Not the text's own lines: some separators of those may stand inside a JSON string.
        lines = file.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise ValueError(f"cannot read {str(file)!r}: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{str(file)!r}, line {number}"
        try:
            question = json.loads(line.decode())
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{where} is not JSON: {error}") from error
        if not isinstance(question, dict):
            raise ValueError(f"{where} is {_short(question)}; want an object with {', '.join(_FIELDS[name])}")
        found.append(_checked(name, question, where))
    if not found:
        raise ValueError(f"{str(file)!r} is empty; want one question of {name} a line")
    return found


def _checked(name: str, question: dict, where: str) -> dict:
    for field, (wanted, right) in _FIELDS[name].items():
        if field not in question:
            has = ", ".join(map(str, question)) or "none"
            raise ValueError(
                f"{where} has no field {field!r}: {name} needs {field}, {wanted}; its fields are {has}"
            )
        if not right(question[field]):
            raise ValueError(f"{where}: field {field!r} is {_short(question[field])}; it must be {wanted}")
    checked = {field: question[field] for field in _FIELDS[name]}
    if name == "hellaswag":
        # Its files have a number, the data set of the Hub a text.
        checked["label"] = str(checked["label"])
        if int(checked["label"]) >= len(checked["endings"]):
            raise ValueError(
                f"{where}: field 'label' is {checked['label']} of {len(checked['endings'])} endings"
            )
    if "answerKey" in checked:
        choices, key = checked["choices"], checked["answerKey"]
        if (key.lstrip() if name == "openbookqa" else key) not in choices["label"]:
            raise ValueError(f"{where}: field 'answerKey' is {key!r}, none of {_short(choices['label'])}")
        # Other fields in there may differ from line to line.
        checked["choices"] = {part: choices[part] for part in ("text", "label")}
    return checked


def _short(value: object) -> str:
    words = repr(value)
    return words if len(words) <= 80 else words[:79] + "…"


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and len(value) > 1 and all(map(_is_text, value))


def _is_blank(value: object) -> bool:
    """Whether it has a blank with words before it or not, and with words after it, which are scored."""
    return isinstance(value, str) and bool(value.partition("_")[2].strip())


def _are_choices(value: object) -> bool:
    if not isinstance(value, dict):
        return False
    texts, labels = value.get("text"), value.get("label")
    return _are_texts(texts) and _are_texts(labels) and len(texts) == len(labels)  # type: ignore[arg-type]


def _one_of(valid: Sequence) -> Check:
    # By its representation, as True is 1 and would pass for it.
    known = set(map(repr, valid))
    return " or ".join(map(repr, valid)), lambda value: repr(value) in known


_TEXT: Check = "a text that is not empty", _is_text
_CHOICES: Check = "an object of two lists of equally many texts, text and label", _are_choices
_SCIENCE: dict[str, Check] = {"question": _TEXT, "choices": _CHOICES, "answerKey": _TEXT}
_FIELDS: dict[str, dict[str, Check]] = {
    "boolq": {"passage": _TEXT, "question": _TEXT, "label": _one_of((0, 1))},
    "rte": {"sentence1": _TEXT, "sentence2": _TEXT, "label": _one_of((0, 1))},
    "hellaswag": {
        "activity_label": _TEXT,
        "ctx_a": _TEXT,
        "ctx_b": ("a text", lambda value: isinstance(value, str)),
        "endings": ("a list of texts", _are_texts),
        "label": ("the number of an ending", lambda value: repr(value).strip("'").isdecimal()),
    },
    "winogrande": {
        "sentence": ("a text with words after a blank, written _", _is_blank),
        "option1": _TEXT,
        "option2": _TEXT,
        "answer": _one_of(("1", "2")),
    },
    "arc_easy": _SCIENCE,
    "arc_challenge": _SCIENCE,
    "openbookqa": {"question_stem": _TEXT, "choices": _CHOICES, "answerKey": _TEXT},
}
