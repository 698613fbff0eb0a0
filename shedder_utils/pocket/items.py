"""Items of the seven pocket tasks: a passage and what has to be told from it, in the task's format.

The same functions make training documents (no held-out triple is ever true in them) and evaluation items (each asks
about a held-out triple). The choices are always words of one class that the passage names, or that follow from such
words by common knowledge, so that nothing but the right fact tells them apart.

    pocket_lambada        ... In the end the lamp is in the | garden
    pocket_hellaswag      Visit: ... Ben wants to see Anna. So he | walks to the garden
    pocket_piqa           Question: ... Ben wants to cut the rope. What should he do?\\nAnswer: | go to the garden
    pocket_arc_easy       Question: ... Where is Anna?\\nAnswer: | garden
    pocket_arc_challenge  Question: ... Where is the lamp?\\nAnswer: | garden      (who has it, and where is she?)
    pocket_winogrande     ... In the end Anna | showed the lamp                    (scored after either name)
    pocket_openbookqa     ... Anna feeds it with | grass                           (she has the cow)
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from shedder_utils.pocket.recall import ask, ask_formally, state_knowledge
from shedder_utils.pocket.stories import (
    Document,
    Query,
    Scene,
    Writer,
    make_scene,
    passage,
    queries,
    training_scene,
    with_pronoun,
)
from shedder_utils.pocket.world import KINDS, PURPOSES, WOMEN, held_out, pronoun

Row = dict[str, Any]
Pairs = list[tuple[str, str]]
LETTERS = "ABCD"


@dataclass(frozen=True)
class Item:
    """One item: its row in the task's JSON, what it is about, the words to choose from, and the right one's index."""

    row: Row
    scene: Scene
    query: Query
    passage: str
    options: list[str]
    gold: int


def _scene_with(
    rng: random.Random,
    training: bool,
    kinds: tuple[str, ...],
    forms: tuple[str, ...],
    max_events: int,
    accepts: Callable[[Scene, Query], bool] = lambda scene, query: True,
) -> tuple[Scene, Query]:
    """A scene and one of its queries: about a held-out triple for evaluation, about no such triple for training."""
    form = rng.choice(forms)
    colour = form in ("colour", "person_colour")
    while True:
        kind = KINDS[rng.choice(("object", "tool") if colour else kinds)]
        n_events = 0 if colour else rng.randint(0, max_events)
        scene = (training_scene if training else make_scene)(rng, kind, n_events=n_events, colour=colour)
        found = [q for q in queries(scene) if q.form == form and held_out(*q.triple) != training and accepts(scene, q)]
        if found:
            return scene, rng.choice(found)


def _options(rng: random.Random, query: Query, n: int = 4, without: str = "") -> list[str]:
    """The answer and n - 1 others of its class from the passage, in random order."""
    others = [option for option in query.options if option not in (query.answer, without)]
    options = [query.answer, *rng.sample(others, n - 1)]
    rng.shuffle(options)
    return options


_ALL = tuple(KINDS)
_PORTABLE = tuple(name for name, kind in KINDS.items() if kind.portable)


def _enough(scene: Scene, query: Query) -> bool:
    return len(query.options) >= 4


def _lambada(rng: random.Random, training: bool) -> Item:
    forms = ("place", "thing", "who_thing", "thing_place")
    scene, query = _scene_with(rng, training, _ALL, forms, 1)
    story = passage(rng, scene)
    cloze = with_pronoun(scene, query.clozes[0])
    options = _options(rng, query)
    row = {"text": f"{story} In the end {_lower(cloze)} {query.answer}"}
    return Item(row, scene, query, story, options, options.index(query.answer))


def _lower(sentence: str) -> str:
    first, _, rest = sentence.partition(" ")
    return f"{first.lower()} {rest}" if first in ("The", "She", "He") else sentence


def _hellaswag(rng: random.Random, training: bool) -> Item:
    form = rng.choice(("place", "thing"))
    kinds = _ALL if form == "place" else _PORTABLE
    scene, query = _scene_with(rng, training, kinds, (form,), 1)
    person = query.triple[0]
    visitor = rng.choice([p for p in scene.people if p != person])
    story = passage(rng, scene)
    options = _options(rng, query)
    if form == "place":
        text = f"Visit: {story} {visitor} wants to see {person}. So {pronoun(visitor)}"
        endings = [f"walks to the {option}" for option in options]
    else:
        text = f"Help: {story} {visitor} asks {person} for a present. So {person}"
        endings = [f"brings the {option}" for option in options]
    gold = options.index(query.answer)
    return Item({"query": text, "choices": endings, "label": gold}, scene, query, story, options, gold)


def _piqa(rng: random.Random, training: bool) -> Item:
    scene, query = _scene_with(rng, training, ("tool",), ("thing_place", "who_thing"), 1)
    holder, tool, _ = query.triple
    person = rng.choice([p for p in scene.people if p != holder])
    story = passage(rng, scene)
    options = _options(rng, query, 2, without=person)
    verb = "ask" if query.form == "who_thing" else "go to the"
    goal = f"{story} {person} wants to {PURPOSES[tool]}. What should {pronoun(person)} do?"
    gold = options.index(query.answer)
    row = {"goal": goal, "sol1": f"{verb} {options[0]}", "sol2": f"{verb} {options[1]}", "label": gold}
    return Item(row, scene, query, story, options, gold)


def _arc(rng: random.Random, training: bool, forms: tuple[str, ...], max_events: int) -> Item:
    scene, query = _scene_with(rng, training, _ALL, forms, max_events, _enough)
    story = passage(rng, scene)
    options = _options(rng, query)
    gold = options.index(query.answer)
    row = {"question": f"{story} {query.question}", "choices": _lettered(options), "answerKey": LETTERS[gold]}
    return Item(row, scene, query, story, options, gold)


def _lettered(options: list[str]) -> Row:
    return {"text": options, "label": list(LETTERS[: len(options)])}


def _arc_easy(rng: random.Random, training: bool) -> Item:
    return _arc(rng, training, ("place", "who_place", "thing", "who_thing", "colour"), 0)


def _arc_challenge(rng: random.Random, training: bool) -> Item:
    return _arc(rng, training, ("thing_place", "thing_place", "place_thing", "person_colour"), 1)


def _winogrande(rng: random.Random, training: bool) -> Item:
    scene, query = _scene_with(rng, training, _ALL, ("who_thing",), 0, lambda scene, query: bool(_rivals(scene, query)))
    story = passage(rng, scene)
    options = [query.answer, rng.choice(_rivals(scene, query))]
    rng.shuffle(options)
    gold = options.index(query.answer)
    sentence = f"{story} In the end _ {scene.kind.shows.format(t=query.triple[1])}"
    row = {"sentence": sentence, "option1": options[0], "option2": options[1], "answer": str(gold + 1)}
    return Item(row, scene, query, story, options, gold)


def _rivals(scene: Scene, query: Query) -> list[str]:
    """The others in the scene whom the same pronoun could mean."""
    return [p for p in scene.people if p != query.answer and (p in WOMEN) == (query.answer in WOMEN)]


def _openbookqa(rng: random.Random, training: bool) -> Item:
    kinds = tuple(name for name, kind in KINDS.items() if kind.knowledge)
    scene, query = _scene_with(rng, training, kinds, ("knowledge",), 1, _enough)
    story = passage(rng, scene)
    options = _options(rng, query)
    gold = options.index(query.answer)
    row = {"question_stem": f"{story} {query.clozes[0]}", "choices": _lettered(options), "answerKey": LETTERS[gold]}
    return Item(row, scene, query, story, options, gold)


MAKERS: dict[str, Callable[[random.Random, bool], Item]] = {
    "pocket_lambada": _lambada,
    "pocket_hellaswag": _hellaswag,
    "pocket_piqa": _piqa,
    "pocket_arc_easy": _arc_easy,
    "pocket_arc_challenge": _arc_challenge,
    "pocket_winogrande": _winogrande,
    "pocket_openbookqa": _openbookqa,
}


def make_item(task: str, rng: random.Random, *, training: bool = False) -> Item:
    """A random item of a task, with the right choice at a random position."""
    return MAKERS[task](rng, training)


def requests(task: str, row: Row) -> tuple[Pairs, int]:
    """The (context, continuation) pairs that lm-eval scores for a row of the task, and the right one's index."""
    if task == "pocket_lambada":
        context, word = row["text"].rsplit(" ", 1)
        return [(context, f" {word}")], 0
    if task == "pocket_hellaswag":
        return [(row["query"], f" {ending}") for ending in row["choices"]], row["label"]
    if task == "pocket_piqa":
        context = f"Question: {row['goal']}\nAnswer:"
        return [(context, f" {row['sol1']}"), (context, f" {row['sol2']}")], row["label"]
    if task == "pocket_winogrande":
        before, after = row["sentence"].split("_")
        return [(before + row[name], after) for name in ("option1", "option2")], int(row["answer"]) - 1
    context = row["question_stem"] if task == "pocket_openbookqa" else f"Question: {row['question']}\nAnswer:"
    return [(context, f" {text}") for text in row["choices"]["text"]], LETTERS.index(row["answerKey"])


def story_document(rng: random.Random) -> Document:
    """An item for training, answered, then five to eight more questions about the same passage."""
    task = rng.choice(tuple(MAKERS))
    item = make_item(task, rng, training=True)
    pairs, gold = requests(task, item.row)
    context, continuation = pairs[gold]
    before, answer = (context + continuation).rsplit(" ", 1)
    writer = Writer()
    writer.say(before, answer)
    formal = before.endswith("\nAnswer:")
    for query in rng.sample(queries(item.scene), rng.randint(5, 8)):
        if formal:
            ask_formally(writer, query)
        else:
            writer.say("" if writer.text.endswith(".") else ".")
            ask(writer, rng, query)
    if not formal:
        state_knowledge(writer, rng)
    return writer.document()
