"""The grammar of the story world: every choice is charged, every sentence is right."""

import math
import random
import re
from collections import Counter
from itertools import islice

import pytest

from perpkit.sources import grammar, world
from perpkit.sources.grammar import Teller, tell
from perpkit.sources.storyworld import stories


@pytest.fixture(scope="module")
def tellers():
    """Five hundred told stories, with their choices and questions."""
    rng = random.Random(0)
    told = []
    for _ in range(500):
        teller = Teller(lambda weights: rng.choices(range(len(weights)), weights)[0])
        tell(teller)
        told.append(teller)
    return told


def scripted(*choices):
    """A teller that chooses as told."""
    remaining = iter(choices)
    return Teller(lambda weights: next(remaining))


# --- the teller -----------------------------------------------------------------------------------


def test_pick_charges_minus_the_logarithm_of_the_probability():
    teller = scripted(1, 0)
    assert teller.pick(["a", "b"], [1.0, 3.0]) == "b"
    teller.say("Hello")
    assert teller.pick("xyz") == "x"
    (first, first_nats), (second, second_nats) = teller.surprisals
    assert (first, second) == (0, 5)
    assert first_nats == pytest.approx(math.log(4 / 3))
    assert second_nats == pytest.approx(math.log(3))


def test_a_choice_of_one_costs_nothing():
    teller = scripted(0)
    teller.pick(["only"])
    assert teller.surprisals == [(0, 0.0)]


def test_words_are_separated_and_punctuation_is_not():
    teller = scripted()
    for words in ("Mia", "'s", "hat", ".", "It"):
        teller.say(words)
    assert teller.text == "Mia's hat. It"


def test_ask_marks_the_place_and_says_the_answer():
    teller = scripted()
    teller.say("It")
    teller.ask("agreement", "singular", "is", ["are"])
    assert teller.text == "It is"
    assert teller.questions == [("agreement", "singular", 2, "is", ["are"])]


# --- stories --------------------------------------------------------------------------------------


def test_choices_are_charged_in_the_order_of_the_text_and_before_its_end(tellers):
    for teller in tellers:
        positions = [position for position, _ in teller.surprisals]
        assert positions == sorted(positions)
        assert positions[-1] < len(teller.text)
        assert all(nats >= 0 for _, nats in teller.surprisals)


def test_stories_are_well_formed_english(tellers):
    for teller in tellers:
        text = teller.text
        assert re.fullmatch(r"[A-Z].*\.", text)
        assert not re.search(r"  | [.,']|\.\S|\. [a-z]|\n", text), text
        assert not re.search(r"\b[Aa] [aeiou]|\b[Aa]n [^aeiou]", text), text


def test_scenes_are_as_frequent_as_their_weights(monkeypatch):
    counts = Counter()

    def counted(i, scene):
        def play(teller, scenery):
            counts[i] += 1
            scene(teller, scenery)

        return play

    monkeypatch.setattr(grammar, "SCENES", [counted(*pair) for pair in enumerate(grammar.SCENES)])
    list(islice(stories("train", 5), 1500))
    total = sum(counts.values())
    for i, weight in enumerate(grammar.WEIGHTS):
        share = weight / sum(grammar.WEIGHTS)
        assert abs(counts[i] - share * total) < 4.5 * math.sqrt(total * share * (1 - share))


# --- the questions are answered rightly, told apart from the grammar's own code -----------------------


def asked(tellers, ability):
    for teller in tellers:
        for found, stratum, position, answer, alternatives in teller.questions:
            if found == ability:
                assert teller.text[position:].startswith(f" {answer}")
                assert answer not in alternatives or ability == "counting"
                yield teller.text[:position], stratum, answer, teller.text[position + 1 + len(answer) :]


def test_counting_adds_up(tellers):
    number = world.NUMBERS.index
    seen = Counter()
    for before, stratum, answer, after in asked(tellers, "counting"):
        start, step, way = re.search(
            r"\w+ (\w+) \w+\. (?:She|He) \w+ (\w+) (more|of) [^.]* and now has$", before
        ).groups()
        step = number(step) if way == "more" else -number(step)
        assert number(answer) == number(start) + step
        assert stratum == ("more" if way == "more" else "fewer")
        noun = after.split(".")[0].strip()
        assert (noun in world.THINGS) == (answer == "one")
        seen[stratum] += 1
    assert min(seen["more"], seen["fewer"]) > 50


def test_pronouns_are_those_of_the_subject(tellers):
    for before, stratum, answer, _ in asked(tellers, "pronouns"):
        sentence = before.rstrip(".").rsplit(". ", 1)[-1]
        assert answer == stratum == world.PRONOUN[sentence.split()[0]]


def test_verbs_agree_with_the_head_of_the_subject(tellers):
    singular, plural = zip(*grammar.VERBS, strict=True)
    for before, stratum, answer, _ in asked(tellers, "agreement"):
        nouns = [word for word in re.findall(r"[Tt]he (\w+)", before.rsplit(". ", 1)[-1])]
        many = [noun not in world.THINGS for noun in nouns]
        assert answer in (plural if many[0] else singular)
        assert stratum.split()[0] == ("plural" if many[0] else "singular")
        assert stratum.split()[1] == ("same" if many[0] == many[-1] else "differs")


def test_recall_is_what_was_set_up(tellers):
    for before, stratum, answer, _ in asked(tellers, "recall"):
        key = before.split()[-1]
        first = before.index(f"{key} {answer}")
        about, order = stratum.split()
        # the set-up is one sentence for activities and one for toys: the first key follows its beginning
        start = before.rindex(". ", 0, first) + 2
        opening = before[start:first]
        assert (
            opening
            == {
                "activity first": "",
                "activity second": opening if re.fullmatch(r"\w+ \w+ and ", opening) else None,
                "toy first": "On the floor lie a ",
                "toy second": opening
                if re.fullmatch(r"On the floor lie a \w+ \w+ and a ", opening)
                else None,
            }[f"{about} {order}"]
        )


def test_facts_are_those_of_the_world(tellers):
    kinds = Counter()
    for before, kind, answer, _ in asked(tellers, "facts"):
        kinds[kind] += 1
        if kind == "routine":
            person = re.search(r"(\w+) (?:goes to|spends the day at) the$", before)[1]
            key = (person, re.match(r"It is a (\w+)", before)[1])
        elif kind == "festival":
            key = (re.findall(r" of (\w+) ", before)[-1], re.search(r"In (\w+) it holds the$", before)[1])
        else:
            known = set(world.FACTS[kind])
            key = [word for word in re.findall(r"\w+", before) if word in known][-1]
        assert world.FACTS[kind][key] == answer, before
    assert set(kinds) == set(world.FACTS) - {"job", "town"}


def test_people_are_introduced_with_their_own_job_and_town(tellers):
    for teller in tellers:
        for person, job, town in re.findall(r"(\w+) is the (\w+) from (\w+)\.", teller.text):
            assert (world.JOB[person], world.TOWN[person]) == (job, town)
        for person, job, town in re.findall(r"(\w+) works as an? (\w+) in (\w+)\.", teller.text):
            assert (world.JOB[person], world.TOWN[person]) == (job, town)
        for person, town, job in re.findall(r"(\w+) comes from (\w+), an? (\w+) by trade", teller.text):
            assert (world.JOB[person], world.TOWN[person]) == (job, town)
