"""The embedded language: seeded English stories whose exact probability is known.

A story is told by a probabilistic grammar (`grammar.py`) about a fixed world (`world.py`). No two
derivations give the same text, so the probability of a story is the product of its choices and the
entropy of the language is a floor that no model can beat.
"""

import math
import random
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from .grammar import Teller, tell

SPLITS = ("train", "calibration", "test")
ABILITIES = ("agreement", "pronouns", "recall", "counting", "facts")


@dataclass(frozen=True)
class Story:
    """One story: its text and, for every choice of the grammar, `(character position, nats)`."""

    text: str
    surprisals: tuple[tuple[int, float], ...]

    @property
    def log_probability(self) -> float:
        """Natural logarithm of the probability with which the grammar tells exactly this story."""
        return -sum(nats for _, nats in self.surprisals)


def stories(split: str, seed: int = 0) -> Iterator[Story]:
    """Tell stories of one split without end, the same ones for the same seed.

    A digest of its text assigns each story to one split (a quarter test, a quarter calibration, half
    train), so the splits are disjoint whatever the seeds.

    Raises ValueError for an unknown split.

    >>> from itertools import islice
    >>> story = next(stories("test", seed=0))
    >>> story.text.startswith("It is a"), story.log_probability < -40
    (True, True)
    """
    return (_story(teller) for teller in _tellers(split, seed))


def _story(teller: Teller) -> Story:
    return Story(teller.text, tuple(teller.surprisals))


def _tellers(split: str, seed: int) -> Iterator[Teller]:
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; the splits are {', '.join(SPLITS)}")
    rng = random.Random(f"storyworld {split} {seed}")

    def choose(weights: Sequence[float]) -> int:
        return rng.choices(range(len(weights)), weights)[0]

    while True:
        teller = Teller(choose)
        tell(teller)
        if _split_of(teller.text) == split:
            yield teller


def _split_of(text: str) -> str:
    return ("train", "train", "calibration", "test")[zlib.crc32(text.encode()) % 4]


class _Undecided(Exception):
    """The grammar asks for a choice beyond those prescribed."""

    def __init__(self, options: int):
        self.options = options


def derivations(text: str) -> Iterator[tuple[tuple[int, float], ...]]:
    """Yield the surprisals of every way in which the grammar can tell exactly this text.

    The grammar is unambiguous: there is one way for a story and none for any other text. This searches
    all choices by force and is the independent check of the probabilities that the stories carry.
    """
    undecided: list[list[int]] = [[]]
    while undecided:
        decisions = undecided.pop()
        prescribed = iter(decisions)

        def choose(weights: Sequence[float], prescribed=prescribed) -> int:
            decision = next(prescribed, None)
            if decision is None:
                raise _Undecided(len(weights))
            return decision

        teller = Teller(choose)
        try:
            tell(teller)
        except _Undecided as missing:
            if text.startswith(teller.text):
                undecided.extend([*decisions, option] for option in range(missing.options))
        else:
            if teller.text == text:
                yield tuple(teller.surprisals)


def log_probability(text: str) -> float:
    """Natural logarithm of the exact probability of a story, minus infinity for any other text.

    >>> story = next(stories("train", seed=1))
    >>> abs(log_probability(story.text) - story.log_probability) < 1e-9
    True
    >>> log_probability("It is a Monday in Atlantis.")
    -inf
    """
    ways = [-sum(nats for _, nats in surprisals) for surprisals in derivations(text)]
    return math.log(sum(map(math.exp, ways))) if ways else -math.inf


def questions(ability: str, count: int = 200, seed: int = 0) -> list[dict]:
    """Multiple-choice questions for one ability, from the test split, in lm-eval's data format.

    Each is a dict with `context` (a story up to a word that follows from what was said), `choices` (words
    with their leading space), `answer` (the index of the right one), `ability` and `stratum`. The strata
    (which number agrees, who was introduced first, addition or subtraction, the kind of fact) are equally
    frequent and wrong numbers and facts are as frequent as right ones, so answering by word frequency, by
    the last noun or by the most recent object stays at chance.

    Raises ValueError for an unknown ability or a count below 1.

    >>> question = questions("recall", count=2)[0]
    >>> question["ability"], len(question["choices"])
    ('recall', 2)
    """
    if ability not in ABILITIES:
        raise ValueError(f"unknown ability {ability!r}; the abilities are {', '.join(ABILITIES)}")
    if count < 1:
        raise ValueError(f"count is {count}; it must be at least 1")
    rng = random.Random(f"questions {ability} {seed}")
    answers: dict[str, list[str]] = {}
    for _, stratum, _, answer, _ in islice(_asked(ability, seed), 2000):
        answers.setdefault(stratum, []).append(answer)
    strata = sorted(answers)
    wanted = {stratum: count // len(strata) + (i < count % len(strata)) for i, stratum in enumerate(strata)}
    chosen: list[dict] = []
    for text, stratum, position, answer, alternatives in _asked(ability, seed):
        if len(chosen) == count:
            break
        if wanted[stratum] == 0:
            continue
        # A question with two choices is about the other one; else the wrong answers are drawn as the right
        # one was. Where two of them are the same the whole question is dropped: any other way out would
        # make frequent answers more often right than wrong.
        wrong = alternatives if len(alternatives) == 1 else rng.choices(answers[stratum], k=3)
        choices = [answer, *wrong]
        if len(set(choices)) < len(choices):
            continue
        wanted[stratum] -= 1
        rng.shuffle(choices)
        chosen.append(
            {
                "ability": ability,
                "stratum": stratum,
                "context": text[:position],
                "choices": [f" {choice}" for choice in choices],
                "answer": choices.index(answer),
            }
        )
    return chosen


def _asked(ability: str, seed: int) -> Iterator[tuple[str, str, int, str, list[str]]]:
    """At most one question of the ability from each story of the test split, any of those it holds."""
    rng = random.Random(f"asked {ability} {seed}")
    for teller in _tellers("test", seed):
        found = [question for question in teller.questions if question[0] == ability]
        if found:
            _, stratum, position, answer, alternatives = rng.choice(found)
            yield teller.text, stratum, position, answer, alternatives
