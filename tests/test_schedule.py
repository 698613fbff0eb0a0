"""The schedule: what is to be done and what it will cost, and that a second run does nothing and says so."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import yaml
from world import World, small_profile

from shedder_utils import ShedderError, freshness, notebooks, profiles, records, studies
from shedder_utils.profiles import Profile
from shedder_utils.schedule import Schedule, Step, choosing, report_progress, steps


@pytest.fixture
def profile(tmp_path: Path) -> Profile:
    return profiles.load(small_profile(tmp_path))


@pytest.fixture
def world(profile: Profile, tmp_path: Path) -> World:
    return World(tmp_path / "results", profile).finish()


def test_every_run_is_a_step_once():
    smoke = profiles.load("smoke")
    found = steps(smoke)
    assert len(set(found)) == len(found)
    places = {step.place for step in found}
    for study, settings in smoke.studies.items():
        for model, rows in settings.rows.items():
            assert (study, model, "search") in places
            assert {(study, model, f"{n:02d}_removed") for n in rows if n} <= places
    assert ("speed", "smoke-mamba", "table_6") in places
    assert ("recovery", "smoke-mamba2", "ssm_pruning_02_tuned") in places


def test_models_and_studies_narrow_it_to_what_they_take():
    smoke = profiles.load("smoke")

    def places(model: str, study: str) -> list[str]:
        return ["/".join(step.place) for step in steps(smoke, [model], [study])]

    assert places("smoke-mamba", "inventory") == ["inventory/smoke-mamba/components"]
    assert places("smoke-mamba", "ssm_pruning") == [
        "ssm_pruning/smoke-mamba/search", "dense/smoke-mamba/scores",
        "ssm_pruning/smoke-mamba/01_removed", "ssm_pruning/smoke-mamba/02_removed",
    ]  # fmt: skip
    assert places("smoke-falcon", "falcon_ssms") == [
        "falcon_ssms/smoke-falcon/search", "falcon_ssms/smoke-falcon/01_removed", "falcon_ssms/smoke-falcon/02_removed",
    ]  # fmt: skip
    assert places("smoke-hymba", "speed") == ["hymba_pruning/smoke-hymba/search", "speed/smoke-hymba/table_9"]
    assert places("smoke-mamba2", "recovery") == [
        "dense/smoke-mamba2/scores", "recovery/smoke-mamba2/dense_tuned", "ssm_pruning/smoke-mamba2/search",
        "ssm_pruning/smoke-mamba2/02_removed", "recovery/smoke-mamba2/ssm_pruning_02_tuned",
    ]  # fmt: skip
    assert places("smoke-mamba", "hymba_pruning") == []
    assert {step.model for step in steps(smoke, models=["smoke-mamba"])} == {"smoke-mamba"}


def test_a_notebook_computes_all_that_it_names():
    smoke = profiles.load("smoke")
    assert notebooks.computed(smoke) == list(smoke.study_names)
    assert notebooks.computed(smoke, studies=["ssm_pruning"]) == ["ssm_pruning"]
    assert notebooks.computed(smoke, studies=["falcon_ssms"]) == ["falcon_blocks", "falcon_ssms"]
    assert notebooks.computed(smoke, ["smoke-hymba"]) == ["inventory", "dense", "hymba_pruning", "speed", "recovery"]


@pytest.mark.parametrize(("study", "called"), [
    ("inventory", ["inventory("]), ("dense", ["dense(", "without_ssms("]), ("ssm_pruning", ["pruning("]),
    ("falcon_ssms", ["pruning("]), ("speed", ["speed("]), ("recovery", ["recovery_study.recovery("]),
])  # fmt: skip
def test_the_notebook_that_names_a_study_is_the_one_that_computes_it(study, called):
    (code,) = (
        file.read_text()
        for file, said in notebooks._metadata().items()
        if study in said["studies"] and not said.get("together")
    )
    assert all(call in code for call in called)


def test_nothing_recorded_and_nothing_done(profile, tmp_path):
    schedule = Schedule(profile, tmp_path / "a", tmp_path / "b")
    assert schedule.left == schedule.steps
    assert schedule.seconds_left() is None
    text = "\n".join(schedule.lines())
    assert "its cost is not known" in text
    assert f"{len(schedule.steps)} of {len(schedule.steps)} runs, time not known" in text


def test_costs_are_the_recorded_ones(profile, world, tmp_path):
    schedule = Schedule(profile, tmp_path / "none", world.root)
    assert schedule.seconds_left() == 30 * len(schedule.steps)
    text = "\n".join(schedule.lines())
    assert "Some CPU, threads: 2" in text
    assert "ssm_pruning" in text
    line = next(line for line in text.splitlines() if line.startswith("block_pruning"))
    assert line.split()[1:] == ["6", "0", "3.0", "0.8", "GiB"]


def test_time_left_follows_the_pace_of_this_machine(profile, world, tmp_path):
    for step in (Step("dense", "pocket-mamba", "scores"), Step("inventory", "pocket-mamba", "components")):
        record = records.read(records.path(world.root, "small", *step.place))
        slow = record.model_copy(update={"cost": record.cost.model_copy(update={"seconds": 90})})
        records.write(tmp_path / "runs", slow)
    schedule = Schedule(profile, tmp_path / "runs", world.root)
    assert schedule.pace == pytest.approx(3)
    assert schedule.seconds_left() == pytest.approx(90 * (len(schedule.steps) - 2))


def test_progress_says_what_was_done_and_what_is_left(profile, world, tmp_path, capsys):
    record = records.read(records.path(world.root, "small", "dense", "pocket-mamba", "scores"))
    records.write(tmp_path / "runs", record)
    report_progress(profile, tmp_path / "runs", record)
    n = len(steps(profile))
    assert (
        capsys.readouterr().err
        == f"dense, pocket-mamba, scores: 30 s, 800 MiB. Left: {n - 1} of {n} runs, time not known\n"
    )
    with choosing(["pocket-mamba"], ["ssm_pruning"]):
        report_progress(profile, tmp_path / "runs", record)
    n = len(steps(profile, ["pocket-mamba"], ["ssm_pruning"]))
    assert f"Left: {n - 1} of {n} runs" in capsys.readouterr().err


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, profile: Profile) -> Any:
    """`notebooks.run` on two notebooks that are copied instead of executed; returns the names of those."""
    folder = tmp_path / "notebooks"
    folder.mkdir()
    for name, study in (("01_blocks", "block_pruning"), ("02_ssms", "ssm_pruning")):
        cells = [
            {"cell_type": "code", "source": "1", "execution_count": None, "metadata": {}, "outputs": [], "id": "a"}
        ]
        content = {"cells": cells, "metadata": {"shedder": {"studies": [study]}}, "nbformat": 4, "nbformat_minor": 5}
        (folder / f"{name}.ipynb").write_text(json.dumps(content))
    executed: list[str] = []

    def execute(notebook: Path, target: Path, *_: Any) -> None:
        executed.append(notebook.stem)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(notebook, target)

    monkeypatch.setattr(notebooks, "FOLDER", folder)
    monkeypatch.setattr(notebooks, "execute", execute)
    monkeypatch.setattr(notebooks, "_kernel", nullcontext)
    monkeypatch.setattr(notebooks.report, "build", lambda *_: [])

    def go(**chosen: list[str]) -> list[str]:
        executed.clear()
        notebooks.run(str(tmp_path / "small.yaml"), output=tmp_path / "results", **chosen)
        return list(executed)

    return go


def test_a_second_run_does_nothing_and_says_so(run, world, capsys):
    assert run() == ["01_blocks", "02_ssms"]
    first = capsys.readouterr().err
    assert "To do: nothing" in first
    assert run() == []
    assert "Nothing to do: all runs are recorded" in capsys.readouterr().err


@pytest.mark.parametrize(("reasons", "tried"), [(("one", "other"), 3), (("the same", "the same"), 2), (("one",), 3)])
def test_a_notebook_that_fails_does_not_keep_the_others_from_running(run, monkeypatch, capsys, reasons, tried):
    left, executed = list(reasons), []
    shutil.copy(notebooks.FOLDER / "02_ssms.ipynb", notebooks.FOLDER / "03_ssms_again.ipynb")

    def failing(notebook: Path, target: Path, *_: Any) -> None:
        executed.append(notebook.stem)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(notebook, target)
        if left:
            raise notebooks.NotebookError(notebook.name, left.pop(0), target)

    monkeypatch.setattr(notebooks, "execute", failing)
    with pytest.raises(ShedderError, match=f"{len(reasons)} of 3 notebooks failed; the first: 01_blocks.ipynb: "):
        run()
    assert len(executed) == tried
    assert capsys.readouterr().err.count("error: ") == len(reasons)


def test_what_changed_or_is_missing_runs_again(run, world, tmp_path):
    run()
    (file,) = (tmp_path / "notebooks").glob("02*")
    file.write_text(file.read_text().replace('"source": "1"', '"source": "2"'))
    assert run() == ["02_ssms"]
    records.path(world.root, "small", "block_pruning", "pocket-mamba", "03_removed").unlink()
    assert run() == ["01_blocks"]
    records.path(world.root, "small", "dense", "pocket-mamba", "scores").unlink()
    assert run() == ["01_blocks", "02_ssms"]


def test_only_what_was_chosen_runs_and_counts(run, world, tmp_path, capsys):
    for model in world.profile.models:
        records.path(world.root, "small", "block_pruning", model, "03_removed").unlink()
    assert run(studies=["ssm_pruning"]) == ["02_ssms"]
    assert "To do: nothing, all 10 runs are recorded" in capsys.readouterr().err
    assert run(studies=["ssm_pruning"], models=["pocket-mamba"]) == ["02_ssms"]  # shows other models
    assert "all 5 runs" in capsys.readouterr().err
    assert run() == ["01_blocks", "02_ssms"]


def test_a_notebook_that_sets_studies_beside_each_other_needs_all_of_them(run, world, tmp_path):
    file = tmp_path / "notebooks" / "02_ssms.ipynb"
    content = json.loads(file.read_text())
    content["metadata"]["shedder"] = {"studies": ["block_pruning", "ssm_pruning"], "together": True}
    (tmp_path / "notebooks" / "08_both.ipynb").write_text(json.dumps(content))
    content["metadata"]["shedder"] = {"studies": []}
    (tmp_path / "notebooks" / "09_report.ipynb").write_text(json.dumps(content))
    assert run(studies=["ssm_pruning"]) == ["02_ssms", "09_report"]
    assert run(studies=["block_pruning"]) == ["01_blocks"]
    assert run() == ["08_both"]


def test_a_study_without_a_notebook_is_computed_all_the_same(run, world, tmp_path, monkeypatch):
    (tmp_path / "notebooks" / "02_ssms.ipynb").unlink()
    done: list[tuple[str, str]] = []
    monkeypatch.setattr(studies, "pruning", lambda bench, study: done.append((study, bench.name)))
    assert run() == ["01_blocks"]
    assert done == []
    records.path(world.root, "small", "ssm_pruning", "pocket-mamba2", "search").unlink()
    assert run(studies=["ssm_pruning"]) == []
    assert done == [("ssm_pruning", "pocket-mamba2")]


def test_released_orders_are_computed_though_no_notebook_shows_them(run, world, tmp_path, monkeypatch):
    content = yaml.safe_load((tmp_path / "small.yaml").read_text())
    content["released"] = [{"order": "mamba2-2.7b", "model": "pocket-mamba2", "table": 2, "rows": {16: 16}}]
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(content))
    done: list[str] = []
    monkeypatch.setattr(studies, "released_orders", lambda bench: done.append(bench.name))
    assert run(studies=["released"]) == []
    assert run(models=["pocket-mamba"]) == ["01_blocks", "02_ssms"]
    assert done == ["pocket-mamba2"]


@pytest.mark.parametrize("error", [ShedderError("nothing was found"), AssertionError("nothing was found")])
def test_a_study_that_fails_does_not_keep_the_notebooks_from_running(run, world, tmp_path, monkeypatch, error):
    (tmp_path / "notebooks" / "02_ssms.ipynb").unlink()
    records.path(world.root, "small", "ssm_pruning", "pocket-mamba2", "search").unlink()

    def failing(bench: Any, study: str) -> None:
        raise error

    monkeypatch.setattr(studies, "pruning", failing)
    with pytest.raises(ShedderError, match="not computed: ssm_pruning, pocket-mamba2: nothing was found"):
        run()
    assert (world.root / "notebooks" / "small" / "01_blocks.ipynb").exists()


def test_a_notebook_is_fresh_only_for_the_same_profile_and_parameters(run, world, profile, tmp_path):
    (file,) = (tmp_path / "notebooks").glob("01*")
    target = tmp_path / "out.ipynb"
    shutil.copy(file, target)
    made = freshness.made_from(file, profile, {"models": ""})
    assert not freshness.is_fresh(target, made)
    freshness.mark(target, made)
    assert freshness.is_fresh(target, made)
    more = profile.model_copy(update={"search_gib": 0.5})
    assert not freshness.is_fresh(target, freshness.made_from(file, more, {"models": ""}))
    assert not freshness.is_fresh(target, freshness.made_from(file, profile, {"models": "pocket-mamba"}))
