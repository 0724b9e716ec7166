"""The embedded language: exact probabilities, disjoint splits, and questions that surface does not answer."""

import math
import random
import re
import zlib
from collections import Counter
from itertools import islice

import pytest

from perpkit.sources import storyworld
from perpkit.sources.grammar import Teller, tell
from perpkit.sources.storyworld import (
    ABILITIES,
    SPLITS,
    derivations,
    log_probability,
    questions,
    stories,
)
from perpkit.sources.world import WEEKDAYS

LETTERS = re.compile(r"[A-Za-z]+")


def some_stories():
    for split in SPLITS:
        for seed in range(4):
            yield from islice(stories(split, seed), 5)


# --- exact probability ----------------------------------------------------------------------------


def test_every_story_has_one_derivation_with_the_probability_it_carries():
    for story in some_stories():
        assert list(derivations(story.text)) == [story.surprisals]


def test_log_probability_is_the_sum_over_choices():
    story = next(stories("train", 3))
    assert story.log_probability == pytest.approx(-sum(nats for _, nats in story.surprisals))
    assert log_probability(story.text) == pytest.approx(story.log_probability, abs=1e-9)


def test_ambiguous_texts_have_the_sum_of_their_derivations(monkeypatch):
    def toy(t):
        # "ha ha" in two ways, 1/2 · 1/4 and 1/2; "ha" in one, 1/2 · 3/4
        if t.pick([True, False]):
            t.say("ha")
            if t.pick([True, False], [1.0, 3.0]):
                t.say("ha")
        else:
            t.say("ha ha")

    monkeypatch.setattr(storyworld, "tell", toy)
    assert math.exp(log_probability("ha ha")) == pytest.approx(5 / 8)
    assert math.exp(log_probability("ha")) == pytest.approx(3 / 8)
    assert log_probability("ha ha ha") == -math.inf


@pytest.mark.parametrize("text", ["", "It", "It is a Monday in Atlantis."])
def test_other_texts_are_impossible(text):
    assert log_probability(text) == -math.inf


def test_mutilated_stories_are_impossible():
    for story in islice(stories("test", 1), 10):
        words = story.text.split(" ")
        swapped = [words[1], words[0], *words[2:]]
        for changed in (story.text[:-1], f"{story.text} ", story.text * 2, " ".join(swapped)):
            assert log_probability(changed) == -math.inf


def test_wrong_totals_are_impossible():
    found = 0
    for story in islice(stories("train", 2), 100):
        if match := re.search(r"now has (\w+) ", story.text):
            wrong = "eight" if match[1] != "eight" else "nine"
            changed = story.text[: match.start(1)] + wrong + story.text[match.end(1) :]
            assert log_probability(changed) == -math.inf
            found += 1
        if found == 10:
            return
    pytest.fail("too few stories count")


def test_another_day_is_as_probable_where_nothing_depends_on_it():
    free = (story for story in stories("train", 4) if len(re.findall(r"\w+day", story.text)) == 1)
    free = (story for story in free if "the day" not in story.text)
    for story in islice(free, 5):
        day = re.match(r"It is a (\w+)", story.text)[1]
        other = WEEKDAYS[WEEKDAYS.index(day) - 1]
        assert log_probability(story.text.replace(day, other)) == pytest.approx(story.log_probability)


# --- seeds and splits -----------------------------------------------------------------------------


def first(split, seed, count=20):
    return [story.text for story in islice(stories(split, seed), count)]


def test_the_same_seed_tells_the_same_stories():
    told = first("train", 7)
    random.seed(1)  # whatever else is drawn meanwhile
    state = random.getstate()
    assert first("train", 7) == told
    assert random.getstate() == state


def test_other_seeds_and_splits_tell_other_stories():
    told = [tuple(first(split, seed)) for split in SPLITS for seed in range(3)]
    assert len(set(told)) == len(told)


def test_splits_are_disjoint_whatever_the_seeds(monkeypatch):
    def toy(t):
        t.say(str(t.pick(range(40))))

    # a language of forty texts, so that every split meets every text it may
    monkeypatch.setattr(storyworld, "tell", toy)
    told = {split: {text for seed in range(3) for text in first(split, seed, 300)} for split in SPLITS}
    for one in SPLITS:
        for other in SPLITS:
            assert one == other or not told[one] & told[other]
    assert set.union(*told.values()) == {str(number) for number in range(40)}


def test_the_digest_gives_half_to_training():
    rng = random.Random(0)
    shares = Counter(storyworld._split_of(str(rng.random())) for _ in range(4000))
    assert {split: round(count / 4000, 1) for split, count in shares.items()} == {
        "train": 0.5,
        "calibration": pytest.approx(0.25, abs=0.06),
        "test": pytest.approx(0.25, abs=0.06),
    }
    digests = [zlib.crc32(text.encode()) % 4 for text in first("test", 0)]
    assert set(digests) == {3}


def test_unknown_split():
    with pytest.raises(ValueError, match="unknown split 'valid'; the splits are train, calibration, test"):
        next(stories("valid"))


# --- questions ------------------------------------------------------------------------------------


def possible(beginning):
    """Whether the grammar can tell a story that begins so."""
    undecided = [[]]
    while undecided:
        decisions = undecided.pop()
        remaining = iter(decisions)
        missing = []

        def choose(weights, remaining=remaining, missing=missing):
            for decision in remaining:
                return decision
            missing.append(len(weights))
            raise StopIteration

        teller = Teller(choose)
        try:
            tell(teller)
        except StopIteration:
            if teller.text.startswith(beginning):
                return True
            if beginning.startswith(teller.text):
                undecided.extend([*decisions, option] for option in range(missing[0]))
        else:
            if teller.text.startswith(beginning):
                return True
    return False


@pytest.mark.parametrize("ability", ABILITIES)
def test_questions_have_the_harness_format(asked, ability):
    for question in asked[ability]:
        assert set(question) == {"ability", "stratum", "context", "choices", "answer"}
        assert question["ability"] == ability
        assert len(set(question["choices"])) == len(question["choices"])
        assert all(re.fullmatch(r" [A-Za-z]+", choice) for choice in question["choices"])
        assert 0 <= question["answer"] < len(question["choices"])
        assert not question["context"].endswith(" ")


@pytest.mark.parametrize("ability", ABILITIES)
def test_exactly_one_choice_goes_on_grammatically(asked, ability):
    for question in asked[ability][:20]:
        # the full stop or space ends the word: "is" is no beginning of "island"
        fits = [
            possible(f"{question['context']}{choice} ") or possible(f"{question['context']}{choice}.")
            for choice in question["choices"]
        ]
        assert [i for i, fit in enumerate(fits) if fit] == [question["answer"]], question


@pytest.mark.parametrize("ability", ABILITIES)
def test_there_are_as_many_questions_as_asked_for_in_equal_strata(asked, ability):
    assert len(asked[ability]) == 800
    counts = Counter(question["stratum"] for question in asked[ability])
    assert len(counts) >= 2
    assert max(counts.values()) - min(counts.values()) <= 1


def test_fewer_questions_than_strata_are_still_as_many_as_asked_for():
    assert len({question["stratum"] for question in questions("facts", 5)}) == 5


@pytest.mark.parametrize("ability", ABILITIES)
def test_every_question_comes_from_a_story_of_its_own(asked, ability):
    assert len({question["context"] for question in asked[ability]}) == 800


def test_questions_follow_the_seed(asked, generators_unchanged):
    assert questions("facts", 800) == asked["facts"]
    assert questions("facts", 800, seed=1) != asked["facts"]


@pytest.mark.parametrize("ability", ABILITIES)
def test_the_right_choice_stands_anywhere(asked, ability):
    size = len(asked[ability][0]["choices"])
    places = Counter(question["answer"] for question in asked[ability])
    for place in range(size):
        assert abs(places[place] - 800 / size) < 4 * math.sqrt(800 / size * (1 - 1 / size))


def test_unknown_ability():
    with pytest.raises(ValueError, match="unknown ability 'spelling'; the abilities are agreement, pronouns"):
        questions("spelling")


@pytest.mark.parametrize("count", [0, -1])
def test_questions_want_a_positive_count(count):
    with pytest.raises(ValueError, match=f"count is {count}"):
        questions("recall", count)


# --- what answers the questions without understanding them ----------------------------------------------


class Trigrams:
    """Word counts of training stories; a trigram not seen backs off to the bigram, then to the word."""

    def __init__(self, texts):
        self.counts = [Counter(), Counter(), Counter()]
        self.contexts = [Counter(), Counter(), Counter()]
        for text in texts:
            words = ["", "", *re.findall(r"[A-Za-z]+|[^\sA-Za-z]", text)]
            for i in range(2, len(words)):
                for order in range(3):
                    context = tuple(words[i - order : i])
                    self.counts[order][context, words[i]] += 1
                    self.contexts[order][context] += 1

    def score(self, context, choice, order):
        words = re.findall(r"[A-Za-z]+|[^\sA-Za-z]", context)
        for shorter in range(order, -1, -1):
            seen = tuple(words[len(words) - shorter :])
            if count := self.counts[shorter][seen, choice.strip()]:
                return 0.4 ** (order - shorter) * count / self.contexts[shorter][seen]
        return 0.0


@pytest.fixture(scope="module")
def trigrams():
    return Trigrams(story.text for story in islice(stories("train", 11), 20_000))


def places(context, choice):
    """Where a word stands in the context."""
    return [match.start() for match in LETTERS.finditer(context) if match[0] == choice.strip()]


def agrees_with_the_last_noun(context, choice):
    return (choice.strip() in ("are", "were", "look", "seem")) == context.endswith("s")


HEURISTICS = {
    "frequent word": lambda trigrams, context, choice: trigrams.score(context, choice, 0),
    "bigram": lambda trigrams, context, choice: trigrams.score(context, choice, 1),
    "trigram": lambda trigrams, context, choice: trigrams.score(context, choice, 2),
    "said last": lambda trigrams, context, choice: max(places(context, choice), default=-1),
    "said first": lambda trigrams, context, choice: -min(places(context, choice), default=10_000),
    "said most": lambda trigrams, context, choice: len(places(context, choice)),
    "agrees with the last noun": lambda trigrams, context, choice: agrees_with_the_last_noun(context, choice),
    "short word": lambda trigrams, context, choice: -len(choice),
    "first in the alphabet": lambda trigrams, context, choice: -ord(choice[1]),
}


@pytest.mark.parametrize("heuristic", HEURISTICS)
@pytest.mark.parametrize("ability", ABILITIES)
def test_surface_stays_at_chance(asked, trigrams, ability, heuristic):
    right, variance, chance = 0.0, 0.0, 0.0
    for question in asked[ability]:
        scores = [
            HEURISTICS[heuristic](trigrams, question["context"], choice) for choice in question["choices"]
        ]
        best = [i for i, score in enumerate(scores) if score == max(scores)]
        right += (question["answer"] in best) / len(best)
        guess = 1 / len(question["choices"])
        chance += guess
        variance += guess * (1 - guess)
    reached = f"{right / 800:.3f} where guessing reaches {chance / 800:.3f}"
    assert right - chance < 3.5 * math.sqrt(variance), reached
    # of two choices the one that a heuristic avoids is as much of a hint
    assert guess < 0.5 or chance - right < 3.5 * math.sqrt(variance), reached
