"""Micro-stories: scenes of people, things and places, and the questions they answer.

A scene ties four relations together: who is where (place), who has what (thing), which colour a thing has (colour), and
what everybody knows of a thing (knowledge). Its passage states them in a random order; things change hands and people
move. Every answer is copied from the passage, or follows from a word of it by common knowledge, and cannot be guessed.

Sample of a passage, with a query of each kind about it:

    It rained a little. The pen belongs to Anna. Ben is in the mill. Anna is in the park. Ben has the key. Then Anna
    gave the pen to Ben. Some time went by.
    Where is Anna? park. Who has the pen? Ben. The pen is in the mill. To open the gate ask Ben.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from shedder_utils.pocket.world import COLOURS, FILLERS, PEOPLE, PLACES, PURPOSES, WOMEN, Kind, held_out, pronoun

Triple = tuple[str, str, str]


@dataclass(frozen=True)
class Document:
    """A text and the character spans (start, end) of its answers, each with its leading space."""

    text: str
    answers: tuple[tuple[int, int], ...]


class Writer:
    """Puts a document together and remembers where its answers are."""

    def __init__(self, text: str = "") -> None:
        self.text = text
        self.answers: list[tuple[int, int]] = []

    def say(self, text: str, answer: str = "", end: str = "") -> None:
        """Append a text, an answer after a space, and what follows the answer."""
        self.text += text
        if answer:
            self.answers.append((len(self.text), len(self.text) + len(answer) + 1))
            self.text += f" {answer}"
        self.text += end

    def document(self) -> Document:
        """The finished document."""
        return Document(self.text, tuple(self.answers))


@dataclass(frozen=True)
class Query:
    """Something a scene answers: as a question, and as sentences that the answer completes.

    form: what is asked for, given what. options: all words of the answer's class in the passage, the answer included.
    triple: the held-out unit that it is about.
    """

    form: str
    question: str
    clozes: tuple[str, ...]
    answer: str
    options: tuple[str, ...]
    triple: Triple


@dataclass
class Scene:
    """People with one thing each, in places or with colours. `attribute` is "place" or "colour"."""

    kind: Kind
    attribute: str
    people: list[str]
    things: list[str]
    values: list[str]
    holder: dict[str, str] = field(default_factory=dict)
    value: dict[str, str] = field(default_factory=dict)
    events: list[str] = field(default_factory=list)
    triples: set[Triple] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.holder = dict(zip(self.things, self.people, strict=True))
        owners = self.people if self.attribute == "place" else self.things
        self.value = dict(zip(owners, self.values, strict=True))
        self._note()

    def triple(self, thing: str) -> Triple:
        """The triple of a thing now: its holder, itself, and its holder's place or its colour."""
        person = self.holder[thing]
        return person, thing, self.value[person if self.attribute == "place" else thing]

    def _note(self) -> None:
        self.triples.update(self.triple(thing) for thing in self.things)

    def move(self, rng: random.Random) -> None:
        """Somebody goes to a place that has not been named yet."""
        person = rng.choice(self.people)
        place = rng.choice([p for p in PLACES if p not in self.values])
        self.values.append(place)
        self.value[person] = place
        self.events.append(f"{rng.choice(('Then', 'Later'))} {person} went to the {place}.")
        self._note()

    def give(self, rng: random.Random) -> None:
        """Somebody gives a thing to somebody else."""
        thing = rng.choice(self.things)
        giver = self.holder[thing]
        receiver = rng.choice([p for p in self.people if p != giver])
        self.holder[thing] = receiver
        self.events.append(f"{rng.choice(('Then', 'Later'))} {giver} gave the {thing} to {receiver}.")
        self._note()


def make_scene(rng: random.Random, kind: Kind, *, n_people: int = 4, n_events: int = 0, colour: bool = False) -> Scene:
    """A random scene. Events need places; things change hands only if they are portable."""
    people = rng.sample(PEOPLE, n_people)
    values = rng.sample(COLOURS if colour else PLACES, n_people)
    scene = Scene(kind, "colour" if colour else "place", people, rng.sample(kind.words, n_people), values)
    for _ in range(n_events):
        (scene.give if kind.portable and rng.random() < 0.5 else scene.move)(rng)
    return scene


def training_scene(
    rng: random.Random, kind: Kind, *, n_people: int = 4, n_events: int = 0, colour: bool = False
) -> Scene:
    """A random scene in which no triple that is kept for evaluation is ever true."""
    while True:
        scene = make_scene(rng, kind, n_people=n_people, n_events=n_events, colour=colour)
        if not any(held_out(*triple) for triple in scene.triples):
            return scene


def facts(rng: random.Random, scene: Scene, relations: tuple[str, ...] = ("attribute", "thing")) -> list[str]:
    """The scene's beginning as sentences in random order, restricted to some relations."""
    sentences = []
    for person, thing, value in zip(scene.people, scene.things, scene.values, strict=False):
        where = f"The {thing} is {value}." if scene.attribute == "colour" else f"{person} is in the {value}."
        what = rng.choice(scene.kind.facts).format(p=person, t=thing)
        if len(relations) == 2 and scene.attribute == "place" and rng.random() < 0.25:
            she_has = scene.kind.facts[0].format(p=pronoun(person).capitalize(), t=thing)
            sentences.append(f"{where} {she_has}")
        else:
            sentences += [where] * ("attribute" in relations) + [what] * ("thing" in relations)
    rng.shuffle(sentences)
    return sentences


def passage(rng: random.Random, scene: Scene) -> str:
    """The scene as a story: an opening, the facts, the events, and two or three sentences in which nothing happens."""
    opening, *rest = rng.sample(FILLERS, rng.randint(3, 4))
    return " ".join([opening, *facts(rng, scene), *scene.events, *rest])


def queries(scene: Scene) -> list[Query]:
    """Everything that the whole passage answers without doubt."""
    found = []
    for thing in scene.things:
        found += _about_thing(scene, thing)
    for person in scene.people:
        held = [t for t in scene.things if scene.holder[t] == person]
        if held and scene.attribute == "place":
            found += _about_place(scene, person, held)
        if len(held) == 1:
            found += _about_person(scene, person, held[0])
    return found


def _about_thing(scene: Scene, thing: str) -> list[Query]:
    kind, triple = scene.kind, scene.triple(thing)
    person, _, value = triple
    who, cloze = (text.format(t=thing) for text in kind.who)
    found = [Query("who_thing", who, (cloze,), person, tuple(scene.people), triple)]
    if scene.attribute == "colour":
        clozes = (f"The colour of the {thing} is",)
        found.append(Query("colour", f"What colour is the {thing}?", clozes, value, tuple(scene.values), triple))
    else:
        where, cloze = (text.format(t=thing) for text in kind.where)
        found.append(Query("thing_place", where, (cloze,), value, tuple(scene.values), triple))
    return found + (_about_purpose(scene, thing) if kind.name == "tool" else [])


def _about_purpose(scene: Scene, tool: str) -> list[Query]:
    person, _, place = triple = scene.triple(tool)
    purpose = PURPOSES[tool]
    who = (f"To {purpose} ask", f"The one to {purpose} is")
    found = [Query("purpose", f"Who can {purpose}?", who, person, tuple(scene.people), triple)]
    if scene.attribute == "place":
        where = (f"To {purpose} go to the",)
        found.append(Query("purpose_place", f"Where can you {purpose}?", where, place, tuple(scene.values), triple))
    return found


def _about_place(scene: Scene, person: str, held: list[str]) -> list[Query]:
    place = scene.value[person]
    triple = scene.triple(held[0])
    clozes: tuple[str, ...] = (f"{person} is in the", f"{person} stays in the")
    where = Query("place", f"Where is {person}?", clozes, place, tuple(scene.values), triple)
    cloze = f"The person in the {place} is"
    who = Query("who_place", f"Who is in the {place}?", (cloze,), person, tuple(scene.people), triple)
    found = [where, who]
    if len(held) == 1 and scene.kind.portable:
        clozes = (f"The thing in the {place} is the",)
        found.append(Query("place_thing", f"What is in the {place}?", clozes, held[0], tuple(scene.things), triple))
    return found


def _about_person(scene: Scene, person: str, thing: str) -> list[Query]:
    kind, triple, things = scene.kind, scene.triple(thing), tuple(scene.things)
    what, cloze = (text.format(p=person) for text in kind.what)
    shows = f"{person} {kind.shows.rsplit(' ', 1)[0]}"
    found = [Query("thing", what, (cloze, shows), thing, things, triple)]
    if scene.attribute == "colour":
        question, cloze = f"What colour is the thing of {person}?", f"The colour of the thing of {person} is"
        found.append(Query("person_colour", question, (cloze,), triple[2], tuple(scene.values), triple))
    for known in kind.knowledge:
        answers = tuple(dict.fromkeys(known.table[t] for t in things))
        question, cloze = known.question.format(p=person), known.cloze.format(p=person)
        found.append(Query("knowledge", question, (cloze,), known.table[thing], answers, triple))
    return found


def with_pronoun(scene: Scene, cloze: str) -> str:
    """The sentence with "she" or "he" for its subject, where only one person in the scene can be meant."""
    subject, _, rest = cloze.partition(" ")
    same = [p for p in scene.people if (p in WOMEN) == (subject in WOMEN)]
    return f"{pronoun(subject).capitalize()} {rest}" if same == [subject] else cloze
