"""Pocket instructions: Alpaca's schema and prompt over the pocket world, for calibration and recovery.

A row has the columns of the Alpaca data set (Taori et al., 2023): instruction, input, output, and text, which puts
them into Alpaca's prompt. Sample:

    instruction  Answer the question about the story.
    input        It rained a little. Anna is in the barn. Anna has the lamp. ... Where is Anna?
    output       Anna is in the barn.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from shedder_utils.pocket.stories import Document, Scene, Writer, make_scene, passage, queries, training_scene
from shedder_utils.pocket.world import FILLERS, KINDS, PEOPLE, held_out

WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)

Example = tuple[str, str, str, list[str]]  # instruction, input, output, and the words of the output that are answers


def _scene(rng: random.Random, training: bool) -> Scene:
    """A scene for training without held-out triples, or one for evaluation with at least one."""
    kind, n_people = KINDS[rng.choice(tuple(KINDS))], rng.randint(2, 4)
    while True:
        scene = (training_scene if training else make_scene)(rng, kind, n_people=n_people, n_events=rng.randint(0, 1))
        if training or any(held_out(*triple) for triple in scene.triples):
            return scene


def _answer(rng: random.Random, training: bool) -> Example:
    scene = _scene(rng, training)
    query = rng.choice(queries(scene))
    instruction = rng.choice(("Answer the question about the story.", "Read the story and answer the question."))
    return instruction, f"{passage(rng, scene)} {query.question}", f"{query.clozes[0]} {query.answer}.", [query.answer]


def _complete(rng: random.Random, training: bool) -> Example:
    scene = _scene(rng, training)
    query = rng.choice(queries(scene))
    instruction = rng.choice(("Complete the last sentence.", "What is the last word of the story?"))
    return instruction, f"{passage(rng, scene)} {query.clozes[0]}", f"The word is {query.answer}.", [query.answer]


def _find(rng: random.Random, training: bool) -> Example:
    scene = _scene(rng, training)
    query = rng.choice([q for q in queries(scene) if q.form in ("place", "thing_place")])
    subject = query.question.removeprefix("Where is ").removeprefix("Where will ").removesuffix("?").removesuffix(" go")
    return f"Say where {subject} is.", passage(rng, scene), f"{query.clozes[0]} {query.answer}.", [query.answer]


def _list_people(rng: random.Random, training: bool) -> Example:
    story = passage(rng, _scene(rng, training))
    words = [word.strip(".") for word in story.split()]
    people = list(dict.fromkeys(word for word in words if word in PEOPLE))
    return "List the people in the story.", story, f"The people are {', '.join(people)}.", people


def _reverse(rng: random.Random, training: bool) -> Example:
    kind = KINDS[rng.choice(tuple(KINDS))]
    words = rng.sample(kind.words, rng.randint(3, 5))
    given, output = f"The words are {', '.join(words)}.", f"Here: {', '.join(words[::-1])}."
    return "Write the words in reverse order.", given, output, words[::-1]


def _know(rng: random.Random, training: bool) -> Example:
    known = rng.choice([k for kind in KINDS.values() for k in kind.knowledge])
    thing, value = rng.choice(tuple(known.table.items()))
    statement, _ = known.statement.format(t=thing, k="_").split("_")
    instruction = f"Complete the sentence: {statement.strip()} ..."
    return instruction, "", f"{statement}{value}.", [value]


def _tell(rng: random.Random, training: bool) -> Example:
    scene = _scene(rng, training)
    person, thing, place = scene.triple(scene.things[0])
    fact = scene.kind.facts[0].format(p=person, t=thing)
    opening, ending = rng.sample(FILLERS, 2)
    instruction = f"Tell a very short story about {person}, the word {thing} and the {place}."
    return instruction, "", f"{opening} {person} is in the {place}. {fact} {ending}", [place, thing]


_EXAMPLES: tuple[Callable[[random.Random, bool], Example], ...] = (
    _answer, _answer, _complete, _find, _list_people, _reverse, _know, _tell,
)  # fmt: skip


def instruction_row(rng: random.Random, *, training: bool) -> dict[str, str]:
    """One random row: instruction, input, output and text. Stories that are not for training hold a held-out triple."""
    instruction, given, output, _ = rng.choice(_EXAMPLES)(rng, training)
    prompt = (WITH_INPUT if given else WITHOUT_INPUT).format(instruction=instruction, input=given)
    return {"instruction": instruction, "input": given, "output": output, "text": prompt + output}


def instruction_rows(split: str) -> list[dict[str, str]]:
    """The committed rows of a split, made anew: 2,000 to train on ("train"), 400 held out ("test"), no text twice."""
    seen = set() if split == "train" else {row["text"] for row in instruction_rows("train")}
    rng, rows = random.Random(f"instructions {split}"), list[dict[str, str]]()
    while len(rows) < (2000 if split == "train" else 400):
        row = instruction_row(rng, training=split == "train")
        if row["text"] not in seen:
            seen.add(row["text"])
            rows.append(row)
    return rows


def instruction_document(rng: random.Random) -> Document:
    """A training row's text, with the words of its output that must be recalled marked as answers."""
    instruction, given, output, answers = rng.choice(_EXAMPLES)(rng, True)
    writer = Writer((WITH_INPUT if given else WITHOUT_INPUT).format(instruction=instruction, input=given))
    for answer in answers:
        before, _, output = output.partition(f" {answer}")
        writer.say(before, answer)
    writer.say(output)
    return writer.document()
