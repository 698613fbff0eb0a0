"""Verdicts on claims about one model and its speed: the paper's own numbers pass the tests, and what does not."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import pytest
from test_report import cell, verdict_of
from world import N_ITEMS, POCKET, World

from shedder_utils import paper, profiles, records, report
from shedder_utils.profiles import Profile
from shedder_utils.records import Metric
from shedder_utils.report import glance
from shedder_utils.report.evidence import Advantage, Verdict

WITHIN_A_MODEL = {
    "C4": ({"zamba2_blocks": 0.1, "zamba2_parts": 0.05, "zamba2_channels_10": 0.005}, {}),
    "C5": ({}, {"zamba2_channels_10": -0.1}),
    "C6": ({"hymba_pruning": 0.05}, {}),
    "C7": ({"falcon_blocks": 0.01, "falcon_ssms": 0.06}, {"falcon_blocks": 0.5, "falcon_ssms": 0.05}),
}


def trained_smoke() -> Profile:
    """The smoke profile, as if its models were trained, and the paper's own."""
    smoke = profiles.load("smoke")
    trained = {own: model.model_copy(update={"random": None, "ref": own}) for own, model in smoke.models.items()}
    return smoke.model_copy(update={"models": trained, "papers_own_models": True})


@pytest.mark.parametrize("name", WITHIN_A_MODEL)
@pytest.mark.parametrize(("sign", "verdict"), [(1, "reproduced"), (-1, "deviates")])
def test_claims_about_one_model_follow_the_numbers(tmp_path, name, sign, verdict):
    profile = trained_smoke()
    loss, rise = ({(study, own): sign * value for study, value in by_study.items() for own in profile.models}
                  for by_study in WITHIN_A_MODEL[name])  # fmt: skip
    World(tmp_path, profile, dense_accuracy=0.6, loss=loss, rise=rise, per_removal=10_000).write()
    found = verdict_of(name, tmp_path, profile)
    assert found.verdict == verdict, found.summary


HYMBA, FIVE = "pocket-hymba", ("hellaswag", "piqa", "arc_easy", "arc_challenge", "winogrande")


def hymba_alone(name: str = "pocket") -> Profile:
    """A profile with Hymba and its table 4 alone."""
    whole = profiles.load(name)
    own = next(own for own, model in whole.models.items() if model.paper == "hymba-1.5b")
    only = {"models": {own: whole.models[own]}, "studies": {"hymba_pruning": whole.studies["hymba_pruning"]},
            "papers_own_models": True, "beyond": {}, "certainty": None, "pareto": None, "speed": None,
            "recovery": None}  # fmt: skip
    return whole.model_copy(update=only)


def hymba_world(root: Path, profile: Profile | None = None, error: float = 0.01, **falls: dict[int, float]) -> World:
    """Hymba alone, all accuracies 0.8, but for falls of some tasks by the number of removals."""
    world = World(root, profile or hymba_alone()).write()
    ((model, rows),) = world.profile.studies["hymba_pruning"].rows.items()
    for n in rows:
        metrics = {}
        for column in world.profile.evaluation.tasks:
            value = 3.0 if column.metric == "perplexity" else 0.8 - falls.get(column.column, {}).get(n, 0.0)
            own = world.profile.metric_of(model, column)
            for metric, score in ((column.metric, 0.99), (own, value)):  # of both, table 4 shows the second
                metrics[f"{column.task}/{metric}"] = Metric(value=score, stderr=error, n=N_ITEMS)
        world.store(*(("hymba_pruning", model, f"{n:02d}_removed") if n else ("dense", model, "scores")), n, metrics)
    return world


def test_hymbas_claim_is_about_the_columns_of_its_table(tmp_path):
    """What LAMBADA and OBQA lose is in no column of table 4: it changes neither the claim's numbers nor its verdict."""
    fall = {3: 0.05, 4: 0.15}
    world = hymba_world(tmp_path, hellaswag=fall, winogrande=fall, lambada_openai={3: 0.7}, openbookqa={3: 0.6})
    frame = report.table(4, world.profile, tmp_path, tmp_path).frame
    averages = [cell(frame, HYMBA, n, "average") for n in (0, 3, 4)]
    shown = [sum(cell(frame, HYMBA, n, column)["yours"] for column in FIVE) / 5 for n in (0, 3, 4)]
    assert [one["yours"] for one in averages] == pytest.approx(shown)
    assert shown == pytest.approx([80, 78, 74])
    found = verdict_of("C6", tmp_path, world.profile)
    assert [number.value for number in found.numbers] == pytest.approx([2, 4])
    errors = [math.hypot(*pair) for pair in pairwise(one["yours_stderr"] for one in averages)]
    assert [n.value - n.low for n in found.numbers] == pytest.approx([1.96 * error for error in errors])
    assert found.verdict == "reproduced", found.summary


def test_hymbas_claim_needs_no_task_beside_its_table(tmp_path):
    world = hymba_world(tmp_path, piqa={3: 0.2, 4: 0.4})
    for n, place in ((0, ("dense", HYMBA, "scores")), (3, ("hymba_pruning", HYMBA, "03_removed"))):
        metrics = records.read(records.path(tmp_path, "pocket", *place)).metrics
        left = {name: metric for name, metric in metrics.items() if "lambada" not in name and "openbookqa" not in name}
        world.store(*place, n, left)
    assert verdict_of("C6", tmp_path, world.profile).verdict == "reproduced"
    assert report.table(4, world.profile, tmp_path, tmp_path).rows[3][-1] == "same"


def test_guessing_is_that_of_the_same_columns(tmp_path):
    dense = {0: 0.41, 3: 0.41, 4: 0.41}  # five tasks at 39 points, by guessing 35
    found = verdict_of("C6", tmp_path, hymba_world(tmp_path, **dict.fromkeys(FIVE, dense)).profile)
    assert found.why == "pocket-hymba is not clearly above chance: dense average 39.0 ± 0.4, chance 35.0."


def test_the_papers_own_table_4_is_steady(tmp_path):
    rows = {row.labels["pruned"]: row.values for row in paper.rows(4)}
    falls = {task: {n: 0.8 - values[task] / 100 for n, values in rows.items()} for task in FIVE}
    profile = hymba_alone("paper")
    profile.models["hymba-1.5b"] = profile.models["hymba-1.5b"].model_copy(update={"shape": None})  # any width will do
    assert set(profile.studies["hymba_pruning"].rows["hymba-1.5b"]) == set(rows)
    found = verdict_of("C6", hymba_world(tmp_path, profile, error=1e-6, **falls).root, profile)
    assert found.verdict == "reproduced"
    assert [number.value for number in found.numbers] == pytest.approx([1.5, 0.6, 1.2], abs=0.05)
    assert "A block costs 0.41 points on average; from row to row: 0.25, 0.58, 1.20." in found.why


@pytest.mark.parametrize(
    ("third", "fourth", "verdict"),
    [(0.09, 0.12, "reproduced"), (0.18, 0.175, "deviates"), (0.01, 0.20, "deviates"), (0.12, 0.13, "close")],
    ids=["even", "all at once, then nothing", "nothing, then all at once", "not clearly uneven"],
)
def test_a_fall_that_is_not_steady_is_no_success(tmp_path, third, fourth, verdict):
    """Average accuracy after three and four removals, with 95 % intervals of ±1.2 points on each step."""
    world = hymba_world(tmp_path, **{task: {3: third, 4: fourth} for task in FIVE})
    found = verdict_of("C6", tmp_path, world.profile)
    assert found.verdict == verdict, found.why
    assert ("That is not steady." in found.why) == (verdict == "deviates")


def test_granularities_are_compared_at_the_same_ratio_only(tmp_path):
    profile = trained_smoke()
    (model,) = profile.studies["zamba2_parts"].rows
    world = World(tmp_path, profile, dense_accuracy=0.6, loss={("zamba2_blocks", model): 0.1}, per_removal=10_000)
    world.write()
    assert [number.counts for number in verdict_of("C4", tmp_path, profile).numbers] == [(1, 1), (2, 2), (3, 1)]
    coarse = World(tmp_path, profile, per_removal=50_000)  # 5 instead of 1 percent
    coarse.store("zamba2_blocks", model, "02_removed", 2, world.metrics("zamba2_blocks", model, 2))
    found = verdict_of("C4", tmp_path, profile)
    assert [number.removed for number in found.numbers] == ["1 removed", "3 and 1 removed"]
    assert found.why.endswith("Left out, as the ratios are not the same: parts at 1.0 % against blocks at 5.0 %.")
    coarse.store("zamba2_blocks", model, "01_removed", 1, world.metrics("zamba2_blocks", model, 1))
    assert verdict_of("C4", tmp_path, profile).numbers
    coarser = World(tmp_path, profile, per_removal=100_000)
    coarser.store("zamba2_blocks", model, "01_removed", 1, world.metrics("zamba2_blocks", model, 1))
    found = verdict_of("C4", tmp_path, profile)
    assert (found.verdict, found.numbers) == ("not run", ())
    assert found.why.startswith("The ratios are not the same: parts at 0.5 % against blocks at 5.0 %;")


def timed(root: Path, name: str, prefill: tuple[float, float, float], decode: tuple[float, float, float]) -> Verdict:
    """The verdict on a claim about speed, from speedups with the ends of their intervals, and a search before them."""
    table, model, n = {"C8": (6, "pocket-mamba", 5), "C9": (7, "pocket-mamba2", 9)}[name]
    world = World(root)
    metrics = {
        f"{n}/{phase}/{what}": Metric(value=value)
        for phase, values in (("prefill", prefill), ("decode", decode))
        for what, value in zip(("speedup", "low", "high"), values, strict=True)
    }
    world.store("speed", model, f"table_{table}", metrics=metrics)
    study = POCKET.speed.tables[table].study
    world.store(study, model, "search", plan=world.plan(study, model))
    return verdict_of(name, root)


@pytest.mark.parametrize("name", ["C8", "C9"])
def test_the_papers_own_speedups_reproduce_it(tmp_path, name):
    row = {"C8": paper.reported(6, pruned=14), "C9": paper.reported(7, pruned=24)}[name]
    prefill, decode = ((value, value - 0.01, value + 0.01) for value in (row["prefill"], row["decode"]))
    found = timed(tmp_path, name, prefill, decode)
    assert found.verdict == "reproduced"
    assert found.why == "Of the paper's gain (speedup less 1), 100 % in prefill and 100 % in decode."
    assert [line.split(":")[0] for line in found.summary] == ["speedup in prefill", "speedup in decode"]


@pytest.mark.parametrize(
    ("decode", "verdict"),
    [
        ((1.12, 1.08, 1.16), "reproduced"),
        ((1.10, 1.08, 1.13), "close"),
        ((1.60, 1.50, 1.70), "close"),
        ((1.08, 1.06, 1.10), "not shown at this scale"),
        ((1.15, 0.99, 1.30), "not shown at this scale"),
    ],
    ids=["reaches 1.2", "half of the gain", "more than the paper's", "less than half", "perhaps none"],
)
def test_a_speedup_is_judged_by_its_gain(tmp_path, decode, verdict):
    assert timed(tmp_path, "C9", (1.2, 1.15, 1.25), decode).verdict == verdict


def test_the_search_behind_a_faster_model_is_evidence_and_cost(tmp_path):
    found = timed(tmp_path, "C8", (1.31, 1.3, 1.32), (1.29, 1.28, 1.3))
    assert [(record.study, record.setting) for record in found.records] == [
        ("block_pruning", "search"), ("speed", "table_6"),
    ]  # fmt: skip
    row = next(row for row in glance.claims(POCKET, tmp_path, tmp_path).rows if row[0] == "C8")
    assert row[-1] == "1", "two runs of half a minute"


def test_both_counts_are_named_where_two_models_have_different_ones(tmp_path):
    whole = profiles.load("pocket")
    World(tmp_path, whole).write()
    numbers = verdict_of("C1", tmp_path, whole).numbers
    named = {number.measure.split(" points, ")[1]: number.removed for number in numbers
             if "points" in number.measure and number.n_removed == 3}  # fmt: skip
    assert named == {
        "pocket-mamba2 minus pocket-mamba": "3 removed", "pocket-zamba2 minus pocket-mamba": "2 and 3 removed"
    }  # fmt: skip
    assert "2 and 3" in report.verdicts(["C1"], whole, tmp_path).frame["counts"].tolist()


def test_the_number_that_tells_is_the_papers_then_the_one_against_then_the_last():
    def number(n: int, low: float, reported: float | None = None) -> Advantage:
        return Advantage("some", n, low + 1, low, low + 2, 0, reported)

    ours, first, against, last = number(9, -5.0), number(3, 1.0, 2.0), number(4, -5.0, 2.0), number(5, 1.0, 2.0)

    def telling(*numbers: Advantage) -> Advantage | None:
        return glance._telling(Verdict("C1", "text", "close", "why", numbers))

    assert telling(ours, first, against, last) == against
    assert telling(ours, first, last) == last
    assert telling(ours, number(3, 1.0)) == ours
    assert telling(last, number(5, 0.5, 3.0)) == number(5, 0.5, 3.0), "of several, the one clearly below the paper's"
    assert telling() is None
