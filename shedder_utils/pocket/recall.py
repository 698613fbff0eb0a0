"""Dense documents from which a small model learns to recall: a few facts, then three times as many questions.

Sample of `recall_document`:

    Facts: Helen is in the mill. The needle belongs to Carl. Helen has the pen. Carl is in the park. Where is Carl?
    park. The needle belongs to Carl. Helen has the pen. Who is in the mill? Helen. The pen is in the mill. ...
"""

from __future__ import annotations

import random

from shedder_utils.pocket.stories import Document, Query, Writer, facts, queries, training_scene
from shedder_utils.pocket.world import COLOURS, KINDS, PEOPLE, PLACES, PURPOSES


def ask(writer: Writer, rng: random.Random, query: Query) -> None:
    """One query inside a running text: as a sentence that the answer completes, or as a short question."""
    text = rng.choice(query.clozes) if rng.random() < 0.6 else query.question
    writer.say(f" {text}", query.answer, ".")


def ask_formally(writer: Writer, query: Query) -> None:
    """One query on two lines of its own, as in the multiple-choice tasks."""
    writer.say(f"\nQuestion: {query.question}\nAnswer:", query.answer)


_ANSWERABLE = {
    ("attribute",): {"place", "who_place", "colour"},
    ("thing",): {"thing", "who_thing", "knowledge", "purpose"},
    ("attribute", "thing"): None,
}
_WORDS = list(dict.fromkeys([*PEOPLE, *PLACES, *COLOURS, *(word for kind in KINDS.values() for word in kind.words)]))
random.Random(0).shuffle(_WORDS)
FEW_WORDS = 16
_PAIRS = (("attribute", "place"), ("attribute", "who_place"), ("thing", "thing"), ("thing", "who_thing"))


def _facts_and_queries(rng: random.Random) -> tuple[list[str], list[Query]]:
    kind = rng.choice(tuple(KINDS.values()))
    relations = rng.choice(tuple(_ANSWERABLE))
    colour = kind.name in ("object", "tool") and rng.random() < 0.4
    n_people = rng.randint(2, 4) if len(relations) == 1 else 2 + (rng.random() < 0.4)
    scene = training_scene(rng, kind, n_people=n_people, colour=colour)
    answerable = _ANSWERABLE[relations]
    found = [q for q in queries(scene) if answerable is None or q.form in answerable]
    return facts(rng, scene, relations), found


def list_document(rng: random.Random, n_words: int = len(_WORDS)) -> Document:
    """Two to five pairs of words, again and again in a new order; at most the first `n_words` of the world's occur.

    List: Nora brush. red hammer. red hammer. Nora brush. red hammer. ...
    """
    n_pairs = rng.randint(2, 5)
    words = rng.sample(_WORDS[: rng.randint(FEW_WORDS, n_words)], 2 * n_pairs)
    pairs = list(zip(words[:n_pairs], words[n_pairs:], strict=True))
    writer = Writer("List:")
    for key, value in pairs:
        writer.say(f" {key} {value}.")
    for _ in range(3):
        for key, value in rng.sample(pairs, n_pairs):
            writer.say(f" {key}", value, ".")
    return writer.document()


def pairs_document(rng: random.Random) -> Document:
    """Two to four facts of one relation, each asked for three times."""
    kind = rng.choice(tuple(KINDS.values()))
    relation, form = rng.choice(_PAIRS)
    scene = training_scene(rng, kind, n_people=rng.randint(2, 4))
    found = [query for query in queries(scene) if query.form == form] * 3
    rng.shuffle(found)
    writer = Writer(" ".join(["Facts:", *facts(rng, scene, (relation,))]))
    for query in found:
        ask(writer, rng, query)
    return writer.document()


def recall_document(rng: random.Random) -> Document:
    """Two to six facts of one or two kinds, then three questions for each fact and a line of common knowledge."""
    sentences, found = _facts_and_queries(rng)
    if len(sentences) < 3:
        more, more_found = _facts_and_queries(rng)
        # A word that both scenes share would have two answers.
        if not _words(found) & _words(more_found):
            sentences, found = sentences + more, found + more_found
            rng.shuffle(sentences)
    writer = Writer(" ".join(["Facts:", *sentences]))
    formally = rng.random() < 0.2
    rng.shuffle(found)
    for query in (found * 3)[: min(3 * len(sentences), 12)]:
        if formally:
            ask_formally(writer, query)
        else:
            ask(writer, rng, query)
    if not formally:
        state_knowledge(writer, rng)
    return writer.document()


def _words(found: list[Query]) -> set[str]:
    return {word for query in found for word in query.triple}


def state_knowledge(writer: Writer, rng: random.Random) -> None:
    """One sentence of common knowledge."""
    if rng.random() < 0.3:
        tool, purpose = rng.choice(tuple(PURPOSES.items()))
        writer.say(f" To {purpose} you need the", tool, ".")
        return
    known = rng.choice([k for kind in KINDS.values() for k in kind.knowledge])
    thing, value = rng.choice(tuple(known.table.items()))
    statement, _ = known.statement.rsplit(" ", 1)
    writer.say(f" {statement.format(t=thing)}", value, ".")
