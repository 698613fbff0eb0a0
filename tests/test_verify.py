"""Verification: nothing slips through that was changed, lost or mixed up, and nothing honest is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from typer.testing import CliRunner
from world import AS_IN_THE_PAPER, BLOCKS_1, OTHER_WAY_ROUND, RISES_AS_IN_THE_PAPER, World, small_profile

from shedder_utils import manifest, profiles, records, report
from shedder_utils.__main__ import app
from shedder_utils.plan import Plan, Removal
from shedder_utils.profiles import Profile, Strategy
from shedder_utils.records import Metric, Record
from shedder_utils.report import comparison
from shedder_utils.report.verify import Finding, verify
from shedder_utils.savings import Savings

SEARCH = (*BLOCKS_1, "search")


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Profile, Path]:
    """A project whose `results`, `figures` and `notebooks` are whole."""
    base = tmp_path_factory.mktemp("project")
    profile = profiles.load(small_profile(base))
    world = World(base / "results", profile, loss=AS_IN_THE_PAPER, rise=RISES_AS_IN_THE_PAPER).finish()
    report.build(profile, world.root, world.root, base / "figures" / profile.name)
    (base / "notebooks").mkdir()
    (base / "notebooks" / "01_some.ipynb").write_text(json.dumps(notebook(profile.name)))
    manifest.write(base)
    return profile, base


def notebook(profile: str) -> dict:
    shown = {"output_type": "stream", "name": "stdout", "text": ["perplexity 2.413\n"]}
    code = {"cell_type": "code", "source": f'profile = "{profile}"', "execution_count": 1, "outputs": [shown]}
    prose = {"cell_type": "markdown", "source": "A story."}
    return {"cells": [prose, code], "metadata": {"shedder": {"studies": ["block_pruning"]}}}


@pytest.fixture
def project(recorded: tuple[Profile, Path], tmp_path: Path) -> tuple[Profile, Path]:
    """A copy of it, to spoil."""
    profile, base = recorded
    for file in base.rglob("*.*"):
        if file.is_file():
            target = tmp_path / "project" / file.relative_to(base)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
    return profile, tmp_path / "project"


@pytest.fixture
def yours(project: tuple[Profile, Path], tmp_path: Path) -> World:
    """A run that found the same."""
    world = World(tmp_path / "runs", project[0], loss=AS_IN_THE_PAPER, rise=RISES_AS_IN_THE_PAPER)
    return world.finish()


def fatal(found: list[Finding]) -> list[Finding]:
    return [finding for finding in found if finding.fatal]


def test_a_run_that_found_the_same_has_nothing_to_report(project, yours):
    profile, base = project
    found = verify(profile, yours.root, base)
    assert {finding.level for finding in found} == {"note"}
    n_records = len(list(yours.root.rglob("*.json")))
    assert f"{n_records} of your {n_records} runs agree" in str(found[0])
    assert next(finding.where for finding in found if "paper" in finding.where) == "paper, C1"


def test_without_runs_only_what_is_recorded_is_verified(project, tmp_path):
    profile, base = project
    found = verify(profile, tmp_path / "none", base)
    assert not fatal(found)
    assert any("only what is recorded was verified" in str(finding) for finding in found)


SPOILED = {
    "results/small/block_pruning/pocket-mamba/03_removed.json": '"n": 400',
    "figures/small/figure_2.json": '"caption": "Figure 2',
    "figures/small/table_1.csv": ",57.7,",
    "figures/small/claims.md": "C12",
    "notebooks/01_some.ipynb": "2.413",
}


@pytest.mark.parametrize("name", SPOILED)
def test_one_changed_digit_is_found_by_the_files_name(project, tmp_path, name):
    profile, base = project
    text = (base / name).read_text()
    old = SPOILED[name]
    digit = next(c for c in old if c.isdigit())
    assert old in text
    (base / name).write_text(text.replace(old, old.replace(digit, str((int(digit) + 1) % 10)), 1))
    found = fatal(verify(profile, tmp_path / "none", base))
    assert name in {finding.where for finding in found}


def test_one_changed_pixel_is_found(project, tmp_path):
    profile, base = project
    file = base / "figures/small/figure_3.png"
    content = bytearray(file.read_bytes())
    content[-20] ^= 1
    file.write_bytes(content)
    assert [finding.where for finding in fatal(verify(profile, tmp_path, base))] == ["figures/small/figure_3.png"]


def test_prose_of_a_notebook_may_be_edited_code_may_not(project, tmp_path):
    profile, base = project
    file = base / "notebooks/01_some.ipynb"
    file.write_text(file.read_text().replace("A story.", "A better story."))
    assert not fatal(verify(profile, tmp_path, base))
    file.write_text(file.read_text().replace("profile = ", "profile  = "))
    assert [finding.where for finding in fatal(verify(profile, tmp_path, base))] == ["notebooks/01_some.ipynb"]


def test_files_that_are_missing_or_too_many_are_found(project, tmp_path):
    profile, base = project
    (base / "figures/small/table_2.tex").unlink()
    (base / "figures/small/figure_9.png").write_bytes(b"")
    found = {finding.where for finding in fatal(verify(profile, tmp_path, base))}
    assert {"figures/small/table_2.tex", "figures/small/figure_9.png"} <= found
    (base / manifest.PLACE).unlink()
    assert "make record" in next(str(f) for f in verify(profile, tmp_path, base) if "manifest" in f.where)


def test_a_figure_of_other_records_is_found_even_if_the_manifest_agrees(project, tmp_path):
    profile, base = project
    world = World(base / "results", profile, loss=AS_IN_THE_PAPER, rise=RISES_AS_IN_THE_PAPER)
    world.store(*BLOCKS_1, "05_removed", 5, world.metrics(*BLOCKS_1, 4))
    records.path(base / "results", "small", "ssm_pruning", "pocket-mamba2", "search").unlink()
    manifest.write(base)
    found = "\n".join(map(str, fatal(verify(profile, tmp_path, base))))
    assert "was made from another results/small/block_pruning/pocket-mamba/05_removed.json" in found
    assert "shows results/small/ssm_pruning/pocket-mamba2/search.json, which is not there" in found


def test_a_notebook_without_outputs_or_with_an_error_is_found(project, tmp_path):
    profile, base = project
    file = base / "notebooks/01_some.ipynb"
    content = json.loads(file.read_text())
    content["cells"][1] |= {"execution_count": None, "outputs": [{"output_type": "error"}]}
    file.write_text(json.dumps(content))
    manifest.write(base)
    found = [str(finding) for finding in fatal(verify(profile, tmp_path, base))]
    assert len(found) == 2
    assert "was not run from top to bottom" in found[0]
    content["cells"][1]["source"] = 'profile = "another"'
    file.write_text(json.dumps(content))
    manifest.write(base)
    assert not fatal(verify(profile, tmp_path, base))


def replaced(world: World, place: tuple[str, str, str], **changes: object) -> Record:
    """Write a record with changes, its fingerprint of inputs made anew."""
    record = records.read(records.path(world.root, "small", *place)).model_copy(update=changes)
    record = record.model_copy(update={"inputs": record.inputs_fingerprint()})
    records.write(world.root, record)
    return record


def test_foreign_records_are_found(project, yours):
    profile, base = project
    place = records.path(yours.root, "small", *SEARCH)
    other = records.read(place)
    place.rename(place.with_name("99_removed.json"))
    records.write(yours.root, other.model_copy(update={"model": other.model.model_copy(update={"name": "elsewhere"})}))
    dense = records.read(records.path(yours.root, "small", "dense", "pocket-mamba2", "scores"))
    model = dense.model.model_copy(update={"fingerprint": "e" * 64})
    replaced(yours, ("dense", "pocket-mamba2", "scores"), model=model)
    forged = records.read(records.path(yours.root, "small", "ssm_pruning", "pocket-mamba", "search"))
    records.write(yours.root, forged.model_copy(update={"spec": {"stages": []}}))
    found = {
        finding.where.rpartition("small/")[2]: finding.what for finding in fatal(verify(profile, yours.root, base))
    }
    assert "holds the record of" in found["block_pruning/pocket-mamba/99_removed.json"]
    assert "profile small does not have" in found["block_pruning/elsewhere/search.json"]
    assert found["dense/pocket-mamba2/scores.json"].startswith("foreign: weights eeeeeeeeeeee")
    assert "inputs are not those" in found["ssm_pruning/pocket-mamba/search.json"]


def test_a_broken_record_of_yours_is_found(project, yours):
    profile, base = project
    records.path(yours.root, "small", *SEARCH).write_text("{")
    found = fatal(verify(profile, yours.root, base))
    assert [finding.where.endswith("block_pruning/pocket-mamba/search.json") for finding in found] == [True]


def swapped(world: World, place: tuple[str, str, str] = SEARCH, **provenance: object) -> dict:
    """The plan of a search whose second and third removals changed places, with scores that hardly differ."""
    plan = Plan.model_validate(records.read(records.path(world.root, "small", *place)).plan)
    second, third = plan.removals[1], plan.removals[2]
    plan.removals[1] = third.model_copy(update={"score": second.score * (1 + 1e-6)})
    plan.removals[2] = second.model_copy(update={"score": third.score})
    plan.provenance.update(provenance)
    return plan.model_dump(mode="json")


def test_another_order_from_the_same_inputs_fails_unless_a_stated_tie_explains_it(project, yours):
    profile, base = project
    replaced(yours, SEARCH, plan=swapped(yours, ties=0))
    found = [finding for finding in verify(profile, yours.root, base) if finding.level != "note"]
    order = next(finding for finding in found if finding.fatal)
    assert order.where == "small/block_pruning/pocket-mamba/search.json"
    assert "removal 2 is mamba_block:21 here, mamba_block:22 recorded" in order.what
    yours.finish()
    replaced(yours, SEARCH, plan=swapped(yours, ties=1))
    found = verify(profile, yours.root, base)
    assert not fatal(found)
    assert any("a tie within rounding" in finding.what for finding in found)


@pytest.mark.parametrize(("removals", "explained"), [(2, True), (1, False)])
def test_a_tie_in_what_was_taken_over_is_stated_elsewhere(project, yours, removals, explained):
    profile, base = project
    replaced(yours, SEARCH, plan=swapped(yours, ties=0, taken_over={"study": "other", "removals": removals}))
    assert (not fatal(verify(profile, yours.root, base))) == explained


@pytest.mark.parametrize(
    ("ours", "theirs", "dtype", "provenance", "tied"),
    [
        (2.0, 2.00003, "float32", {"metric": "perplexity", "ties": 1}, True),
        (2.0, 2.00006, "float32", {"metric": "perplexity", "ties": 1}, False),
        (2.0, 2.006, "bfloat16", {"metric": "perplexity", "ties": 1}, True),
        (2.0, 2.012, "bfloat16", {"metric": "perplexity", "ties": 1}, False),
        (0.05, 0.050015, "float32", {"metric": "kl", "ties": 1}, True),
        (0.05, 0.050015, "float32", {"metric": "kl", "ties": 0}, False),
        (0.05, 0.050025, "float32", {"metric": "kl", "ties": 1}, False),
        (0.05, 0.050002, "float32", {"metric": "taylor"}, True),
        (0.05, 0.050015, "float32", {"metric": "taylor"}, False),
    ],
)
def test_a_tie_is_one_within_rounding(yours, ours, theirs, dtype, provenance, tied):
    run = records.read(records.path(yours.root, "small", *SEARCH))
    model = run.model.model_copy(update={"dtype": dtype})

    def found(component: str, score: float) -> Record:
        plan = Plan(removals=[Removal(component=component, score=score)], provenance=provenance)
        return run.model_copy(update={"model": model, "plan": plan.model_dump(mode="json")})

    parted = comparison.order(found("ssm:1", ours), found("ssm:2", theirs))
    assert parted == ("removal 1 is ssm:1 here, ssm:2 recorded", tied)


@pytest.mark.parametrize(("score", "ties", "tied"), [(2.8000, 1, True), (2.8000, 0, False), (2.8005, 1, False)])
def test_candidates_that_cost_as_much_for_what_they_save_are_tied_whatever_their_scores(yours, score, ties, tied):
    run = records.read(records.path(yours.root, "small", *SEARCH))

    def found(component: str, score: float, saved: float) -> Record:
        plan = Plan(
            dense_score=2.0,
            removals=[Removal(component="ssm:0", score=2.0), Removal(component=component, score=score)],
            provenance={"metric": "perplexity", "one_shot": False, "ties": ties, "per": {"unit": "parameters"},
                        "saved": {"parameters": [100.0, 100.0 + saved]}},
        )  # fmt: skip
        return run.model_copy(update={"plan": plan.model_dump(mode="json")})

    theirs = found("ssm:2", 2.0 * math.sqrt(1.4), 50.0)
    parted = comparison.order(found("ssm:1", score, 100.0), theirs)
    assert parted == ("removal 2 is ssm:1 here, ssm:2 recorded", tied)


def test_divergences_differ_by_nats_and_not_by_their_share(yours):
    run = records.read(records.path(yours.root, "small", *SEARCH))

    def dense(score: float) -> Record:
        plan = Plan(dense_score=score, provenance={"metric": "kl"})
        return run.model_copy(update={"plan": plan.model_dump(mode="json")})

    assert not list(comparison.numbers(dense(2e-9), dense(0.0)))
    assert list(comparison.numbers(dense(2e-3), dense(0.0)))


def test_another_order_from_other_weights_is_no_failure(project, yours):
    profile, base = project
    for file in yours.root.glob("small/*/pocket-mamba/*.json"):
        record = records.read(file)
        model = record.model.model_copy(update={"fingerprint": "a" * 64})
        plan = swapped(yours, ties=0) if record.plan and record.study == "block_pruning" else record.plan
        replaced(yours, (record.study, "pocket-mamba", record.setting), model=model, plan=plan)
    found = verify(profile, yours.root, base)
    assert not fatal(found)
    order = next(finding for finding in found if "removal 2" in finding.what)
    assert f"first input that differs: model fingerprint: {'a' * 12}... here, {'f' * 12}... recorded" in order.what


JOINT = ("joint_decode", "pocket-mamba", "search")


def chosen_by(unit: str, milliseconds: float) -> dict:
    """The settings of a search that chooses by what SSMs save, each so much."""
    savings = Savings(unit=unit, whole=9.0, each={f"ssm:{index}": milliseconds for index in range(24)})
    return {"stages": [], "per": savings.model_dump()}


@pytest.fixture
def joint(project: tuple[Profile, Path], yours: World) -> Profile:
    """The profile with a search by the savings of time, recorded and yours alike."""
    profile, base = project
    strategy = Strategy(per="decode", stages=({"kinds": ["ssm"], "steps": 3},), rows={"pocket-mamba": (3,)})
    profile = profile.model_copy(update={"beyond": {"joint_decode": strategy}})
    for root in (base / "results", yours.root):
        world = World(root, profile)
        world.store(*JOINT, plan=world.plan(*JOINT[:2]))
        replaced(world, JOINT, spec=chosen_by("decode", 0.3))
    manifest.write(base)
    return profile


@pytest.mark.parametrize(
    ("cpu", "reason"),
    [
        ("Another CPU", "on another machine: Another CPU, cpu here, Some CPU, cpu recorded"),
        ("Some CPU", "on Some CPU, cpu at another time"),
    ],
)
def test_an_order_chosen_by_times_may_differ_where_they_were_measured_anew(joint, project, yours, cpu, reason):
    run = records.read(records.path(yours.root, "small", *JOINT))
    environment = run.environment.model_copy(update={"cpu": cpu})
    plan = swapped(yours, JOINT, ties=0)
    replaced(yours, JOINT, plan=plan, spec=chosen_by("decode", 0.2), environment=environment)
    found = verify(joint, yours.root, project[1])
    assert not fatal(found)
    order = next(finding for finding in found if finding.level == "differs")
    assert order.where == "small/joint_decode/pocket-mamba/search.json"
    what = "removal 2 is ssm:21 here, ssm:22 recorded"
    assert order.what.startswith(f"{what}; first input that differs: savings in decode time were measured {reason}")


def test_an_order_chosen_by_the_same_times_may_not_differ(joint, project, yours):
    replaced(yours, JOINT, plan=swapped(yours, JOINT, ties=0))
    (order,) = fatal(verify(joint, yours.root, project[1]))
    assert order.where == "small/joint_decode/pocket-mamba/search.json"


def test_savings_that_are_counted_are_settings(yours):
    run = records.read(records.path(yours.root, "small", *SEARCH))
    ours, theirs = (run.model_copy(update={"spec": chosen_by("bytes", each)}) for each in (0.2, 0.3))
    assert next(comparison.inputs(ours, theirs)) == "setting per.each.ssm:0: 0.2 here, 0.3 recorded"
    timed = run.model_copy(update={"spec": chosen_by("decode", 0.3)})
    assert next(comparison.inputs(timed, theirs)).startswith("setting per.unit: decode here, bytes recorded")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (lambda run: {"environment": run.environment.model_copy(update={"torch": "2.9.9"})},
         "version of torch: 2.9.9 here, 2.13.0 recorded"),
        (lambda run: {"environment": run.environment.model_copy(update={"scan": "plain"})},
         "scan: plain here, numba recorded"),
        (lambda run: {"spec": {"calibration": {"seed": 43}}}, "setting calibration"),
        (lambda run: {"data": {"tasks": run.data["tasks"].model_copy(update={"fingerprint": "b" * 64})}},
         "data fingerprint of tasks: bbbbbbbbbbbb... here, dddddddddddd... recorded"),
        (lambda run: {}, "no input differs"),
    ],
    ids=["version", "scan", "setting", "data", "none"],
)  # fmt: skip
def test_numbers_that_differ_come_with_the_first_input_that_differs(project, yours, changes, named):
    profile, base = project
    place = (*BLOCKS_1, "03_removed")
    run = records.read(records.path(yours.root, "small", *place))
    metrics = run.metrics | {
        "pocket_piqa/acc_norm": run.metrics["pocket_piqa/acc_norm"].model_copy(update={"value": 0.5})
    }
    replaced(yours, place, metrics=metrics, **changes(run))
    found = verify(profile, yours.root, base)
    assert not fatal(found)
    differing = [finding for finding in found if finding.level == "differs"]
    assert [finding.where for finding in differing] == ["small/block_pruning/pocket-mamba/03_removed.json"]
    assert "pocket_piqa/acc_norm: 0.5 here, 0.76 recorded" in differing[0].what
    assert named in differing[0].what


def test_settings_are_named_before_the_data_that_they_change(yours):
    ours = records.read(records.path(yours.root, "small", *SEARCH))
    data = {"tasks": ours.data["tasks"].model_copy(update={"fingerprint": "b" * 64})}
    theirs = ours.model_copy(update={"spec": {"calibration": {"seed": 42, "samples": 8}}, "data": data})
    ours = ours.model_copy(update={"spec": {"calibration": {"seed": 43, "samples": 8}}})
    differing = list(comparison.inputs(ours, theirs))
    assert differing[0] == "setting calibration.seed: 43 here, 42 recorded"
    assert len(differing) == 2


def test_speedups_differ_only_when_their_intervals_do_not_meet(yours):
    run = records.read(records.path(yours.root, "small", *SEARCH))

    def timed(value: float, low: float, high: float) -> Record:
        names = {"5/decode/speedup": value, "5/decode/low": low, "5/decode/high": high, "5/decode/seconds": value}
        return run.model_copy(
            update={"plan": None, "metrics": {name: Metric(value=one) for name, one in names.items()}}
        )

    assert not list(comparison.numbers(timed(1.3, 1.2, 1.4), timed(1.45, 1.38, 1.5)))
    assert "do not meet" in next(comparison.numbers(timed(1.3, 1.2, 1.4), timed(1.45, 1.41, 1.5)))


def test_a_result_that_deviates_from_the_paper_is_no_failure(project, tmp_path):
    profile, base = project
    own = profile.model_copy(update={"papers_own_models": True})
    World(
        tmp_path / "runs", own, loss=OTHER_WAY_ROUND, rise={key: 4 * v for key, v in OTHER_WAY_ROUND.items()}
    ).finish()
    found = verify(own, tmp_path / "runs", base)
    assert not fatal(found)
    assert any(finding.what.startswith("deviates") for finding in found)


def test_runs_that_are_not_recorded_are_only_noted(project, tmp_path):
    profile, base = project
    found = verify(profile.model_copy(update={"name": "other"}), tmp_path, base)
    assert not fatal(found)
    assert any("runs of profile other are not recorded" in finding.what for finding in found)


@pytest.mark.parametrize(("level", "code"), [("broken", 1), ("differs", 0)])
def test_the_command_fails_only_on_what_is_broken(monkeypatch, level, code):
    monkeypatch.setattr("shedder_utils.report.verify.verify", lambda *_: [Finding(level, "here", "something")])
    result = CliRunner().invoke(app, ["verify"])
    assert result.exit_code == code
    assert "here: something" in result.stderr
    assert json.loads(result.stdout) == {
        "profile": "pocket", "broken": bool(code),
        "findings": [{"level": level, "where": "here", "what": "something"}],
    }  # fmt: skip


def test_what_is_committed_is_whole(tmp_path):
    assert fatal(verify("pocket", tmp_path / "none")) == []
