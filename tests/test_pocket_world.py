"""The pocket world: its corpus, tokenizer, tasks and instructions."""

from __future__ import annotations

import itertools
import json
import random
import re
from collections import Counter

import pytest
import torch

from shedder_utils.errors import DataError
from shedder_utils.pocket import build, corpus
from shedder_utils.pocket.instructions import WITH_INPUT, WITHOUT_INPUT, instruction_document
from shedder_utils.pocket.items import Row, make_item, requests, story_document
from shedder_utils.pocket.prose import POCKET, prose_texts
from shedder_utils.pocket.recall import pairs_document, recall_document
from shedder_utils.pocket.stories import Document, queries, training_scene
from shedder_utils.pocket.tasks import CHANCE, TASKS, load_rows, log_likelihoods, task_configs, write_tasks
from shedder_utils.pocket.tokenizer import END, load_tokenizer
from shedder_utils.pocket.world import COLOURS, KINDS, PEOPLE, PLACES, answer_words, held_out

DOCUMENTS = {
    "pairs": pairs_document,
    "recall": recall_document,
    "stories": story_document,
    "instructions": instruction_document,
}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text)


# Tokenizer


def test_every_answer_word_is_one_token_with_its_space(tokenizer):
    assert [word for word in answer_words() if len(tokenizer.encode(f" {word}")) != 1] == []


def test_tokenizer_is_lossless_adds_nothing_and_knows_its_special_tokens(tokenizer):
    text = "Où est  Anna?\n\n\tdans the garden ☃"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode("garden") != tokenizer.encode(" garden")
    assert len(tokenizer) == tokenizer.vocab_size == 4096
    assert (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id) == (0, 0, 1)
    assert tokenizer.encode(END) == [0]


@pytest.mark.parametrize("make", DOCUMENTS.values(), ids=DOCUMENTS)
def test_each_answer_of_a_document_is_a_token_of_its_own_and_has_the_high_weight(tokenizer, make):
    rng = random.Random(0)
    for _ in range(200):
        document = make(rng)
        encoding = tokenizer.backend_tokenizer.encode(document.text)
        weights = corpus.token_weights(document, encoding.offsets)
        heavy = [span for span, weight in zip(encoding.offsets, weights, strict=True) if weight == corpus.ANSWER_WEIGHT]
        assert heavy == list(document.answers)
        assert all(document.text[start:end].strip() in answer_words() for start, end in heavy)


# Corpus


@pytest.mark.parametrize(("stage", "length"), [("few words", 128), ("pairs", 128), ("stories", 256), ("mix", 256)])
def test_batch_is_a_pure_function_of_stage_seed_and_step(tokenizer, stage, length):
    ids, weights = corpus.batch(stage, 3, 7, 4, length, tokenizer)
    again = corpus.batch(stage, 3, 7, 4, length, tokenizer)
    other = corpus.batch(stage, 3, 8, 4, length, tokenizer)
    assert ids.shape == weights.shape == (4, length)
    assert (ids.dtype, weights.dtype) == (torch.int64, torch.float32)
    assert torch.equal(ids, again[0])
    assert torch.equal(weights, again[1])
    assert not torch.equal(ids, other[0])
    assert not torch.equal(ids[0], ids[1])


def test_mix_draws_from_every_source_in_its_share(tokenizer):
    n = 400
    ids, weights = corpus.batch("mix", 0, 0, n, 64, tokenizer)
    starts = [start.removeprefix(END).lstrip() for start in tokenizer.batch_decode(ids[:, :6])]
    prose = (weights == corpus.PROSE_WEIGHT).all(1).sum().item()
    instructions = sum(start.startswith("Below is an instruction") for start in starts)
    assert abs(prose / n - 0.25) < 0.06
    assert abs(instructions / n - 0.2) < 0.06


def test_prose_in_the_corpus_is_training_prose_only(tokenizer):
    ids, weights = corpus.batch("mix", 0, 1, 40, 64, tokenizer)
    training, test = "\n".join(prose_texts("train")), "\n".join(prose_texts("test"))
    stretches = tokenizer.batch_decode(ids[(weights == corpus.PROSE_WEIGHT).all(1)])
    inside = [text for text in stretches if END not in text]
    assert len(inside) > 4
    assert all(text in training and text not in test for text in inside)


# What is held out


def test_a_tenth_of_the_triples_is_held_out():
    rng = random.Random(0)
    objects = KINDS["object"].words
    n_held = sum(held_out(rng.choice(PEOPLE), rng.choice(objects), rng.choice(PLACES)) for _ in range(5000))
    assert 400 < n_held < 600


def test_no_training_scene_has_a_held_out_triple_whatever_happens_in_it():
    rng = random.Random(0)
    for _ in range(500):
        scene = training_scene(rng, rng.choice(list(KINDS.values())), n_events=rng.randint(0, 3))
        assert not any(held_out(*scene.triple(thing)) for thing in scene.things)
        assert not any(held_out(*query.triple) for query in queries(scene))


def told_triples(text: str) -> set[tuple[str, str, str]]:
    """The (person, thing, place) triples that the sentences of a text without events tell, read from the text alone."""
    places = dict(re.findall(r"(\w+) is in the (\w+)", text))
    things = [(p, t) for p, t in re.findall(r"(\w+) has the (\w+)", text) if p in PEOPLE]
    things += [(p, t) for t, p in re.findall(r"The (\w+) belongs to (\w+)", text)]
    return {(person, thing, places[person]) for person, thing in things if person in places}


def test_no_recall_document_tells_a_held_out_triple():
    rng = random.Random(1)
    told = [triple for _ in range(1500) for triple in told_triples(recall_document(rng).text)]
    assert len(told) > 300
    assert not any(held_out(*triple) for triple in told)


@pytest.mark.parametrize("task", TASKS)
def test_items_ask_about_held_out_triples_and_training_documents_never_contain_them(task):
    rng = random.Random(2)
    assert all(held_out(*make_item(task, rng).query.triple) for _ in range(30))
    assert not any(held_out(*triple) for _ in range(30) for triple in make_item(task, rng, training=True).scene.triples)
    contexts = [requests(task, row)[0][0][0] for row in load_rows(task)]
    training = "\n".join(story_document(random.Random(seed)).text for seed in range(300))
    assert not any(context in training for context in contexts)


# Tasks


@pytest.mark.parametrize("task", TASKS)
def test_rows_have_one_right_choice_among_different_ones(task):
    rows = load_rows(task)
    assert len(rows) == 400
    assert len({json.dumps(row) for row in rows}) == 400
    for row in rows:
        pairs, gold = requests(task, row)
        assert len(set(pairs)) == len(pairs) == (1 if task == "pocket_lambada" else round(1 / CHANCE[task]))
        assert 0 <= gold < len(pairs)


def class_of(word: str) -> tuple[str, ...]:
    classes = (PEOPLE, PLACES, COLOURS, *(kind.words for kind in KINDS.values()))
    return next(members for members in classes if word in members)


def clues(task: str, row: Row) -> tuple[list[str], list[str], int]:
    """The words of an item's passage, the word in it that stands for each choice, and the right one's index."""
    pairs, gold = requests(task, row)
    if task == "pocket_winogrande":
        options = [row["option1"], row["option2"]]
        return words(row["sentence"]), options, gold
    text, options = words(pairs[0][0]), [continuation.split()[-1] for _, continuation in pairs]
    if task == "pocket_lambada":
        named = sorted(set(text) & set(class_of(options[0])))
        return text, named, named.index(options[0])
    if task == "pocket_openbookqa":
        tables = [known.table for kind in KINDS.values() for known in kind.knowledge]
        source = {value: thing for table in tables for thing, value in table.items() if thing in text}
        options = [source[option] for option in options]
    return text, options, gold


def guesses(text: list[str], options: list[str], prior: Counter[str]) -> dict[str, int]:
    """The choice that each way to answer without understanding takes."""
    count = [text.count(option) for option in options]
    last = [len(text) - text[::-1].index(option) for option in options]
    first = [text.index(option) for option in options]
    return {
        "first choice": 0,
        "last choice": len(options) - 1,
        "most frequent": count.index(max(count)),
        "least frequent": count.index(min(count)),
        "last mentioned": last.index(max(last)),
        "first mentioned": first.index(min(first)),
        "majority": max(range(len(options)), key=lambda i: prior[options[i]]),
    }


@pytest.mark.parametrize("task", TASKS)
def test_no_heuristic_beats_chance_by_eight_points(task):
    items = [clues(task, row) for row in load_rows(task)]
    prior = Counter(answer(make_item(task, random.Random(seed))) for seed in range(400))
    hits: Counter[str] = Counter()
    for text, options, gold in items:
        hits.update(name for name, guess in guesses(text, options, prior).items() if guess == gold)
    assert {name: n for name, n in hits.items() if n / len(items) >= CHANCE[task] + 0.08} == {}


def answer(item) -> str:
    """The right choice, or for common knowledge the thing in the passage that leads to it."""
    if item.query.form != "knowledge":
        return item.options[item.gold]
    return item.query.triple[1]


@pytest.mark.parametrize("task", TASKS)
def test_contexts_are_short_and_single_words_share_a_context(tokenizer, task):
    pairs = [requests(task, row)[0] for row in load_rows(task)[:100]]
    lengths = [len(tokenizer.encode(choices[0][0])) for choices in pairs]
    assert min(lengths) >= 55
    assert max(lengths) <= 100
    if task != "pocket_winogrande":
        shared = [{tuple(tokenizer.encode(context + cont)[:-1]) for context, cont in choices} for choices in pairs]
        assert all(len(prefixes) == 1 for prefixes in shared)


def test_lm_eval_scores_the_same_requests_from_any_folder(tmp_path, monkeypatch):
    tasks = pytest.importorskip("lm_eval.tasks")
    monkeypatch.chdir(tmp_path)
    loaded = tasks.TaskManager(include_defaults=False).load(task_configs())["tasks"]
    assert set(loaded) == set(TASKS)
    for name, task in loaded.items():
        task.build_all_requests(limit=5)
        rows = load_rows(name)[:5]
        built = [instance.args for instance in task.instances]
        assert built == [pair for row in rows for pair in requests(name, row)[0]]
        golds = [requests(name, row)[1] for row in rows]
        if name == "pocket_winogrande":
            assert [task.doc_to_text(doc) for doc in task.eval_docs.select(range(5))] == golds
        elif name != "pocket_lambada":
            assert [int(task.doc_to_target(doc)) for doc in task.eval_docs.select(range(5))] == golds


def test_yaml_names_its_data_relative_to_the_project():
    for task in TASKS:
        data = re.search(r"test: (pocket/tasks/\S+)", (POCKET / "tasks" / f"{task}.yaml").read_text())
        assert data is not None
        assert (POCKET.parent / data[1]).is_file()


def test_an_unknown_task_is_refused():
    with pytest.raises(DataError, match="pocket_sudoku"):
        task_configs(("pocket_sudoku",))


class Bigram(torch.nn.Module):
    """A language model that looks at the last token only, so that its log-likelihoods are easy to tell."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.randn(4096, 4096, generator=torch.Generator().manual_seed(0))
        self.device = torch.device("cpu")

    def forward(self, ids):
        return type("Output", (), {"logits": self.table[ids]})


def test_log_likelihoods_add_up_over_the_continuation(tokenizer):
    model = Bigram()
    pairs = [(" Anna is in", " the garden"), (" Anna", " has the lamp"), (" Ben is in the old", " mill")]
    log_probs = model.table.log_softmax(-1)
    for (context, continuation), (score, _) in zip(pairs, log_likelihoods(model, tokenizer, pairs, 2), strict=True):
        ids = tokenizer.encode(context)[-1:] + tokenizer.encode(continuation)
        assert score == pytest.approx(sum(log_probs[a, b].item() for a, b in itertools.pairwise(ids)), abs=1e-4)


# Instructions and files


def test_instructions_follow_alpaca_and_the_splits_are_apart():
    train, test = (
        [json.loads(line) for line in (POCKET / "instructions" / f"{split}.jsonl").read_text().splitlines()]
        for split in ("train", "test")
    )
    assert (len(train), len(test)) == (2000, 400)
    for row in train + test:
        prompt = (WITH_INPUT if row["input"] else WITHOUT_INPUT).format(**row)
        assert row["text"] == prompt + row["output"]
    assert len({row["text"] for row in train + test}) == 2400


def test_committed_files_are_what_the_code_makes(tmp_path):
    write_tasks(tmp_path / "tasks")
    build.write_instructions(tmp_path / "instructions")
    build.write_tokenizer(tmp_path / "tokenizer")
    for made in tmp_path.rglob("*.*"):
        committed = POCKET / made.relative_to(tmp_path)
        assert made.read_text() == committed.read_text(), f"run python -m shedder_utils.pocket.build: {committed.name}"


def test_token_weights_mark_every_token_of_an_answer():
    document = Document("It is so.", ((2, 8),))
    assert corpus.token_weights(document, [(0, 2), (2, 5), (5, 8), (8, 9)]) == [0.2, 10.0, 10.0, 0.2]
