"""What the paper did not ask, from synthetic records: every number in its cell, and rivals, verdicts and agreement."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from world import POCKET, World

from shedder_utils import DataError, ProfileError, profiles, records, report
from shedder_utils.plan import Plan, Removal, Stage
from shedder_utils.profiles import Certainty, Pareto, Strategy
from shedder_utils.records import Metric
from shedder_utils.report import beyond
from shedder_utils.report.beyond import Point
from shedder_utils.report.pareto import frontier
from shedder_utils.savings import Savings
from shedder_utils.schedule import steps
from shedder_utils.statistics import packed

MODEL = "pocket-mamba2"
BEYOND = {
    "kl": Strategy(metric="kl", stages=({"kinds": ["mamba_block"], "steps": 5},), rows={MODEL: (5,)}),
    "joint": Strategy(per="decode", stages=({"kinds": ["mamba_block", "ssm"], "steps": 6},), rows={MODEL: (3, 6)}),
}
CERTAINTY = Certainty(
    models=(MODEL,), kind="mamba_block", steps=2, sources={"a": 8, "b": 1}, sequences=(2, 4), seeds=(1, 2),
    sequence_length=64, batch_size=2,
)  # fmt: skip
PARETO = Pareto(
    model=MODEL, studies=("block_pruning", "ssm_pruning", "kl", "joint"), prompt_tokens=8, new_tokens=2, batches=2
)
PROFILE = POCKET.model_copy(update={"beyond": BEYOND, "certainty": CERTAINTY, "pareto": PARETO})
SPEEDUPS = {"block_pruning/3": 1.2, "block_pruning/5": 1.4, "ssm_pruning/6": 1.1, "ssm_pruning/8": 1.15,
            "ssm_pruning/9": 1.2, "kl/5": 1.4, "joint/3": 1.2, "joint/6": 1.5}  # fmt: skip


@pytest.fixture
def world(tmp_path: Path) -> World:
    """Joint search loses nothing, blocks two points each, SSMs one, and blocks by divergence three."""
    loss = {("block_pruning", MODEL): 0.02, ("ssm_pruning", MODEL): 0.01, ("kl", MODEL): 0.03, ("joint", MODEL): 0.0}
    world = World(tmp_path / "runs", PROFILE, loss=loss).write()
    savings = Savings(unit="decode", whole=10.0, each={f"mamba_block:{n}": 0.5 for n in range(25)})
    for study, strategy in BEYOND.items():
        plan = world.plan(study, MODEL)
        if strategy.per:
            plan.provenance["per"] = savings.model_dump()
        world.store(study, MODEL, "search", plan=plan)
        for n in strategy.rows[MODEL]:
            world.store(study, MODEL, f"{n:02d}_removed", n, world.metrics(study, MODEL, n))
    return world


def timed(world: World, changed: str = "") -> World:
    """The record of the times, taken of the plans that are there but for one."""
    metrics = {"dense/decode/seconds": Metric(value=0.010)}
    for name, value in {"dense": 1.0, **SPEEDUPS}.items():
        for phase in ("prefill", "decode"):
            parts = {
                "speedup": value,
                "low": value - 0.02,
                "high": value + 0.02,
                "ideal": value,
                "seconds": 0.01 / value,
            }
            metrics |= {f"{name}/{phase}/{part}": Metric(value=v) for part, v in parts.items()}
    orders = {name: _order(world, name) for name in SPEEDUPS}
    orders |= {changed: ["mamba_block:0"]} if changed else {}
    record = records.read(world.store("pareto", MODEL, "speed", metrics=metrics))
    records.write(world.root, record.model_copy(update={"spec": {"orders": orders}}))
    return world


def _order(world: World, name: str) -> list[str]:
    study, _, n = name.partition("/")
    return [str(component) for component in world.plan(study, MODEL).components[: int(n)]]


def frame(name: str, world: World, tmp_path: Path) -> Any:
    table = report.table(name, PROFILE, world.root, tmp_path / "none")
    return table.frame[table.frame["source"] == "yours"].reset_index(drop=True)


def test_every_strategy_stands_beside_its_time(world: World, tmp_path: Path) -> None:
    found = frame("strategies", timed(world), tmp_path)
    assert list(found["study"]) == ["dense", *(name.partition("/")[0] for name in SPEEDUPS)]
    assert list(found["decode"]) == [1.0, *SPEEDUPS.values()]
    assert found["decode_low"][1] == pytest.approx(1.18)
    dense, kl = found.iloc[0], found[found["study"] == "kl"].iloc[0]
    assert kl["average"] == pytest.approx(dense["average"] - 15)
    assert kl["chosen_by"] == "divergence from the dense model"
    assert kl["share"] == pytest.approx(5 * 50_000 / 2_000_000)
    text = report.table("strategies", PROFILE, world.root, world.root).to_markdown()
    assert "| Mamba blocks & SSMs | perplexity, per decode time saved | 6 | recorded |" in text


def test_times_of_another_order_do_not_count(world: World, tmp_path: Path) -> None:
    found = frame("strategies", timed(world, changed="kl/5"), tmp_path).set_index("study")
    assert math.isnan(found.loc["kl", "decode"])
    assert found.loc["kl", "average"] > 0
    assert not found.drop("kl")["decode"].isna().any()


def test_the_joint_search_meets_the_best_single_kind_that_is_as_fast(world: World, tmp_path: Path) -> None:
    first, last = frame("joint", timed(world), tmp_path).to_dict("records")
    assert (first["rival"], first["verdict"]) == ("block_pruning: 3", "ahead")  # nine SSMs are as fast, and lose more
    assert first["difference"] == pytest.approx(6)
    assert first["predicted"] == pytest.approx(10 / 8.5)
    assert (first["measured"], first["low"], first["high"]) == pytest.approx((1.2, 1.18, 1.22))
    assert (last["rival"], last["verdict"]) == ("–", "no rival")
    world.loss[("joint", MODEL)] = 0.05
    world.store("joint", MODEL, "03_removed", 3, world.metrics("joint", MODEL, 3))
    assert frame("joint", world, tmp_path)["verdict"][0] == "behind"
    world.loss[("joint", MODEL)] = 0.02
    world.store("joint", MODEL, "03_removed", 3, world.metrics("joint", MODEL, 3))
    assert frame("joint", world, tmp_path)["verdict"][0] == "not told apart"


def test_two_models_are_compared_on_the_same_items() -> None:
    def scored(n_right: int) -> Point:
        hits = [float(item < n_right) for item in range(100)]
        average = Metric(value=n_right, stderr=5.0, n=100, items=packed(hits))
        return Point("joint", 3, {"average": average}, share=None, times={}, seconds=None)

    found = beyond._against(scored(60), scored(50))
    assert found["error"] == pytest.approx(100 * math.sqrt(0.1 * 0.9 / 99))
    assert found["verdict"] == "ahead"  # as independent, ten points would be less than two standard errors


def test_orders_are_compared_across_draws_sizes_and_texts(world: World, tmp_path: Path) -> None:
    orders = {"a-2-1": "0123", "a-2-2": "0132", "a-4-1": "0123", "a-4-2": "0123", "b-2-1": "3210", "b-2-2": "3210",
              "b-4-1": "3210"}  # fmt: skip
    for number, (name, order) in enumerate(orders.items()):
        removals = [Removal(component=f"mamba_block:{index}", score=1.0) for index in order[:2]]
        plan = Plan(
            removals=removals, stages=[Stage("mamba_block", 2)], provenance={"ties_within_error": [{}] * number}
        )
        metrics = {f"alone/mamba_block:{index}": Metric(value=place) for place, index in enumerate(order)}
        metrics["prose/perplexity"] = Metric(value=10.0 + number)
        world.store("certainty", MODEL, name, metrics=metrics, plan=plan)
    found = frame("certainty", world, tmp_path).set_index("compared")
    assert dict(found["pairs"]) == {"another draw": 3, "another size": 3, "another text": 6}
    assert found.loc["another draw", "spearman"] == pytest.approx((0.8 + 1 + 1) / 3)
    assert found.loc["another draw", "low"] == pytest.approx(0.8)
    assert found.loc["another size", "shared"] == 1
    assert found.loc["another text", "high"] < 0
    assert found.loc["another text", "shared"] == 0
    left = frame("spread", world, tmp_path).set_index(["text", "sequences"])
    assert left.loc[("a", 2), ["mean", "least", "most", "ties"]].tolist() == [10.5, 10, 11, 0.5]
    assert left.loc[("a", 2), "std"] == pytest.approx(math.sqrt(0.5))
    assert left.loc[("b", 4), "n"] == 1


def test_nothing_run_shows_as_not_run(tmp_path: Path) -> None:
    for name in ("strategies", "joint", "certainty", "spread"):
        assert "–" in report.table(name, PROFILE, tmp_path, tmp_path).to_markdown()
        with pytest.raises(DataError, match="profile pocket has no"):
            report.table(name, POCKET, tmp_path, tmp_path)
    assert report.figure("pareto", PROFILE, tmp_path).records == ()


def test_the_figure_names_what_it_draws_and_joins_what_is_not_beaten(world: World) -> None:
    drawing = report.figure("pareto", PROFILE, timed(world).root)
    assert len(drawing.records) == 1 + 1 + len(SPEEDUPS)
    values = {"a": (0.1, 50), "b": (0.2, 40), "c": (0.2, 60), "d": (0.3, 55), "e": (0.4, 61)}
    shown = [
        Point(name, 1, {"average": Metric(value=average)}, None, {}, seconds)
        for name, (seconds, average) in values.items()
    ]
    assert [point.study for point in frontier(shown)] == ["a", "c", "e"]


def test_every_run_is_a_step_once() -> None:
    places = [step.place for step in steps(PROFILE, [MODEL], ["kl", "joint", "certainty", "pareto"])]
    assert len(set(places)) == len(places)
    assert {("joint", MODEL, "savings"), ("joint", MODEL, "06_removed"), ("pareto", MODEL, "speed")} <= set(places)
    assert ("kl", MODEL, "savings") not in places
    assert sum(place[0] == "certainty" for place in places) == 2 * 2 * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beyond": {"x": {"per": "flops", "stages": [], "rows": {}}}}, "per 'flops': expected one of parameters"),
        ({"beyond": {"x": {"stages": [], "rows": {"smoke-mamba": [1]}}}}, "up to 0 steps"),
        ({"beyond": {"x": {"stages": [], "rows": {}, "table": 1}}}, "unknown key 'table'"),
        ({"pareto": {"model": "smoke-mamba", "studies": ["joint_decode"], "prompt_tokens": 1, "new_tokens": 2,
                     "batches": 1}}, "pareto: no study 'joint_decode' of a model 'smoke-mamba'"),
    ],
)  # fmt: skip
def test_mistakes_in_a_profile_are_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    import yaml

    content = yaml.safe_load((profiles.FOLDER / "smoke.yaml").read_text())
    file = tmp_path / "wrong.yaml"
    file.write_text(yaml.safe_dump({**content, **change}))
    with pytest.raises(ProfileError) as error:
        profiles.load(file)
    assert message in str(error.value)
