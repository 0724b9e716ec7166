"""The facts of the story world: who lives where, what animals eat, what things are made of.

Everything here is fixed; a language model can only know it by having memorised it. The sensible facts
(a bee lives in a hive) are written out; the arbitrary ones (where Mia goes on Mondays) are dealt once
from a fixed seed, evenly, so that no answer is more frequent than another.
"""

import random

WOMEN = "Ada Bea Eva Fay Ida Joy Kim Lia Mia Pam Tia Zoe".split()
MEN = "Abe Ben Dan Eli Gus Ian Jim Leo Max Ned Sam Tom".split()
PEOPLE = WOMEN + MEN
PRONOUN = {**dict.fromkeys(WOMEN, "She"), **dict.fromkeys(MEN, "He")}

WEEKDAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
SEASONS = "spring summer autumn winter".split()
PLACES = "market park lake pool bank zoo inn fair museum library garden station".split()
COLOURS = "red blue green white black brown pink grey".split()
NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve".split()
ADJECTIVES = "old new clean dirty heavy light cheap lovely broken ready".split()

JOB_TOOL_AND_WORKPLACE = {
    "baker": ("tray", "bakery"),
    "barber": ("comb", "salon"),
    "clerk": ("pen", "office"),
    "cook": ("pan", "kitchen"),
    "doctor": ("needle", "ward"),
    "farmer": ("fork", "barn"),
    "fisher": ("net", "pier"),
    "guard": ("torch", "gate"),
    "hunter": ("bow", "forest"),
    "miller": ("sieve", "mill"),
    "miner": ("lamp", "mine"),
    "nurse": ("bandage", "clinic"),
    "painter": ("brush", "studio"),
    "piper": ("pipe", "stage"),
    "potter": ("wheel", "shed"),
    "sailor": ("rope", "ship"),
    "smith": ("hammer", "forge"),
    "tailor": ("pin", "shop"),
    "teacher": ("pointer", "school"),
    "weaver": ("loom", "hall"),
}
JOB_TOOL = {job: tool for job, (tool, _) in JOB_TOOL_AND_WORKPLACE.items()}
JOB_WORKPLACE = {job: place for job, (_, place) in JOB_TOOL_AND_WORKPLACE.items()}
JOBS = list(JOB_TOOL_AND_WORKPLACE)

ANIMAL_FOOD_AND_HOME = {
    "bat": ("moths", "cave"),
    "bear": ("honey", "den"),
    "beaver": ("bark", "dam"),
    "bee": ("nectar", "hive"),
    "camel": ("dates", "desert"),
    "cat": ("milk", "house"),
    "cow": ("clover", "meadow"),
    "crab": ("shrimp", "beach"),
    "crow": ("crumbs", "nest"),
    "deer": ("leaves", "wood"),
    "dog": ("bones", "kennel"),
    "duck": ("reeds", "pond"),
    "eagle": ("snakes", "cliff"),
    "fox": ("hens", "hill"),
    "frog": ("flies", "swamp"),
    "goat": ("grass", "slope"),
    "hare": ("herbs", "field"),
    "hen": ("corn", "coop"),
    "horse": ("oats", "stable"),
    "lion": ("meat", "plain"),
    "mole": ("worms", "tunnel"),
    "monkey": ("figs", "jungle"),
    "mouse": ("cheese", "hole"),
    "owl": ("mice", "tower"),
    "parrot": ("seeds", "cage"),
    "pig": ("roots", "sty"),
    "rabbit": ("carrots", "burrow"),
    "seal": ("fish", "shore"),
    "sheep": ("hay", "pen"),
    "squirrel": ("nuts", "tree"),
}
ANIMAL_FOOD = {animal: food for animal, (food, _) in ANIMAL_FOOD_AND_HOME.items()}
ANIMAL_HOME = {animal: home for animal, (_, home) in ANIMAL_FOOD_AND_HOME.items()}
ANIMALS = list(ANIMAL_FOOD_AND_HOME)

MATERIAL = {
    "bag": "cloth",
    "basket": "straw",
    "book": "paper",
    "boot": "leather",
    "bowl": "clay",
    "bucket": "tin",
    "candle": "wax",
    "card": "paper",
    "chair": "wood",
    "clock": "brass",
    "coat": "wool",
    "coin": "silver",
    "cup": "clay",
    "hat": "straw",
    "jar": "glass",
    "key": "iron",
    "map": "paper",
    "mug": "clay",
    "plate": "tin",
    "quilt": "cotton",
    "ring": "gold",
    "shirt": "cotton",
    "sock": "wool",
    "spoon": "silver",
    "stool": "wood",
    "stove": "iron",
    "tyre": "rubber",
    "bench": "stone",
    "pot": "iron",
    "rake": "wood",
    "towel": "cotton",
    "step": "stone",
    "tent": "cloth",
    "belt": "leather",
    "vase": "glass",
}
THINGS = list(MATERIAL)
ACTIVITIES = "cooks dances draws fishes hums naps reads runs sews skates sweeps swims".split()
TOYS = "ball bell boat crown doll drum flag flute horn kite mask puppet".split()

TOWNS = (
    "Arden Brill Corva Delm Elka Fenn Garth Holm Irna Joss Kelm Lorn Marl Nore Orla Perth Quill "
    "Rusk Selm Tarn"
).split()
PRODUCTS = (
    "beer bread butter clocks dolls gloves hats jam ink lace pears plums rugs salt silk soap tea "
    "tiles toys wine"
).split()
LANDMARKS = "abbey arch bridge castle church fort fountain statue temple wall".split()
FESTIVALS = "apple boat dance fire flower lantern moon rain snow song story sun".split()


def _dealt(answers: list[str], keys: list) -> dict:
    """Deal the answers to the keys evenly, in an order fixed by the kind of answer."""
    dealt = [answers[i % len(answers)] for i in range(len(keys))]
    random.Random(f"storyworld {answers[0]}").shuffle(dealt)
    return dict(zip(keys, dealt, strict=True))


JOB = _dealt(JOBS, PEOPLE)
TOWN = _dealt(TOWNS, PEOPLE)
ROUTINE = _dealt(PLACES, [(person, day) for person in PEOPLE for day in WEEKDAYS])
PRODUCT = _dealt(PRODUCTS, TOWNS)
LANDMARK = _dealt(LANDMARKS, TOWNS)
FESTIVAL = _dealt(FESTIVALS, [(town, season) for town in TOWNS for season in SEASONS])

FACTS = {
    "job": JOB,
    "town": TOWN,
    "routine": ROUTINE,
    "product": PRODUCT,
    "landmark": LANDMARK,
    "festival": FESTIVAL,
    "tool": JOB_TOOL,
    "workplace": JOB_WORKPLACE,
    "food": ANIMAL_FOOD,
    "home": ANIMAL_HOME,
    "material": MATERIAL,
}


def plural(noun: str) -> str:
    """The English plural of a noun of the story world."""
    irregular = {"mouse": "mice", "sheep": "sheep", "deer": "deer"}
    if noun in irregular:
        return irregular[noun]
    return noun + ("es" if noun.endswith(("x", "s", "ch", "sh")) else "s")


def with_article(noun: str) -> str:
    """The noun after "a" or "an"."""
    return ("an " if noun[0] in "aeiou" else "a ") + noun
