"""The pocket world: its people, places and things, and what everybody there knows.

Every word is one common English word, so that the tokenizer can give it, with its leading space, a single token. A
*kind* is a class of things that can be tied to a person ("Anna has the lamp", "Anna is the baker", "Anna feels cold"),
together with the sentences that state the tie, ask for it and complete it. A *triple* (person, thing, place or colour)
is the unit that is held out: a tenth of all triples, chosen by a hash, is never true in training, and the tasks ask for
nothing else.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field


def _split(words: str) -> tuple[str, ...]:
    return tuple(words.split())


WOMEN = _split("Anna Clara Emma Grace Helen Jane Julia Kate Laura Lucy Maria Nora Rose Ruth Sara Vera")
MEN = _split("Adam Ben Carl David Eric Frank George Henry Jack Leo Mark Oscar Paul Peter Simon Tom")
PEOPLE = WOMEN + MEN

PLACES = _split(
    "garden kitchen park school market forest library church barn cellar attic station "
    "museum castle village valley tower mill cave office hotel theatre hospital prison"
)
COLOURS = _split("red blue green black white yellow brown purple orange grey")

MATERIALS = {
    "drum": "wood", "spoon": "wood", "flute": "wood", "chair": "wood",
    "bottle": "glass", "mirror": "glass", "vase": "glass", "jar": "glass",
    "scarf": "wool", "coat": "wool", "sock": "wool", "blanket": "wool",
    "book": "paper", "map": "paper", "card": "paper", "kite": "paper",
    "bell": "iron", "coin": "iron", "pot": "iron", "chain": "iron",
    "cup": "clay", "plate": "clay", "bowl": "clay", "brick": "clay",
    "belt": "leather", "boot": "leather", "purse": "leather", "ball": "leather",
}  # fmt: skip
PURPOSES = {
    "knife": "cut the rope", "hammer": "drive the nail", "key": "open the gate", "broom": "sweep the floor",
    "needle": "sew the shirt", "brush": "paint the wall", "axe": "split the log", "pen": "write the letter",
    "spade": "dig the hole", "net": "catch the fish", "ladder": "reach the roof", "bucket": "carry the water",
}  # fmt: skip
FOOD_OF_ANIMAL = {
    "cow": "grass", "dog": "bones", "cat": "milk", "hen": "corn", "horse": "hay", "duck": "bread",
    "bear": "honey", "mouse": "cheese", "lion": "meat", "frog": "flies", "goat": "leaves", "pig": "roots",
}  # fmt: skip
SOUND_OF_ANIMAL = {
    "cow": "moo", "dog": "bark", "cat": "purr", "hen": "cluck", "horse": "neigh", "duck": "quack",
    "bear": "growl", "mouse": "squeak", "lion": "roar", "frog": "croak", "goat": "bleat", "pig": "grunt",
}  # fmt: skip
PRODUCTS = {
    "baker": "bread", "tailor": "shirts", "potter": "pots", "farmer": "wheat", "painter": "pictures", "poet": "poems",
    "miner": "coal", "smith": "swords", "cook": "soup", "brewer": "beer", "weaver": "cloth", "cobbler": "shoes",
}  # fmt: skip
NEEDS = {
    "hungry": "food", "thirsty": "water", "tired": "sleep", "cold": "fire", "sick": "medicine",
    "dirty": "soap", "lonely": "friends", "bored": "games", "poor": "money", "lost": "maps",
}  # fmt: skip
FOODS = _split("apples bread cake cheese eggs grapes honey milk nuts pears rice soup")


@dataclass(frozen=True)
class Knowledge:
    """Something everybody knows about a kind of thing: a general statement, a question and a sentence to complete."""

    table: dict[str, str]
    statement: str
    question: str
    cloze: str


@dataclass(frozen=True)
class Kind:
    """A class of things that can be tied to a person, and its sentences: {p} stands for a person, {t} for a thing."""

    name: str
    words: tuple[str, ...]
    facts: tuple[str, ...]
    what: tuple[str, str]
    who: tuple[str, str]
    where: tuple[str, str]
    shows: str
    portable: bool = False
    knowledge: tuple[Knowledge, ...] = field(default=())


_HAS = ("{p} has the {t}.", "The {t} belongs to {p}.")
_WHAT_HAS = ("What does {p} have?", "{p} has the")
_WHO_HAS = ("Who has the {t}?", "The {t} belongs to")
_WHERE_THING = ("Where is the {t}?", "The {t} is in the")
_SHOWS_THING = "showed the {t}"

KINDS = {
    kind.name: kind
    for kind in (
        Kind(
            "object", tuple(MATERIALS), _HAS, _WHAT_HAS, _WHO_HAS, _WHERE_THING, _SHOWS_THING, True,
            (Knowledge(MATERIALS, "A {t} is made of {k}.", "What is the thing of {p} made of?", "{p} has a thing of"),),
        ),
        Kind("tool", tuple(PURPOSES), _HAS, _WHAT_HAS, _WHO_HAS, _WHERE_THING, _SHOWS_THING, True),
        Kind(
            "animal", tuple(FOOD_OF_ANIMAL), _HAS, _WHAT_HAS, _WHO_HAS, _WHERE_THING, _SHOWS_THING, True,
            (
                Knowledge(FOOD_OF_ANIMAL, "A {t} eats {k}.", "What does the animal of {p} eat?", "{p} feeds it with"),
                Knowledge(SOUND_OF_ANIMAL, "A {t} can {k}.", "What can the animal of {p} do?", "{p} hears it"),
            ),
        ),
        Kind(
            "job", tuple(PRODUCTS), ("{p} is the {t}.", "The {t} is called {p}."),
            ("What is the job of {p}?", "{p} is the"), ("Who is the {t}?", "The {t} is called"),
            ("Where is the {t}?", "The {t} is in the"), "was the {t}", False,
            (Knowledge(PRODUCTS, "A {t} makes {k}.", "What does {p} make?", "{p} makes"),),
        ),
        Kind(
            "state", tuple(NEEDS), ("{p} feels {t}.", "The {t} one is {p}."),
            ("How does {p} feel?", "{p} feels"), ("Who feels {t}?", "The {t} one is"),
            ("Where is the {t} one?", "The {t} one is in the"), "felt {t}", False,
            (Knowledge(NEEDS, "Someone {t} needs {k}.", "What does {p} need?", "{p} needs"),),
        ),
        Kind(
            "food", FOODS, ("{p} wants the {t}.",), ("What does {p} want?", "{p} wants the"),
            ("Who wants the {t}?", "The {t} will go to"), ("Where will the {t} go?", "The {t} will go to the"),
            "wanted the {t}",
        ),
    )
}  # fmt: skip

FILLERS = (
    "It was a quiet day.", "The wind was soft and slow.", "Nobody was in a hurry.", "The sun came out for a while.",
    "It rained a little.", "The clouds were low and dark.", "Some time went by.", "The streets were almost empty.",
    "It was nearly evening.", "The air smelled of summer.", "A long hour passed.", "Everything was calm and still.",
    "The morning had been long.", "Snow fell on the hills.", "The day went on as always.", "There was not much to say.",
)  # fmt: skip


def pronoun(person: str) -> str:
    """The pronoun of a person: "she" or "he"."""
    return "she" if person in WOMEN else "he"


def held_out(person: str, thing: str, place: str) -> bool:
    """Whether a triple (the place may be a colour) is kept for evaluation: one in ten, by a hash that never changes."""
    return zlib.crc32(f"{person} {thing} {place}".encode()) % 10 == 0


def answer_words() -> list[str]:
    """Every word that can be an answer, sorted: each must be one token with its leading space."""
    words = {*PEOPLE, *PLACES, *COLOURS}
    for kind in KINDS.values():
        words.update(kind.words)
        for knowledge in kind.knowledge:
            words.update(knowledge.table.values())
    return sorted(words)


def sentence_forms() -> list[str]:
    """Every sentence form of the world, with empty places for the words."""
    forms: list[str] = []
    for kind in KINDS.values():
        forms += [*kind.facts, *kind.what, *kind.who, *kind.where, kind.shows]
        for known in kind.knowledge:
            forms += [known.statement, known.question, known.cloze]
    return [" ".join(form.format(p="", t="", l="", k="").split()) for form in forms]
