"""The grammar of the story world: a probabilistic program whose every choice is written down."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from .world import (
    ACTIVITIES,
    ADJECTIVES,
    ANIMALS,
    COLOURS,
    FACTS,
    JOB,
    JOBS,
    NUMBERS,
    PEOPLE,
    PRONOUN,
    SEASONS,
    THINGS,
    TOWN,
    TOWNS,
    TOYS,
    WEEKDAYS,
    plural,
    with_article,
)

MOMENTS = ["after lunch", "before noon", "in the rain", "on the road", "once again", "with a smile"]
PREPOSITIONS = ["near", "behind", "under", "beside", "below"]
VERBS = [("is", "are"), ("was", "were"), ("looks", "look"), ("seems", "seem")]


class Teller:
    """Tells one story: `choose(weights)` decides every choice, the rest is grammar.

    `surprisals` holds `(position, nats)` for every choice: the character of the text at which it was made
    and minus the logarithm of its probability. `questions` holds the points at which the next words follow
    from what was said, as `(ability, stratum, position, answer, alternatives)`.
    """

    def __init__(self, choose: Callable[[Sequence[float]], int]):
        self._choose = choose
        self.text = ""
        self.surprisals: list[tuple[int, float]] = []
        self.questions: list[tuple[str, str, int, str, list[str]]] = []

    def pick(self, options: Sequence, weights: Sequence[float] | None = None):
        weights = weights or [1.0] * len(options)
        chosen = self._choose(weights)
        self.surprisals.append((len(self.text), math.log(sum(weights) / weights[chosen])))
        return options[chosen]

    def say(self, words: str) -> None:
        glued = not self.text or words[0] in ".,'"
        self.text += words if glued else " " + words

    def ask(self, ability: str, stratum: str, answer: str, alternatives: Sequence[str]) -> None:
        """Mark that the grammar determines `answer` here, then say it."""
        self.questions.append((ability, stratum, len(self.text), answer, list(alternatives)))
        self.say(answer)

    def ask_fact(self, kind: str, key) -> None:
        facts = FACTS[kind]
        self.ask("facts", kind, facts[key], sorted(set(facts.values()) - {facts[key]}))


@dataclass
class Scenery:
    """What a story sets up at its beginning and comes back to; the first of two was named first."""

    day: str
    season: str
    people: list[str] = field(default_factory=list)
    activity: dict[str, str] = field(default_factory=dict)
    toy: dict[str, str] = field(default_factory=dict)


def _introduce(t: Teller, scenery: Scenery) -> None:
    person = t.pick([p for p in PEOPLE if p not in scenery.people])
    scenery.people.append(person)
    form = t.pick([0, 1, 2])
    if form == 0:
        t.say(f"{person} is the {JOB[person]} from {TOWN[person]}.")
    elif form == 1:
        t.say(f"{person} works as a {JOB[person]} in {TOWN[person]}.")
    else:
        t.say(f"{person} comes from {TOWN[person]}, a {JOB[person]} by trade.")


def _set_up(t: Teller, scenery: Scenery) -> None:
    """Who does what, and which toy has which colour."""
    for person in scenery.people:
        if scenery.activity:
            t.say("and")
        t.say(person)
        taken = scenery.activity.values()
        scenery.activity[person] = t.pick([activity for activity in ACTIVITIES if activity not in taken])
        t.say(scenery.activity[person])
    t.say(". On the floor lie a")
    for last in (False, True):
        colour = t.pick([colour for colour in COLOURS if colour not in scenery.toy])
        t.say(colour)
        taken = scenery.toy.values()
        scenery.toy[colour] = t.pick([toy for toy in TOYS if toy not in taken])
        t.say(scenery.toy[colour])
        t.say("." if last else "and a")


def _recall(t: Teller, ability: str, key: str, known: dict[str, str]) -> None:
    """Say the key, then what was set up for it: the question of who does what, or what has which colour."""
    t.say(key)
    (other,) = (value for named, value in known.items() if named != key)
    order = "first" if key == next(iter(known)) else "second"
    t.ask("recall", f"{ability} {order}", known[key], [other])


def _playing(t: Teller, scenery: Scenery) -> None:
    if t.pick([True, False]):
        t.say("Once more")
        _recall(t, "activity", t.pick(scenery.people), scenery.activity)
    else:
        t.say(t.pick(scenery.people))
        t.say(t.pick(["takes", "likes"]))
        t.say("the")
        _recall(t, "toy", t.pick(list(scenery.toy)), scenery.toy)
    t.say(t.pick(MOMENTS))
    t.say(".")


def _counting(t: Teller, scenery: Scenery) -> None:
    person = t.pick(scenery.people)
    t.say(person)
    t.say(t.pick(["finds", "buys", "makes"]))
    start = t.pick(range(2, 8))
    t.say(NUMBERS[start])
    noun = t.pick(THINGS)
    t.say(f"{plural(noun)}.")
    pronoun = PRONOUN[person]
    t.ask("pronouns", pronoun, pronoun, ["He" if pronoun == "She" else "She"])
    adds = t.pick([True, False])
    t.say(t.pick(["gets", "wins"] if adds else ["sells", "loses"]))
    step = t.pick(range(1, 6) if adds else range(1, start))
    t.say(NUMBERS[step])
    t.say("more" if adds else "of them")
    t.say(t.pick(MOMENTS))
    t.say("and now has")
    total = start + step if adds else start - step
    t.ask("counting", "more" if adds else "fewer", NUMBERS[total], NUMBERS[1:])
    t.say(noun if total == 1 else plural(noun))
    t.say(".")


def _agreement(t: Teller, scenery: Scenery) -> None:
    form = t.pick([0, 1, 2])
    is_plural = _noun(t, "The")
    if form == 1:
        t.say("that")
        t.say(t.pick(scenery.people))
        t.say(t.pick(["left", "put"]))
    t.say(t.pick(PREPOSITIONS))
    attractor_is_plural = _noun(t, "the")
    if form == 2:
        t.say("and")
        attractor_is_plural = _noun(t, "the")
    singular_verb, plural_verb = t.pick(VERBS)
    verb, wrong = (plural_verb, singular_verb) if is_plural else (singular_verb, plural_verb)
    number = "plural" if is_plural else "singular"
    t.ask("agreement", number + (" same" if is_plural == attractor_is_plural else " differs"), verb, [wrong])
    t.say(t.pick(ADJECTIVES))
    t.say(".")


def _noun(t: Teller, article: str) -> bool:
    """Say a noun in either number; whether it is plural."""
    t.say(article)
    noun = t.pick(THINGS)
    is_plural = t.pick([False, True])
    t.say(plural(noun) if is_plural else noun)
    return is_plural


def _routine(t: Teller, scenery: Scenery) -> None:
    person = t.pick(scenery.people)
    form = t.pick([0, 1])
    t.say(
        f"As on every {scenery.day}, {person} goes to the" if form == 0 else f"{person} spends the day at the"
    )
    t.ask_fact("routine", (person, scenery.day))
    t.say(".")


def _animal(t: Teller, scenery: Scenery) -> None:
    t.say(t.pick(scenery.people))
    t.say(t.pick(["sees", "hears", "meets"]))
    creature = t.pick(ANIMALS)
    t.say(with_article(creature))
    t.say(t.pick(MOMENTS))
    t.say(".")
    kind = t.pick(["food", "home"])
    t.say("It is looking for" if kind == "food" else "It is on its way to the")
    t.ask_fact(kind, creature)
    t.say(".")


def _town(t: Teller, scenery: Scenery) -> None:
    t.say(t.pick(scenery.people))
    t.say(t.pick(["dreams", "talks", "sings"]))
    place = t.pick(TOWNS)
    t.say(f"of {place}")
    t.say(t.pick(MOMENTS))
    t.say(".")
    kind = t.pick(["product", "landmark", "festival"])
    if kind == "product":
        t.say("People there make")
        t.ask_fact("product", place)
    elif kind == "landmark":
        t.say("Its pride is a tall")
        t.ask_fact("landmark", place)
    else:
        t.say(f"In {scenery.season} it holds the")
        t.ask_fact("festival", (place, scenery.season))
        t.say("feast")
    t.say(".")


def _job(t: Teller, scenery: Scenery) -> None:
    t.say("A")
    trade = t.pick(JOBS)
    t.say(f"{trade} walks by")
    t.say(t.pick(MOMENTS))
    kind = t.pick(["tool", "workplace"])
    t.say("and asks for a" if kind == "tool" else "and hurries to the")
    t.ask_fact(kind, trade)
    t.say(".")


def _material(t: Teller, scenery: Scenery) -> None:
    t.say(t.pick(scenery.people))
    t.say("looks at a")
    thing = t.pick(THINGS)
    t.say(thing)
    t.say(t.pick(MOMENTS))
    t.say(". It is made of")
    t.ask_fact("material", thing)
    t.say(".")


def _farewell(t: Teller, scenery: Scenery) -> None:
    person = t.pick(scenery.people)
    t.say("At night the")
    _recall(t, "toy", t.pick(list(scenery.toy)), scenery.toy)
    t.say("goes home with")
    t.say(person)
    t.say(f"to {TOWN[person]}. Once more")
    _recall(t, "activity", t.pick(scenery.people), scenery.activity)
    t.say(".")


SCENES = [_playing, _counting, _agreement, _routine, _animal, _town, _job, _material]
WEIGHTS = [2.0, 2.0, 2.0, 2.0, 1.0, 2.0, 1.0, 1.0]


def tell(t: Teller) -> None:
    """Tell one story of a day: two people, two toys, three scenes, a farewell."""
    t.say("It is a")
    day = t.pick(WEEKDAYS)
    t.say(f"{day} in")
    season = t.pick(SEASONS)
    t.say(f"{season}.")
    scenery = Scenery(day, season)
    _introduce(t, scenery)
    _introduce(t, scenery)
    _set_up(t, scenery)
    for _ in range(3):
        t.pick(SCENES, WEIGHTS)(t, scenery)
    _farewell(t, scenery)
