"""Loading text as token windows for training, calibration and test."""

import difflib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .hub import hub_reachable, reading_dataset
from .storyworld import SPLITS, Story, stories

HUB_TEXTS: dict[str, dict[str, Any]] = {
    "wikitext2": {
        "path": "Salesforce/wikitext",
        "name": "wikitext-2-raw-v1",
    },
    "c4": {
        "path": "allenai/c4",
        "data_files": {
            "train": "en/c4-train.00000-of-01024.json.gz",
            "test": "en/c4-validation.00000-of-00008.json.gz",
        },
    },
}
# Trained and calibrated on the one, tested on the other: the papers' protocol.
PAIRS = {"c4-wikitext2": {"train": "c4", "test": "wikitext2"}}
TEXTS = ("storyworld", *HUB_TEXTS, *PAIRS)
LONGEST_DEFAULT = 2048
# Of what is a part of the web, as many windows as anybody retrains, calibrates and tests with.
C4_WINDOWS = {"train": 4096, "calibration": 128, "test": 256}


@dataclass(frozen=True)
class Text:
    """Token windows of one text: three int64 tensors `[windows, length]`, disjoint, without padding.

    `floor` is the lowest perplexity that any model can reach on the test windows in expectation, where it is
    known (the story world), else None. (A choice is charged to the first token that it shows in. A model that
    knew by which digest the stories are split could gain about one per cent; none will.)
    """

    name: str
    train: torch.Tensor = field(repr=False)
    calibration: torch.Tensor = field(repr=False)
    test: torch.Tensor = field(repr=False)
    floor: float | None = None

    @property
    def protocol(self) -> str:
        """What a perplexity on the test windows was measured on, in words."""
        windows, length = self.test.shape
        return f"{self.name}, test split, {windows} windows of {length} tokens"


def load_text(
    source: str | Path | Mapping[str, str | Path],
    tokenizer,
    *,
    length: int | None = None,
    windows: Mapping[str, int] | None = None,
    seed: int = 0,
) -> Text:
    """Load a text and cut it into windows of `length` tokens for train, calibration and test.

    `source` is `"storyworld"` (unlimited, its test split always the same stories of seed 0), `"wikitext2"`
    or `"c4"` from the Hub, `"c4-wikitext2"` (as in the papers: training and calibration of C4, test of
    WikiText-2), a local file (`.jsonl` with a field `text` in each line, else plain text with one document a
    line), or a mapping from split to file. A single file is cut into 80 % train, 10 % calibration and 10 %
    test, in that order; a missing calibration split is the last tenth of the training documents.
    The documents of a split are joined by two newlines, tokenised once and cut without overlap; the rest
    is dropped. `length` is the tokenizer's context length unless told, at most 2048. `windows` caps the
    number of windows by split (of c4 at most 4096, 128 and 256 unless told). `seed` chooses the training and
    calibration stories of the story world.

    Raises ValueError for an unknown name, a file without text, a text shorter than one window, and a hub
    that cannot be reached.

    >>> from perpkit.sources.models import load_model
    >>> _, tokenizer = load_model("tiny-opt", device="cpu")
    >>> text = load_text("storyworld", tokenizer, windows={"train": 16})
    >>> text.train.shape, text.floor < 2.2
    (torch.Size([16, 128]), True)
    """
    length = _window_length(tokenizer, length)
    caps = dict(windows or {})
    if unknown := set(caps) - set(SPLITS):
        raise ValueError(f"unknown split {min(unknown)!r} in windows; the splits are {', '.join(SPLITS)}")
    for split, count in caps.items():
        if count < 1:
            raise ValueError(f"windows[{split!r}] is {count}; it must be at least 1")
    if source == "storyworld":
        return _storyworld(tokenizer, length, caps, seed)
    name, documents = _documents(source)
    if str(source) in TEXTS:
        caps = {split: C4_WINDOWS[split] for split in SPLITS if _of_hub(name, split) == "c4"} | caps
    found = {}
    for split in SPLITS:
        found[split] = _cut(tokenizer, documents[split], length, caps.get(split))
        if not len(found[split]):
            raise ValueError(
                f"the {split} split of {name!r} ({len(documents[split])} documents) is shorter than one "
                f"window of {length} tokens; give a longer text, more lines (a file is split by lines) or "
                "a smaller length="
            )
    return Text(name, found["train"], found["calibration"], found["test"])


def check_windows(model: Any, windows: torch.Tensor) -> None:
    """Raise ValueError unless these are token windows `[n, length]` that the model can read."""
    if isinstance(windows, Text):
        raise ValueError("this is a whole text; give one split of it, such as text.test")
    if windows.ndim != 2 or windows.shape[0] == 0 or windows.shape[1] < 2:
        raise ValueError(f"windows have shape {tuple(windows.shape)}; want [windows, length >= 2]")
    if windows.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"windows are of {windows.dtype}; token ids are whole numbers, torch.int64")
    config = model.config.get_text_config()
    vocabulary = config.vocab_size
    lowest, highest = int(windows.min()), int(windows.max())
    if lowest < 0 or highest >= vocabulary:
        raise ValueError(
            f"a token id is {lowest if lowest < 0 else highest} but the model's vocabulary has {vocabulary} "
            "tokens: the text was cut with another model's tokenizer"
        )
    context = getattr(config, "max_position_embeddings", None)
    if context is not None and windows.shape[1] > context:
        raise ValueError(
            f"windows of {windows.shape[1]} tokens exceed the model's context of {context}; "
            f"cut the text with length={context}"
        )


def _window_length(tokenizer, length: int | None) -> int:
    if length is None:
        return min(tokenizer.model_max_length, LONGEST_DEFAULT)
    if length < 2:
        raise ValueError(f"length is {length}; a window needs at least 2 tokens")
    return length


def _cut(tokenizer, documents: list[str], length: int, cap: int | None) -> torch.Tensor:
    """The first windows of the joined documents, at most `cap`."""
    used = len(documents) if cap is None else min(len(documents), cap)
    while True:
        text = "\n\n".join(documents[:used])
        # verbose=False: the whole text is longer than the context on purpose.
        ids = tokenizer(text, verbose=False).input_ids if text else []
        count = len(ids) // length
        # A crawl of the web is not tokenised whole for a hundred windows.
        if used == len(documents) or (cap is not None and count > cap):
            return torch.tensor(ids[: count * length], dtype=torch.int64).view(count, length)[:cap]
        used = min(len(documents), 2 * used)


def _documents(source: str | Path | Mapping) -> tuple[str, dict[str, list[str]]]:
    """The documents of each split."""
    if isinstance(source, Mapping):
        if unknown := set(source) - set(SPLITS):
            raise ValueError(f"unknown split {min(unknown)!r}; the splits are {', '.join(SPLITS)}")
        if missing := {"train", "test"} - set(source):
            raise ValueError(f"the mapping of files has no {min(missing)!r} split")
        documents = {split: _read(Path(path).expanduser()) for split, path in source.items()}
        name = " / ".join(Path(path).name for path in source.values())
    elif str(source) in TEXTS:
        name, documents = str(source), _from_hub(str(source))
    elif Path(source).expanduser().is_file():
        rows = _read(Path(source).expanduser())
        name = Path(source).name
        first, second = int(0.8 * len(rows)), int(0.9 * len(rows))
        return name, {"train": rows[:first], "calibration": rows[first:second], "test": rows[second:]}
    else:
        near = difflib.get_close_matches(str(source), TEXTS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(
            f"unknown text {str(source)!r}{hint} A text is {', '.join(map(repr, TEXTS))}, the path of an "
            "existing file, or a mapping from split to file"
        )
    if "calibration" not in documents:
        rows = documents["train"]
        cut = int(0.9 * len(rows))
        documents["train"], documents["calibration"] = rows[:cut], rows[cut:]
    return name, documents


def _read(path: Path) -> list[str]:
    """The documents of a local file."""
    try:
        # Not splitlines: it also cuts at separators that may stand inside a JSON string.
        rows = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the text file {str(path)!r}: {error}") from error
    if path.suffix == ".jsonl":
        rows = [_field(row, path, number) for number, row in enumerate(rows, 1)]
    if not any(row.strip() for row in rows):
        raise ValueError(f"the text file {str(path)!r} is empty")
    return rows


def _field(line: str, path: Path, number: int) -> str:
    try:
        text = json.loads(line)["text"]
    except (json.JSONDecodeError, KeyError, TypeError):
        text = None
    if not isinstance(text, str):
        raise ValueError(f'{path.name}, line {number}: not a JSON object with a string field "text"')
    return text


def _from_hub(name: str) -> dict[str, list[str]]:
    """The documents of a text from the Hub; the cache is enough when the Hub cannot be reached."""
    import datasets

    reachable, found = hub_reachable(), {}
    for split in ("train", "test"):
        text = _of_hub(name, split)
        with reading_dataset(f"the text {text!r}", reachable):
            found[split] = list(datasets.load_dataset(**HUB_TEXTS[text], split=split)["text"])
    return found


def _of_hub(name: str, split: str) -> str:
    """The text of the Hub that a split is of; calibration is a part of what is trained on."""
    return PAIRS.get(name, {}).get("train" if split == "calibration" else split, name)


STORYWORLD_WINDOWS = {"train": 4096, "calibration": 128, "test": 160}


def _storyworld(tokenizer, length: int, caps: dict[str, int], seed: int) -> Text:
    found, floor = {}, None
    for split in SPLITS:
        # The test split is the same for every seed, so that perplexities can be compared.
        stream = stories(split, 0 if split == "test" else seed)
        wanted = caps.get(split, STORYWORLD_WINDOWS[split])
        told: list[Story] = []
        ids: list[int] = []
        while len(ids) < wanted * length:
            # About five characters a token; the loop comes round if that was too few.
            missing = 5 * (wanted * length - len(ids))
            while missing > 0:
                told.append(next(stream))
                missing -= len(told[-1].text)
            whole = "\n\n".join(story.text for story in told)
            joined = tokenizer(whole, return_offsets_mapping=True, verbose=False)
            ids = joined.input_ids
        found[split] = torch.tensor(ids[: wanted * length]).view(wanted, length)
        if split == "test":
            nats = _surprisal_by_token(told, joined.offset_mapping)[: wanted * length]
            # The first token of a window is given, not predicted.
            floor = math.exp(torch.tensor(nats, dtype=torch.float64).view(wanted, length)[:, 1:].mean())
    name = f"storyworld (seed {seed})"
    return Text(name, found["train"], found["calibration"], found["test"], floor)


def _surprisal_by_token(told: list[Story], offsets: list[tuple[int, int]]) -> list[float]:
    """Charge every choice of the grammar to the first token that ends after the point of the choice."""
    nats = [0.0] * len(offsets)
    token = start = 0
    for story in told:
        for position, amount in story.surprisals:
            while offsets[token][1] <= start + position:
                token += 1
            nats[token] += amount
        start += len(story.text) + len("\n\n")
    return nats
