"""Searches that begin alike: what is taken over is what a full search finds, and nothing of another search is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from shedder_utils import Plan, Stage, profiles, records
from shedder_utils.prefix import removals_before, shared_removals, taken_over
from shedder_utils.profiles import Strategy
from shedder_utils.records import Record, Request
from shedder_utils.studies import removal_order
from shedder_utils.workbench import Workbench

MODEL = "smoke-mamba2"
STUDIES = {
    "first": [{"kinds": ["mamba_block", "ssm"], "steps": 3}],
    "second": [{"kinds": ["mamba_block", "ssm"], "steps": 2}, {"kinds": ["ssm"], "steps": 2}],
    "unlike": [{"kinds": ["ssm"], "steps": 1}],
}


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smoke profile with one model and three searches, two of which begin alike."""
    content = yaml.safe_load((profiles.FOLDER / "smoke.yaml").read_text())
    content |= dict.fromkeys(("speed", "recovery", "certainty", "pareto"))
    content |= {"beyond": {}, "models": {MODEL: content["models"][MODEL]}}
    content["studies"] = {name: {"table": 3, "stages": s, "rows": {MODEL: {1: 1}}} for name, s in STUDIES.items()}
    file = tmp_path_factory.mktemp("profile") / "alike.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


@pytest.fixture(scope="module")
def output(profile: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the records of all three searches, made one after the other."""
    folder = tmp_path_factory.mktemp("runs")
    bench = Workbench(profile, MODEL, folder)
    for study in STUDIES:
        removal_order(bench, study)
    return folder


def record_of(output: Path, study: str) -> Record:
    return records.read(records.path(output, "smoke", study, MODEL, "search"))


def plan_of(output: Path, study: str) -> Plan:
    return Plan.model_validate(record_of(output, study).plan)


def test_the_plan_is_that_of_a_full_search(profile: Path, output: Path, tmp_path: Path) -> None:
    found, whole = plan_of(output, "second"), removal_order(Workbench(profile, MODEL, tmp_path), "second")
    assert found.components == whole.components
    assert [removal.stage for removal in found.removals] == [0, 0, 1, 1]
    assert found.scores[:3] == plan_of(output, "first").scores[:3]
    assert found.scores == pytest.approx(whole.scores, rel=1e-6)
    assert (found.stages, found.model, found.calibration) == (whole.stages, whole.model, whole.calibration)
    for count in ("passes", "layer_runs"):
        assert 0 < found.provenance[count] < whole.provenance[count]
    assert not list(output.rglob("*.part"))


def test_the_record_says_what_was_taken_over(output: Path) -> None:
    origin = record_of(output, "first")
    expected = {"study": "first", "removals": 2, "checksum": records.checksum(origin)}
    assert plan_of(output, "second").provenance["taken_over"] == expected
    assert "taken_over" not in plan_of(output, "first").provenance
    assert "taken_over" not in plan_of(output, "unlike").provenance


def test_a_search_that_lacks_a_count_can_be_taken_over(profile: Path, output: Path, tmp_path: Path) -> None:
    record = record_of(output, "first")
    assert record.plan is not None
    provenance = {name: value for name, value in record.plan["provenance"].items() if name != "layer_runs_reused"}
    records.write(tmp_path, record.model_copy(update={"plan": {**record.plan, "provenance": provenance}}))
    plan, expected = removal_order(Workbench(profile, MODEL, tmp_path), "second"), plan_of(output, "second")
    assert plan.provenance["taken_over"]["removals"] == 2
    assert plan.components == expected.components
    assert plan.provenance["layer_runs_reused"] == expected.provenance["layer_runs_reused"]


def with_changes(request: Request, part: str, changes: dict[str, Any]) -> Request:
    return request.model_copy(update={part: getattr(request, part).model_copy(update=changes)})


def test_nothing_is_taken_from_a_search_with_other_settings(output: Path) -> None:
    record = record_of(output, "second")
    request = Request(**{name: getattr(record, name) for name in Request.model_fields})
    stages = [Stage(**stage) for stage in STUDIES["second"]]
    assert taken_over(request, stages, output) is not None
    data = request.data["calibration"].model_copy(update={"fingerprint": "0" * 64})
    for other in (
        with_changes(request, "model", {"fingerprint": "0" * 64}),
        with_changes(request, "model", {"dtype": "bfloat16"}),
        request.model_copy(update={"data": {"calibration": data}}),
        request.model_copy(update={"spec": {**request.spec, "calibration": {"seed": 7}}}),
        request.model_copy(update={"spec": {**request.spec, "metric": "kl"}}),
    ):
        assert taken_over(other, stages, output) is None
    assert taken_over(request, [Stage("mamba_block", 2)], output) is None


@pytest.mark.parametrize(
    ("asked", "taken"),
    [
        ({}, 2),
        ({"samples": 4}, 2),
        ({"samples": 5}, 0),
        ({"metric": "kl"}, 0),
        ({"one_shot": True}, 0),
        ({"per": "bytes"}, 0),
    ],
)
def test_what_will_be_taken_over_follows_from_the_settings(profile: Path, asked: dict[str, Any], taken: int) -> None:
    settings = profiles.load(profile)
    strategies = {
        name: Strategy(stages=STUDIES["second"][:steps], rows={MODEL: ()}, **asked)
        for name, steps in (("shorter", 1), ("longer", 2))
    }
    settings = settings.model_copy(update={"beyond": strategies})
    assert removals_before(settings, MODEL, "shorter", ["unlike", "first"]) == taken
    assert removals_before(settings, MODEL, "longer", []) == 0
    assert removals_before(settings, MODEL, "longer", ["unlike", "shorter"]) == 2


def test_what_was_weighed_by_time_or_beside_other_kinds_is_not_taken_over(profile: Path) -> None:
    stages = STUDIES["second"]
    strategies = {
        f"{per}_{steps}": Strategy(per=per, stages=stages[:1] * steps, rows={MODEL: ()})
        for per in ("bytes", "decode")
        for steps in (1, 2)
    }
    strategies["other_kinds"] = Strategy(
        per="bytes", stages=[*stages[:1], {"kinds": ["heads"], "steps": 1, "group": 2}], rows={MODEL: ()}
    )
    settings = profiles.load(profile).model_copy(update={"beyond": strategies})
    assert removals_before(settings, MODEL, "bytes_2", ["bytes_1"]) == 2
    assert removals_before(settings, MODEL, "decode_2", ["decode_1"]) == 0
    assert removals_before(settings, MODEL, "other_kinds", ["bytes_1", "bytes_2"]) == 0


@pytest.mark.parametrize(
    ("first", "second", "shared"),
    [
        ([Stage("ssm", 4)], [Stage("ssm", 7)], 4),
        ([Stage("ssm", 7)], [Stage("ssm", 4), Stage("mha", 2)], 4),
        ([Stage("ssm", 4), Stage("mha", 3)], [Stage("ssm", 4), Stage("mha", 2)], 6),
        ([Stage("ssm", 4)], [Stage(["ssm", "mha"], 4)], 0),
        ([Stage("mlp_channels", 4, group=32)], [Stage("mlp_channels", 4, group=64)], 0),
        ([Stage("mha", 1), Stage("ssm", 4)], [Stage("ssm", 4)], 0),
    ],
)
def test_searches_share_removals_as_long_as_their_stages_agree(
    first: list[Stage], second: list[Stage], shared: int
) -> None:
    assert shared_removals(first, second) == shared_removals(second, first) == shared
