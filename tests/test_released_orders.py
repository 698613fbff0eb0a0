"""The orders that the paper's authors released, scored without a search: what is run, recorded and shown of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from world import POCKET, World

from shedder_utils import DataError, Plan, ProfileError, paper, profiles, records, removed, report, studies
from shedder_utils.inventory import ratio
from shedder_utils.profiles import ReleasedOrder
from shedder_utils.report import glance
from shedder_utils.schedule import steps
from shedder_utils.shapes import without_weights
from shedder_utils.workbench import Workbench

ORDERS = profiles.load("paper").released
OWN = (
    ReleasedOrder(order="mamba-2.8b", model="pocket-mamba", table=1, rows={7: 7, 14: 14}),
    ReleasedOrder(order="mamba2-2.7b", model="pocket-mamba2", table=2, rows={22: None}),
)
PROFILE = POCKET.model_copy(update={"released": OWN})
MODEL = "smoke-mamba2"


def store(world: World, order: ReleasedOrder, n_removed: int, plan: Plan) -> None:
    """The record of the scores after n removals of a plan: those of the study of blocks after two."""
    metrics = world.metrics("block_pruning", order.model, 2)
    record = records.read(world.store("released", order.model, order.setting(n_removed), metrics=metrics))
    facts = record.model.model_copy(update={"removals": tuple(map(str, plan.first(n_removed).gone))})
    records.write(world.root, record.model_copy(update={"model": facts}))


@pytest.mark.parametrize("order", ORDERS, ids=lambda order: order.order)
def test_the_orders_fit_the_papers_models_and_its_ratios(order: ReleasedOrder) -> None:
    model = without_weights(profiles.load("paper").models[order.model])
    for n_removed, stands_for in order.rows.items():
        gone = order.plan.first(n_removed).gone
        with removed(model, gone):
            assert model.num_parameters() > 0
        if order.table == 3:
            assert round(100 * ratio(model, gone), 2) == stands_for


def test_every_row_is_a_run_and_only_the_papers_profile_has_them() -> None:
    profile = profiles.load("paper")
    places = ["/".join(step.place) for step in steps(profile, studies=["released"])]
    assert places[:2] == ["released/mamba-2.8b/mamba-2.8b_07_removed", "released/mamba-2.8b/mamba-2.8b_14_removed"]
    assert len(set(places)) == sum(len(order.rows) for order in ORDERS) == 12
    assert {order.order for order in ORDERS} == set(paper.plans())
    assert "released" in profile.study_names
    assert not any("released" in profiles.load(name).study_names for name in ("pocket", "smoke", "laptop"))


def test_an_order_is_scored_as_the_rows_of_the_search_that_finds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Workbench("smoke", MODEL, tmp_path)
    rows, found = studies.pruning(bench, "ssm_pruning"), studies.removal_order(bench, "ssm_pruning")
    monkeypatch.setattr(paper, "plan", lambda name: found)
    monkeypatch.setattr(studies, "search", lambda *_, **__: pytest.fail("searched"))
    order = ReleasedOrder(order="mamba2-2.7b", model=MODEL, table=2, rows={1: None, 2: None})
    profile = profiles.load("smoke").model_copy(update={"released": (order,)})
    scored = studies.released_orders(Workbench(profile, MODEL, tmp_path))
    assert [one.metrics for one in scored.values()] == [rows[1].metrics, rows[2].metrics]
    assert [one.model for one in scored.values()] == [rows[1].model, rows[2].model]
    assert [(one.study, one.model.name, one.setting) for one in scored.values()] == [
        step.place for step in steps(profile, studies=["released"])
    ]
    monkeypatch.setattr(studies, "evaluate", lambda *_, **__: pytest.fail("ran again"))
    assert studies.released_orders(Workbench(profile, MODEL, tmp_path)) == scored
    with pytest.raises(ProfileError, match="study released is not about smoke-mamba in profile smoke"):
        studies.released_orders(Workbench(profile, "smoke-mamba", tmp_path))


def test_what_the_authors_published_stands_beside_yours(tmp_path: Path) -> None:
    world = World(tmp_path / "runs", PROFILE)
    for order in OWN:
        for n_removed in order.rows:
            store(world, order, n_removed, order.plan)
    frame = report.table("released", PROFILE, world.root, tmp_path / "none").frame.set_index(["count", "column"])
    average = frame.loc[(7, "average")]
    assert (average["paper"], average["release"]) == (57.7, 57.8)
    assert average["difference"] == pytest.approx(average["yours"] - 57.8)
    assert average["yours"] == pytest.approx(100 * (0.8 - 2 * 0.01))
    assert average["verdict"] == "differs"
    assert frame.loc[(22, "ppl"), "release"] == pytest.approx(6.498, abs=1e-3)
    assert frame["paper"].isna().to_dict()[(22, "average")]
    assert frame["recorded"].isna().all()
    shown = glance.released(PROFILE, world.root, world.root)
    assert shown is not None
    assert shown.rows[1][:8] == ("mamba-2.8b", "Mamba blocks", "7", "Average", "57.7", "57.8", *shown.rows[1][7:8] * 2)
    assert len(shown.records) == len(shown.recorded) == 3
    lean = PROFILE.model_copy(update={"studies": {}, "speed": None, "recovery": None})
    assert tmp_path / "shown" / "table_released.csv" in report.build(lean, world.root, world.root, tmp_path / "shown")


def test_scores_of_other_removals_do_not_count(tmp_path: Path) -> None:
    world, order = World(tmp_path, PROFILE), OWN[0]
    store(world, order, 7, Plan.from_released({"pruned_mamba_block_idx": list(range(14))}))
    assert set(report.table("released", PROFILE, tmp_path, tmp_path).frame["verdict"]) == {"not run"}


def test_the_papers_numbers_are_those_of_the_release_to_rounding(tmp_path: Path) -> None:
    frame = report.table("released", "paper", tmp_path, tmp_path).frame
    off = (frame["paper"] - frame["release"]).abs()
    assert off[frame["column"] == "ppl"].max() < 0.01
    assert off[frame["column"] == "average"].max() < 0.11
    alone = frame[frame["release"].isna()]
    assert list(alone["paper"]) == [5.45, 66.3, 7.39, 62.3]  # of zamba2-2.7b, before its SSMs go


def test_a_profile_without_orders_has_no_table_of_them(tmp_path: Path) -> None:
    assert glance.released(POCKET, tmp_path, tmp_path) is None
    with pytest.raises(DataError, match="profile pocket has no 'released' that names orders"):
        report.table("released", POCKET, tmp_path, tmp_path)
