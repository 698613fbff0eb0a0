"""The paper's models and data from a stand-in Hub: what loads, what is refused, and what a failing Hub leaves."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import lm_eval.tasks
import pytest
import transformers.utils.hub
import yaml
from hub import __main__ as rehearsal
from hub.__main__ import derived, passes_amiss
from hub.models import FALCON_WORDS, LLAMA_VOCABULARY, NATIVE, NEOX_VOCABULARY, build_models
from hub.server import Hub
from hub.texts import build_data
from lm_eval.tasks import TaskManager
from transformers import PreTrainedModel
from world import World

from shedder_utils import (
    DataError,
    ModelError,
    Plan,
    Removal,
    Stage,
    calibrate,
    evaluate,
    extract,
    instructions,
    lm_eval_tasks,
    load_model,
    perplexity,
    profiles,
    records,
    removed,
    save_pruned,
    search,
)
from shedder_utils.cost_plan import CostPlan
from shedder_utils.families import random_model
from shedder_utils.files import ROOT
from shedder_utils.loading import fingerprint
from shedder_utils.model_tokenizer import GPT_NEOX
from shedder_utils.pocket.tokenizer import load_tokenizer
from shedder_utils.public_texts import public_texts
from shedder_utils.schedule import Schedule
from shedder_utils.studies import pruning
from shedder_utils.workbench import Workbench

FORMATS = {
    "state-spaces/mamba-2.8b": ("mamba", 64, {}),
    "IntelLabs/Mamba-Shedder-Mamba2-2.7B-Pruned-22SSM": ("mamba2", 64, {"ssm": 22}),
    "IntelLabs/Mamba-Shedder-Mamba-2.2B": ("mamba", 50, {"mamba_block": 14}),
    "Zyphra/Zamba2-2.7B": ("zamba2", 54, {}),
    "tiiuae/falcon-mamba-7b": ("falcon_mamba", 64, {}),
    "nvidia/Hymba-1.5B-Base": ("hymba", 32, {}),
}
"""A model of each file format: its type, its layers, and what of it is gone."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    build_models(folder)
    build_data(folder)
    return folder


@pytest.fixture(scope="module")
def patch() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def whole_hub(files: Path, patch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A stand-in in which nothing goes wrong, with one cache for all tests."""
    with Hub(files) as hub:
        lead_to(hub, patch, tmp_path_factory.mktemp("cache"))
        yield hub


@pytest.fixture
def hub(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A stand-in to break, with an empty cache; waiting for another try takes no time."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with Hub(files) as hub:
        lead_to(hub, monkeypatch, tmp_path)
        yield hub


def lead_to(hub: Hub, patch: pytest.MonkeyPatch, cache: Path) -> None:
    """What HF_ENDPOINT and HF_HOME do in a process that starts with them."""
    template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    patch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
    patch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache / "hub"))
    patch.setattr(transformers.utils.hub, "_hf_api", None)  # one made before would ask the real Hub, again and again
    patch.setattr(datasets.config, "HF_ENDPOINT", hub.url)
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", cache / "datasets")


def load(ref: str) -> PreTrainedModel:
    return load_model(ref, tokenizer=False)[0]


@cache
def loaded(ref: str) -> Any:
    """A model and its tokenizer, from the Hub in which nothing goes wrong."""
    return load_model(ref)


def task(name: str) -> Any:
    """A task of lm-eval with its data, read as `evaluate` reads it."""
    manager = TaskManager(include_defaults=False, include_path=str(Path(lm_eval.tasks.__file__).parent / name))
    return lm_eval_tasks.from_hub(manager, name)["tasks"][name]


@pytest.mark.parametrize("ref", FORMATS)
def test_each_format_is_loaded_calibrated_searched_and_scored(whole_hub: Hub, ref: str) -> None:
    model_type, layers, gone = FORMATS[ref]
    model, tokenizer = loaded(ref)
    assert (model.config.model_type, model.config.num_hidden_layers) == (model_type, layers)
    kinds = [kind.split(":")[0] for kind in getattr(model.config, "pruned", {}).get("removed", [])]
    assert {kind: kinds.count(kind) for kind in kinds} == gone
    assert model.config._commit_hash == whole_hub.repositories["models", ref].commit
    calibration = calibrate("alpaca", tokenizer, samples=40, sequence_length=64)
    assert calibration.sequences > 2
    seen = []
    model.register_forward_pre_hook(lambda _, args, given: seen.append([*args, *given.values()][0]), with_kwargs=True)
    scores = evaluate(model, tokenizer, ["piqa"], limit=2, batch_size=2)
    assert scores["piqa", "acc"].n == 2
    assert seen
    assert not any((ids[:, 0] == 1).any() for ids in seen if tokenizer.bos_token_id == 1), "a begin token was added"
    assert not [asked for asked in whole_hub.requests if asked.startswith("GET") and asked.endswith(".py")]
    kind = "hymba_block" if model_type == "hymba" else "mamba_block"
    found = search(model, calibration, Stage(kind, 1), progress=False)
    with removed(model, found.gone):
        assert perplexity(model, calibration) == pytest.approx(found.scores[1], rel=1e-5)


def test_tokens_are_those_of_the_published_tokenizers(whole_hub: Hub) -> None:
    found = {ref: loaded(ref)[1] for ref in FORMATS}
    neox, llama = found["state-spaces/mamba-2.8b"], found["nvidia/Hymba-1.5B-Base"]
    falcon = found["tiiuae/falcon-mamba-7b"]
    assert (neox.eos_token_id, neox("Anna").input_ids[0] > 1, len(neox)) == (0, True, NEOX_VOCABULARY)
    assert neox(" " * 24).input_ids == [NEOX_VOCABULARY - 23]
    assert (falcon.eos_token, falcon.eos_token_id) == ("<|endoftext|>", len(FALCON_WORDS.split()))
    assert llama("Anna").input_ids[0] == llama.bos_token_id == 1
    assert (llama.pad_token, llama.pad_token_id, llama.padding_side) == ("[PAD]", LLAMA_VOCABULARY, "left")
    neox_asked = [line for line in whole_hub.requests if "EleutherAI/gpt-neox-20b" in line]
    resolved = [line for line in neox_asked if "/resolve/" in line]
    assert resolved
    assert all(GPT_NEOX.partition("@")[2] in line for line in resolved)
    for tokenizer in found.values():
        assert (
            tokenizer.decode(tokenizer("Anna took the lamp.", add_special_tokens=False).input_ids)
            == "Anna took the lamp."
        )


def test_a_vocabulary_is_padded_and_a_revision_is_a_commit(whole_hub: Hub) -> None:
    model = load("state-spaces/mamba2-2.7b")
    assert model.get_input_embeddings().weight.shape[0] == 288 > NATIVE["state-spaces/mamba2-2.7b"]["vocab_size"]
    commit = "0123456789abcdef0123456789abcdef01234567"
    again = load_model("state-spaces/mamba2-2.7b", tokenizer=False, revision=commit)[0]
    assert again.config._commit_hash == commit
    with pytest.raises(ModelError, match=r"model state-spaces/mamba2-2.7b cannot be read"):
        load_model("state-spaces/mamba2-2.7b", tokenizer=False, revision="nowhere")
    with pytest.raises(ModelError, match=r"model state-spaces/nothing cannot be read"):
        load("state-spaces/nothing")


def test_every_task_and_text_of_the_paper_is_there(whole_hub: Hub) -> None:
    for name in ("arc", "hellaswag", "lambada", "openbookqa", "piqa", "winogrande"):
        for one in {"arc": ["arc_easy", "arc_challenge"], "lambada": ["lambada_openai"]}.get(name, [name]):
            manager = TaskManager(include_defaults=False, include_path=str(Path(lm_eval.tasks.__file__).parent / name))
            scored = lm_eval_tasks.from_hub(manager, one)["tasks"][one]
            document = next(iter(scored.eval_docs))
            assert scored.doc_to_target(document) is not None
            assert scored.doc_to_text(document) is not None
            asked = [line for line in whole_hub.requests if f"/{scored.DATASET_PATH}/" in line]
            commit = lm_eval_tasks.REVISIONS[scored.DATASET_PATH]
            assert any(commit in line for line in asked)
            assert not [line for line in asked if "/revision/main" in line or "/resolve/main" in line]
            assert lm_eval_tasks._commit(scored) == commit
    assert len(public_texts("alpaca")) >= 256
    assert len(public_texts("wikitext-2")) >= 512
    assert len(public_texts("c4")) == len(public_texts("ptb")) == 600


def test_the_environment_alone_leads_there(files: Path, tmp_path: Path) -> None:
    """No setting of the package: HF_ENDPOINT, and HF_HOME for an empty cache."""
    with Hub(files) as hub:
        command = ["evaluate", "nvidia/Hymba-1.5B-Base", "--tasks", "pocket_piqa", "--limit", "2", "--batch-size", "2"]
        environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path)}
        finished = subprocess.run(
            [sys.executable, "-m", "shedder_utils", *command], env=environment, capture_output=True, text=True
        )
        assert finished.returncode == 0, finished.stderr
        assert json.loads(finished.stdout)["scores"]["pocket_piqa"]["acc"]["n"] == 2
        assert "GET /nvidia/Hymba-1.5B-Base/resolve/" in "\n".join(hub.requests)


def test_a_model_of_the_hub_keeps_its_own_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer()
    tokenizer.add_tokens(["<|mine|>"])
    tokenizer.chat_template = "{{ messages[0].content }}"
    model = random_model(family="mamba2", layers=2, hidden_size=32, seed=0, vocab_size=len(tokenizer))
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "models" / "me" / "own")
    with Hub(tmp_path) as hub:
        lead_to(hub, monkeypatch, tmp_path)
        found, its_tokenizer = load_model("me/own")
    plan = Plan(removals=[Removal(component="ssm:1")])
    save_pruned(extract(found, plan), tmp_path / "less")
    again = load_model(tmp_path / "less")[1]
    assert again("Anna <|mine|>").input_ids == its_tokenizer("Anna <|mine|>").input_ids
    assert again.chat_template == its_tokenizer.chat_template == tokenizer.chat_template


FAILURES = {
    "busy": r"cannot be read \(.+\): .*run again",
    "short": r"cannot be read \(Consistency check failed.*\): .*run again",
    "damaged": "does not have the hash that the Hub announced: it is deleted, run again",
}
READERS = {
    "model.safetensors": lambda: load("nvidia/Hymba-1.5B-Base"),
    "falcon-mamba-7b/config.json": lambda: load("tiiuae/falcon-mamba-7b"),
    "falcon-mamba-7b/revision/main": lambda: load("tiiuae/falcon-mamba-7b"),
    "-00002-of-00002.safetensors": lambda: load("Zyphra/Zamba2-2.7B"),
    "pytorch_model.bin": lambda: load("IntelLabs/Mamba-Shedder-Mamba-2.2B"),
    "gpt-neox-20b/tokenizer.json": lambda: load_model("IntelLabs/Mamba-Shedder-Mamba-2.2B"),
    "alpaca/data/train-00000-of-00001.parquet": lambda: public_texts("alpaca"),
    "wikitext/README.md": lambda: public_texts("wikitext-2"),
    "piqa/data/validation-00000-of-00001.parquet": lambda: task("piqa"),
    "alpaca-cleaned/data/train-00000-of-00001.json": lambda: instructions._read("yahma/alpaca-cleaned"),
}
"""What reads a file, by the end of its path."""


ALL_FAULTS = ("pytorch_model.bin", "alpaca/data/train-00000-of-00001.parquet")
CASES = [(file, fault) for file in ALL_FAULTS for fault in FAILURES]
CASES += [
    ("model.safetensors", "damaged"),
    ("falcon-mamba-7b/config.json", "short"),
    ("falcon-mamba-7b/revision/main", "busy"),
    ("-00002-of-00002.safetensors", "busy"),
    ("gpt-neox-20b/tokenizer.json", "damaged"),
    ("wikitext/README.md", "busy"),
    ("piqa/data/validation-00000-of-00001.parquet", "damaged"),
    ("piqa/data/validation-00000-of-00001.parquet", "short"),
    ("alpaca-cleaned/data/train-00000-of-00001.json", "damaged"),
]


@pytest.mark.parametrize(("file", "fault"), CASES)
def test_a_failing_hub_is_one_clear_line_and_the_next_try_succeeds(hub: Hub, file: str, fault: str) -> None:
    hub.faults[file] = fault
    with pytest.raises((ModelError, DataError)) as caught:
        READERS[file]()
    assert re.search(FAILURES[fault], str(caught.value)), caught.value
    assert "\n" not in str(caught.value)
    hub.faults.clear()
    assert READERS[file]()


def test_a_broken_connection_is_tried_again(hub: Hub) -> None:
    hub.faults["pytorch_model.bin"] = "dropped"
    name = "IntelLabs/Mamba-Shedder-Mamba-2.2B"
    load(name)
    assert (
        len([asked for asked in hub.requests if asked.startswith("GET") and asked.endswith("pytorch_model.bin")]) == 2
    )


def test_a_part_of_a_file_is_served(hub: Hub) -> None:
    file = "EleutherAI/gpt-neox-20b/resolve/main/tokenizer.json"
    with urllib.request.urlopen(urllib.request.Request(f"{hub.url}/{file}", headers={"Range": "bytes=3-9"})) as part:
        assert part.status == 206
        assert (
            part.read()
            == hub.repositories["models", "EleutherAI/gpt-neox-20b"].files["tokenizer.json"].read_bytes()[3:10]
        )


def test_without_the_hub_what_was_fetched_is_enough(hub: Hub) -> None:
    first = fingerprint(load("state-spaces/mamba-2.8b"))
    texts = public_texts("alpaca")
    hub.kill()
    assert fingerprint(load("state-spaces/mamba-2.8b")) == first
    assert public_texts("alpaca") == texts
    for read in (lambda: load("tiiuae/falcon-mamba-7b"), lambda: public_texts("wikitext-2"), lambda: task("piqa")):
        with pytest.raises((ModelError, DataError), match=r"cannot be read .*: check the connection") as caught:
            read()
        assert "\n" not in str(caught.value)


def test_a_run_that_loses_the_hub_goes_on(
    hub: Hub, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Hub is killed after the search: that is recorded, nothing else is, and it is not done again."""
    profile = tmp_path / "short.yaml"
    settings = {"sequence_length": 16, "batch_size": 2, "seed": 42}
    profile.write_text(yaml.safe_dump({
        "name": "short", "title": "One block of one model",
        "models": {"hymba": {"ref": "nvidia/Hymba-1.5B-Base", "family": "Hymba", "paper": "hymba-1.5b"}},
        "calibration": {"source": "alpaca", "samples": 4, **settings},
        "evaluation": {
            "prose": {"source": "wikitext-2", "samples": 4, **settings}, "limit": 2, "batch_size": 2,
            "tasks": [{"column": "piqa", "task": "pocket_piqa", "metric": "acc"}],
        },
        "studies": {"blocks": {
            "table": 4, "stages": [{"kinds": ["hymba_block"], "steps": 1}], "rows": {"hymba": {0: 0, 1: 6}},
        }},
    }))  # fmt: skip

    def recorded() -> dict[str, Any]:
        return {one.setting: one.created for one in records.find(tmp_path / "runs")}

    bench = Workbench(profile, "hymba", tmp_path / "runs")
    monkeypatch.setattr("shedder_utils.studies.search", killing(hub))
    with pytest.raises(DataError, match="data wikitext-2: Salesforce/wikitext cannot be read"):
        pruning(bench, "blocks")
    before = recorded()
    assert list(before) == ["search"]
    monkeypatch.undo()
    with Hub(files) as another:
        lead_to(another, monkeypatch, tmp_path)
        again = Workbench(profile, "hymba", tmp_path / "runs")
        assert len(pruning(again, "blocks")) == 2
        assert recorded().keys() == {"search", "scores", "01_removed"}
        assert recorded()["search"] == before["search"]
        record = records.find(tmp_path / "runs", setting="search")[0]
        assert record.model.revision == another.repositories["models", "nvidia/Hymba-1.5B-Base"].commit


def killing(hub: Hub) -> Any:
    """A search at whose end the Hub is gone."""

    def searched(*arguments: Any, **options: Any) -> Any:
        plan = search(*arguments, **options)
        hub.kill()
        return plan

    return searched


def test_the_rehearsal_differs_in_limit_and_device_only(tmp_path: Path) -> None:
    ours, theirs = profiles.load(derived(tmp_path / "paper.yaml", limit=2)), profiles.load("paper")
    changed = {"device": "cpu", "dtype": "float32"}
    limited = theirs.evaluation.model_copy(update={"limit": 2})
    assert ours == theirs.model_copy(update={**changed, "evaluation": limited})


def test_a_quick_rehearsal_of_one_model_is_whole(
    files: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The commands of `make rehearse` on one model: search, scores, notebooks, tables, verdicts."""
    (tmp_path / "files").symlink_to(files)
    problems = rehearsal.rehearse(tmp_path, models="hymba-1.5b", studies="hymba_pruning", quick=True)
    assert problems == [], capfd.readouterr().err[-2000:]
    found = {(one.study, one.setting): one for one in records.find(tmp_path / "runs")}
    order = Plan.model_validate(found["hymba_pruning", "search"].plan)
    assert [len(one.model.removals) for one in found.values() if one.study == "hymba_pruning"] == [6, 7, 8, 0]
    assert len(order) == 8
    assert all(math.isfinite(score) for score in order.scores)
    assert "not run at full width" in (tmp_path / "runs" / "figures" / "paper" / "claims.md").read_text()


@pytest.mark.parametrize("problems", [[], ["dense/mamba-2.8b/scores is not recorded"]])
def test_a_rehearsal_that_went_wrong_is_gone_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, problems: list[str]
) -> None:
    def rehearsed(folder: Path, **_: Any) -> list[str]:
        (folder / "runs").mkdir(parents=True)
        return problems

    monkeypatch.setattr(rehearsal, "ROOT", tmp_path)
    monkeypatch.setattr(rehearsal, "rehearse", rehearsed)
    monkeypatch.setattr(sys, "argv", ["hub", "--quick"])
    with pytest.raises(SystemExit) as ended:
        rehearsal.main()
    assert ended.value.code == bool(problems)
    assert (tmp_path / "runs" / "rehearsal-quick" / "runs").exists() == bool(problems)


@pytest.mark.parametrize("more", [0, -1, 1])
def test_the_rehearsal_tells_of_passes_that_were_not_planned(tmp_path: Path, more: int) -> None:
    profile, wanted = profiles.load("smoke"), {"models": ["smoke-mamba2"], "studies": ["block_pruning"]}
    plan = CostPlan(profile, Schedule(profile, tmp_path, **wanted), **wanted)
    assert passes_amiss(plan, tmp_path) == []
    (job,) = (job for job in plan.jobs if job.what == "search")
    made = Plan(removals=[Removal(component="mamba_block:1")], provenance={"passes": job.passes + more})
    World(tmp_path, profile).store(job.study, job.model, "search", plan=made)
    complaint = f"block_pruning, smoke-mamba2: {job.passes + more} passes, planned {job.passes}"
    assert passes_amiss(plan, tmp_path) == ([complaint] if more else [])


def test_the_recorded_searches_made_the_passes_that_are_planned(tmp_path: Path) -> None:
    """Also where one kind takes from another, and with each draw of calibration data."""
    profile = profiles.load("pocket")
    plan = CostPlan(profile, Schedule(profile, tmp_path))
    assert passes_amiss(plan, ROOT / "results") == []
    place = {"profile": "pocket", "study": "joint_decode", "model": "pocket-mamba2", "setting": "search"}
    (joint,) = records.find(ROOT / "results", **place)
    counts = joint.plan["provenance"] | {"passes": joint.plan["provenance"]["passes"] - 1}
    records.write(tmp_path, joint.model_copy(update={"plan": joint.plan | {"provenance": counts}}))
    (complaint,) = passes_amiss(plan, tmp_path)
    assert complaint.startswith(f"joint_decode, pocket-mamba2: {counts['passes']} passes, planned ")
