"""The facts of the story world."""

import subprocess
import sys
from collections import Counter

import pytest

from perpkit.sources import world
from perpkit.sources.world import FACTS, plural, with_article

KEYS = {
    "job": world.PEOPLE,
    "town": world.PEOPLE,
    "routine": [(person, day) for person in world.PEOPLE for day in world.WEEKDAYS],
    "product": world.TOWNS,
    "landmark": world.TOWNS,
    "festival": [(town, season) for town in world.TOWNS for season in world.SEASONS],
    "tool": world.JOBS,
    "workplace": world.JOBS,
    "food": world.ANIMALS,
    "home": world.ANIMALS,
    "material": world.THINGS,
}
DEALT = {
    "job": world.JOBS,
    "town": world.TOWNS,
    "routine": world.PLACES,
    "product": world.PRODUCTS,
    "landmark": world.LANDMARKS,
    "festival": world.FESTIVALS,
}
WORDS = {name: value for name, value in vars(world).items() if name.isupper() and isinstance(value, list)}


@pytest.mark.parametrize("kind", FACTS)
def test_a_fact_is_known_for_every_key_and_no_other(kind):
    assert set(FACTS[kind]) == set(KEYS[kind])


def test_no_kind_of_fact_is_forgotten_here():
    assert set(FACTS) == set(KEYS)


@pytest.mark.parametrize("kind", DEALT)
def test_dealt_answers_are_equally_frequent(kind):
    counts = Counter(FACTS[kind].values())
    assert set(counts) == set(DEALT[kind])
    assert max(counts.values()) - min(counts.values()) <= 1


def test_dealt_answers_are_not_in_alphabetical_order():
    # in order, the answer would follow from the place of the key in the list
    for kind, answers in DEALT.items():
        turns = [answers.index(answer) for answer in FACTS[kind].values()]
        assert turns != [i % len(answers) for i in range(len(turns))], kind


@pytest.mark.parametrize("kind", ["tool", "workplace", "food", "home", "product"])
def test_answers_tell_the_keys_apart(kind):
    assert len(set(FACTS[kind].values())) == len(FACTS[kind])


@pytest.mark.parametrize("kind", FACTS)
def test_there_are_three_wrong_answers_at_least(kind):
    assert len(set(FACTS[kind].values())) >= 4


@pytest.mark.parametrize("name", WORDS)
def test_no_word_stands_twice_in_a_list(name):
    assert len(set(WORDS[name])) == len(WORDS[name])


def test_names_of_people_towns_and_days_do_not_mix():
    named = [*world.WOMEN, *world.MEN, *world.TOWNS, *world.WEEKDAYS]
    assert len(set(named)) == len(named)
    assert all(name[0].isupper() for name in named)


def test_everybody_has_a_pronoun():
    assert {person: world.PRONOUN[person] for person in world.PEOPLE} == {
        **dict.fromkeys(world.WOMEN, "She"),
        **dict.fromkeys(world.MEN, "He"),
    }


def test_facts_are_the_same_in_every_process():
    # the order of a set of strings, for one, depends on the hash seed
    program = "from perpkit.sources.world import FACTS; print(FACTS)"
    told = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert told == {f"{FACTS}\n"}


@pytest.mark.parametrize(
    ("noun", "many"),
    [
        ("key", "keys"),
        ("bench", "benches"),
        ("brush", "brushes"),
        ("box", "boxes"),
        ("dress", "dresses"),
        ("mouse", "mice"),
        ("sheep", "sheep"),
        ("deer", "deer"),
    ],
)
def test_plural(noun, many):
    assert plural(noun) == many


def test_things_differ_from_their_plurals():
    # a noun that is its own plural would make the agreement of the verb a guess
    plurals = [plural(thing) for thing in world.THINGS]
    assert not set(plurals) & set(world.THINGS)
    assert len(set(plurals)) == len(plurals)


def test_article():
    assert [with_article(noun) for noun in ("owl", "eagle", "bee")] == ["an owl", "an eagle", "a bee"]
