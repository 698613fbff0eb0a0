"""Cost-aware search: the rule by hand, fast against plain, budgets, what a component saves, and the command line."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_model
from test_commands import TEXT, call, run, tiny  # noqa: F401
from transformers import PreTrainedModel

from shedder_utils import (
    Calibration,
    Component,
    Plan,
    PlanError,
    Stage,
    component_costs,
    components,
    distributed,
    extract,
    perplexity,
    records,
    removed,
    search,
    studies,
    weighing_study,
)
from shedder_utils.benchmark import Timings
from shedder_utils.candidates import removals
from shedder_utils.commands import weighing
from shedder_utils.component_costs import alike
from shedder_utils.components import Cut, cuts
from shedder_utils.costs import costs
from shedder_utils.errors import BudgetMissedError
from shedder_utils.families import random_model as random_family
from shedder_utils.resuming import resumed
from shedder_utils.savings import Budget, Savings, standing, wanted
from shedder_utils.workbench import Workbench

POOL = ("mamba_block", "ssm")


def weighed(model: PreTrainedModel, block: float = 3.0, ssm: float = 1.0, unit: str = "decode") -> Savings:
    """Savings that differ by kind."""
    each = {"mamba_block": block, "ssm": ssm}
    return Savings(unit=unit, whole=40.0, each={str(c): each[c.kind] for c in components(model)})


def without_cost(plan: Plan) -> dict[str, Any]:
    """A plan's content, with what was saved but without how much work it was."""
    kept = {name: plan.provenance.get(name) for name in ("per", "until", "saved", "ties_within_error")}
    return {**plan.model_dump(exclude={"provenance"}), **kept}


def test_each_choice_is_the_lowest_rise_for_what_it_saves(model: PreTrainedModel, calibration: Calibration) -> None:
    per = weighed(model)
    plan = search(model, calibration, Stage(POOL, 3), method="plain", per=per, progress=False)
    gone: list[Component] = []
    before = perplexity(model, calibration)
    for removal in plan.removals:
        found = {}
        for candidate in components(model):
            held = any(candidate.within(other) or other.within(candidate) for other in gone)
            if candidate not in gone and not held:
                with removed(model, [*gone, candidate]):
                    score = perplexity(model, calibration)
                saving = per.each[str(candidate)]
                rise = math.log(score / before)
                free = rise <= 0
                found[candidate] = ((0, -saving, rise) if free else (1, rise / saving, 0.0)), score
        best = min(found, key=lambda candidate: found[candidate][0])
        assert removal.component == best
        assert removal.score == found[best][1]
        gone.append(best)
        before = removal.score
    assert plan.provenance["per"]["unit"] == "decode"
    assert plan.provenance["saved"]["decode"] == [per.of(plan.first(n).gone) for n in (1, 2, 3)]


def test_fast_finds_the_plan_of_plain(model: PreTrainedModel, calibration: Calibration) -> None:
    for per, memory_gib in ((weighed(model), 1.0), (weighed(model, ssm=20.0), 1e-4)):
        options: dict[str, Any] = {"stages": Stage(POOL, 3), "per": per, "progress": False}
        plain = search(model, calibration, method="plain", **options)
        assert without_cost(search(model, calibration, memory_gib=memory_gib, **options)) == without_cost(plain)


def test_blocks_ssms_attention_mlps_and_channels_share_one_pool() -> None:
    model = random_family(family="zamba2", layers=4, hidden_size=32, seed=0, vocab_size=60)
    pool = ("mamba_block", "ssm", "mha", "mlp", "mlp_channels")
    weights = {"mamba_block": 3.0, "ssm": 1.0, "mha": 2.0, "mlp": 4.0, "mlp_channels": 1 / 64}
    each = {str(component): weights[component.kind] for component in components(model, pool)}
    per = Savings(unit="decode", whole=40.0, each=each, parts={"mlp_channels": 128})
    ids = torch.randint(0, 60, (4, 12), generator=torch.Generator().manual_seed(1))
    options: dict[str, Any] = {"stages": Stage(pool, 4, group=64), "per": per, "progress": False}
    plain, fast = (search(model, Calibration([ids]), method=method, **options) for method in ("plain", "fast"))
    assert without_cost(fast) == without_cost(plain)
    assert plain.provenance["saved"]["decode"][-1] == per.of(plain.gone)


def test_fast_settles_candidates_that_rounding_cannot_tell_apart(calibration: Calibration) -> None:
    model = random_model("mamba")
    for layer in model.backbone.layers:  # blocks that add nothing: all are free, and what saves most goes first
        layer.mixer.out_proj.weight.data.zero_()
    per = weighed(model, block=1.0, ssm=2.0)
    per = per.model_copy(update={"each": {**per.each, "ssm:4": 3.0}})
    for method in ("plain", "fast"):
        plan = search(model, calibration, Stage(POOL, 3), method=method, per=per, progress=False)
        assert [str(component) for component in plan.components] == ["ssm:4", "ssm:0", "ssm:1"]


def test_equal_savings_are_the_papers_search(model: PreTrainedModel, calibration: Calibration) -> None:
    per = Savings(unit="bytes", whole=9.0, each={str(c): 1.0 for c in components(model)})
    by_cost, plain = (
        search(model, calibration, Stage(POOL, 3), progress=False, **options) for options in ({"per": per}, {})
    )
    assert by_cost.removals == plain.removals
    assert by_cost.provenance["ties_within_error"] == plain.provenance["ties_within_error"]


def test_free_candidates_go_before_any_that_cost() -> None:
    ranks = {
        "free, saves more": standing(-0.01, 2.0),
        "freer, saves less": standing(-0.5, 1.0),
        "costs": standing(1e-9, 1e9),
    }
    assert sorted(ranks, key=ranks.__getitem__) == list(ranks)
    assert standing(math.inf, 1.0) > standing(5.0, 1e-9)


def test_what_saves_nothing_stays(calibration: Calibration) -> None:
    model = random_model("mamba2")
    plan = search(model, calibration, Stage(POOL, 3), per=weighed(model, ssm=0.0), progress=False)
    assert {component.kind for component in plan.components} == {"mamba_block"}
    with pytest.raises(PlanError, match="none of the 6 candidates that are left saves any decode"):
        search(model, calibration, Stage("ssm", 1), per=weighed(model, ssm=-0.1), progress=False)


def test_channels_count_by_how_many_go() -> None:
    savings = Savings(unit="bytes", whole=100.0, each={"mlp_channels:2": 0.5, "mlp:1": 7.0}, parts={"mlp_channels": 32})
    narrow = [Cut(Component("mlp_channels", 2), 24), Cut(Component("mlp", 1))]
    assert savings.of(narrow) == 8 * 0.5 + 7.0
    assert savings.further([], narrow[0]) == savings.further(narrow, Cut(Component("mlp_channels", 2), 16)) == 4.0
    assert savings.speedup(narrow) == pytest.approx(100 / 89)
    with pytest.raises(PlanError, match="ssm:0 has no saving in bytes"):
        savings.of([Cut(Component("ssm", 0))])


@pytest.mark.parametrize(("text", "least"), [("decode 20%", 8.0), ("decode 1.25x", 8.0), ("decode 5%", 2.0)])
def test_a_budget_ends_the_search_as_soon_as_it_is_reached(calibration: Calibration, text: str, least: float) -> None:
    model = random_model("mamba2")
    savings = weighed(model)
    settings: dict[str, Any] = {"per": savings, "until": Budget(text=text, savings=savings), "progress": False}
    plan = search(model, calibration, Stage(POOL, 6), **settings)
    assert savings.of(plan.gone) >= least > savings.of(plan.first(len(plan) - 1).gone)
    with pytest.raises(PlanError, match=r"is not reached, 1 removals save \d+\.\d% of the decode: allow more steps"):
        search(model, calibration, Stage("ssm", 1), **settings)


def test_a_budget_may_count_what_the_choice_does_not(calibration: Calibration) -> None:
    model = random_model("mamba2")
    budget = Budget(text="bytes 10%", savings=weighed(model, 5.0, 1.0, "bytes"))
    plan = search(model, calibration, Stage(POOL, 6), until=budget, progress=False)
    unbound = search(model, calibration, Stage(POOL, len(plan)), progress=False)
    assert plan.removals == unbound.removals
    assert list(plan.provenance["saved"]) == ["bytes"]


@pytest.mark.parametrize(
    "text", ["", "10%", "decode", "decode 10", "flops 10%", "decode 0.9x", "bytes 0%", "bytes 100%"]
)
def test_malformed_budgets_are_refused(text: str) -> None:
    with pytest.raises(PlanError, match="is malformed: expected one of parameters, bytes, prefill, decode"):
        wanted(text)
    with pytest.raises(PlanError, match="is malformed"):
        Budget(text=text, savings=Savings(unit="decode", whole=1.0, each={}))


def test_a_budget_in_another_unit_than_its_savings_is_refused() -> None:
    with pytest.raises(PlanError, match="budget 'bytes 10%' is in bytes, the savings are in decode"):
        Budget(text="bytes 10%", savings=Savings(unit="decode", whole=1.0, each={}))


def test_a_checkpoint_of_other_savings_is_refused(calibration: Calibration, tmp_path: Path) -> None:
    model, file = random_model("mamba2"), tmp_path / "plan.json"
    settings: dict[str, Any] = {"stages": Stage(POOL, 2), "checkpoint": file, "progress": False}
    whole = search(model, calibration, per=weighed(model), **settings)
    assert search(model, calibration, per=weighed(model), **settings) == whole == Plan.load(file)
    for other in ({"per": weighed(model, 2.0)}, {}, {"per": weighed(model, unit="prefill")}):
        with pytest.raises(PlanError, match="of another search: per is decode"):
            search(model, calibration, **other, **settings)
    with pytest.raises(PlanError, match="metric 'kl' cannot be weighed against decode"):
        search(model, calibration, Stage(POOL, 2), per=weighed(model), metric="kl", progress=False)


@pytest.mark.parametrize("family", ["mamba2", "zamba2"])
def test_counted_savings_are_what_extraction_saves(family: str) -> None:
    model = random_family(family=family, layers=4, hidden_size=32, seed=0, vocab_size=60)
    there = {component.kind for component in components(model)}
    kinds = [kind for kind in ("mamba_block", "hymba_block", "ssm", "mha", "mlp_channels") if kind in there]
    found = component_costs.savings(model, kinds, ["parameters", "bytes"], prompt_tokens=16)
    assert found["bytes"].whole == costs(model, 16).decode_bytes
    for group in alike(model, kinds, 16):
        cut = Cut(group[-1], found["bytes"].parts.get(group[-1].kind, 0) // 2)
        plan = Plan(removals=[{"component": cut.component, "kept": cut.kept or None}])
        saved = found["bytes"].whole - costs(extract(model, plan), 16).decode_bytes
        assert found["bytes"].of([cut]) == pytest.approx(saved, rel=1e-9), cut
        assert found["parameters"].of([cut]) > 0


def test_layers_that_compute_differently_are_weighed_apart() -> None:
    model = random_family(family="hymba", layers=6, hidden_size=32, seed=0, vocab_size=60)
    apart = {frozenset(c.index for c in group) for group in alike(model, ["attention"], 64)}
    globally = {index for index in range(6) if model.config.is_global(index)}
    assert all(group <= globally or not group & globally for group in apart)


@pytest.mark.parametrize("unit", ["bytes", "decode"])
def test_a_class_that_only_goes_after_others_is_refused_by_name(unit: str) -> None:
    model = random_family(family="hymba", layers=8, hidden_size=32, seed=0, vocab_size=60)
    model.config.all_blocks_removable = True
    with pytest.raises(
        PlanError, match=r"hymba_block:\d.* cannot be weighed, none.*reuses its keys and values"
    ) as found:
        component_costs.savings(model, ["hymba_block"], [unit], progress=False)
    assert "\n" not in str(found.value)
    assert component_costs.savings(model, ["hymba_block"], ["parameters"])["parameters"].each


def test_measured_savings_are_medians_of_paired_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model("mamba2")
    timed_layers: list[int] = []

    def timed(models: dict[str, PreTrainedModel], **_: Any) -> Timings:
        layers = {name: one.config.num_hidden_layers for name, one in models.items()}
        assert list(layers) == ["dense", "variant"]  # no more copies at a time
        timed_layers.append(layers["variant"])
        without_ssms = layers["variant"] == layers["dense"] == 6
        decode = {name: 0.001 + 0.002 * n - 0.003 * (without_ssms and name == "variant") for name, n in layers.items()}
        disturbed = [0.0, 0.0, 1.0]  # one round on a busy machine
        return Timings(
            "dense", {name: {"prefill": [0.06] * 3, "decode": [s + d for d in disturbed]} for name, s in decode.items()}
        )

    monkeypatch.setattr(component_costs, "benchmark", timed)
    found = component_costs.savings(model, POOL, ["decode", "prefill"])
    assert timed_layers == [3, 6]
    assert found["decode"].whole == pytest.approx(0.013)
    assert found["decode"].each["mamba_block:5"] == pytest.approx(0.002)
    assert found["decode"].each["ssm:3"] == pytest.approx(0.001)
    assert found["decode"].text(found["decode"].each["ssm:3"]) == "1.000 ms"
    assert found["decode"].of(cuts(components(model, "mamba_block"))) < found["decode"].whole
    assert set(found["prefill"].each.values()) == {0.0}


def test_a_study_weighs_once_and_searches_by_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Workbench("smoke", "smoke-mamba2", tmp_path)
    found = weighed(bench.model, block=0.3, ssm=0.1)
    monkeypatch.setattr(weighing_study, "savings", lambda *_, **__: {"decode": found})
    plan = studies.removal_order(bench, "joint_decode")
    assert plan.provenance["per"] == found.model_dump()
    monkeypatch.setattr(weighing_study, "savings", lambda *_, **__: pytest.fail("weighed again"))
    monkeypatch.setattr(studies, "search", lambda *_, **__: pytest.fail("searched again"))
    assert studies.removal_order(bench, "joint_decode") == plan
    record = records.read(records.path(tmp_path, "smoke", "joint_decode", "smoke-mamba2", "savings"))
    assert record.metrics["decode/ssm:0/seconds"].value == 0.1


def test_the_command_searches_to_a_budget_and_compares_with_what_is_measured(tiny: Path, tmp_path: Path) -> None:  # noqa: F811
    pool = ["--kinds", "mamba_block, ssm", *TEXT]
    said = run("search", tiny, *pool, "--per", "bytes", "--until", "parameters 4%", "--output", tmp_path / "p.json")
    plan = Plan.load(tmp_path / "p.json")
    assert said["saved"]["parameters"]["share"] >= 0.04
    assert said["saved"]["bytes"] == {
        "whole": plan.provenance["per"]["whole"], "saved": plan.provenance["saved"]["bytes"][-1],
        "share": pytest.approx(said["saved"]["bytes"]["saved"] / said["saved"]["bytes"]["whole"]),
    }  # fmt: skip
    timing = ["--prompt-tokens", "8", "--new-tokens", "6", "--batches", "9"]
    said = run("search", tiny, *pool, "--steps", 1, "--per", "decode", *timing, "--output", tmp_path / "q.json")
    assert set(said["saved"]["decode"]) == {"whole", "saved", "share", "predicted", "measured", "low", "high"}
    assert said["saved"]["decode"]["low"] <= said["saved"]["decode"]["measured"] <= said["saved"]["decode"]["high"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["p.json", "q.json"]


def test_a_search_that_goes_on_keeps_the_savings_it_began_with(tiny: Path, tmp_path: Path) -> None:  # noqa: F811
    options = ["--kinds", "mamba_block, ssm", "--steps", 2, "--per", "bytes", *TEXT, "--output", tmp_path / "p.json"]
    run("search", tiny, *options)
    begun = Plan.load(tmp_path / "p.json").first(1)
    begun.provenance["per"]["whole"] += 1  # as another machine may have weighed it
    begun.save(tmp_path / ".p.json.part")
    run("search", tiny, *options)
    assert Plan.load(tmp_path / "p.json").provenance["per"] == begun.provenance["per"]


def test_a_search_does_not_go_on_with_savings_of_other_timing(tiny: Path, tmp_path: Path) -> None:  # noqa: F811
    options = ["--kinds", "mamba_block, ssm", "--steps", 2, "--per", "bytes", *TEXT, "--output", tmp_path / "p.json"]
    run("search", tiny, *options, "--prompt-tokens", 8)
    begun = Plan.load(tmp_path / "p.json").first(1)
    assert begun.provenance["per"]["timing"] == {"prompt_tokens": 8}
    begun.save(tmp_path / ".p.json.part")
    said, _, _ = call("search", tiny, *options, "--prompt-tokens", 64)
    assert "is of another search: prompt_tokens is 8, expected 64; delete or move it" in said
    run("search", tiny, *options, "--prompt-tokens", 8, "--new-tokens", 2)  # which bytes do not depend on


def test_savings_with_their_timing_identify_a_search() -> None:
    plain = Savings(unit="bytes", whole=9.0, each={})
    assert "timing" not in plain.model_dump()  # in a study they are read from a record, which has it
    plans = [
        Plan(provenance={"per": plain.model_copy(update={"timing": {"prompt_tokens": n}}).model_dump()}) for n in (8, 9)
    ]
    with pytest.raises(PlanError, match="checkpoint part is of another search: per prompt_tokens is 8, expected 9"):
        resumed(*plans, Path("part"))


def test_ranks_without_a_shared_disk_ask_the_first_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, here, nowhere = random_model("mamba2"), tmp_path / ".p.json.part", tmp_path / "nowhere"
    per = weighed(model, unit="bytes")
    Plan(provenance={"per": per.model_dump()}).save(here)
    broadcast: list[Any] = []
    asked = (model, [Stage(POOL, 2)], "perplexity", "bytes", "")
    monkeypatch.setattr(distributed, "on_first", lambda action: broadcast.append(action()) or broadcast[-1])
    assert weighing.rules(*asked, here, {}) == {"per": per}
    monkeypatch.setattr(distributed, "on_first", lambda action: broadcast.pop(0))
    assert weighing.rules(*asked, nowhere, {}) == {"per": per}
    assert not broadcast


def test_a_search_that_missed_its_budget_goes_on_with_more_steps(tiny: Path, tmp_path: Path) -> None:  # noqa: F811
    options = ["--kinds", "mamba_block", "--until", "parameters 8%", *TEXT, "--output", tmp_path / "p.json"]
    said, _, _ = call("search", tiny, *options, "--steps", 1)
    assert "is not reached" in said
    assert len(Plan.load(tmp_path / ".p.json.part")) == 1
    code, _, err = call("search", tiny, *options, "--steps", 4)
    assert not code
    assert "going on from" in err
    assert [file.name for file in tmp_path.iterdir()] == ["p.json"]
    found = Plan.load(tmp_path / "p.json")
    assert run("search", tiny, *options)["scores"] == found.scores


def test_a_search_that_took_all_and_missed_its_budget_leaves_nothing(tiny: Path, tmp_path: Path) -> None:  # noqa: F811
    options = ["--kinds", "mamba_block, ssm", *TEXT, "--output", tmp_path / "p.json"]
    said, _, _ = call("search", tiny, *options, "--until", "parameters 99%")
    assert "is not reached, 4 removals save" in said
    assert not list(tmp_path.iterdir())


def test_a_budget_is_missed_where_nothing_is_left_to_remove(calibration: Calibration) -> None:
    model, stages = random_model("mamba2"), [Stage("mamba_block", 6), Stage("ssm", 1)]
    until = Budget(text="decode 90%", savings=weighed(model))
    with pytest.raises(BudgetMissedError, match=r"'decode 90%' is not reached, 6 removals save 45.0% of the decode"):
        search(model, calibration, stages, until=until, progress=False)


@pytest.mark.parametrize(
    ("kinds", "group", "most"),
    [
        (["mamba_block", "ssm"], 1, 4),
        (["mlp_channels", "mlp"], 32, 3 * 3),
        (["transformer_block", "mha", "mlp"], 1, 3 * 2),
        (["mamba_block", "ssm", "heads", "states"], 2, 4 * (1 + 7)),
        (["mamba_block", "mha"], 1, 4 + 3),
    ],
    ids=str,
)
def test_of_what_lies_in_another_one_only_either_counts(kinds: list[str], group: int, most: int) -> None:
    model = random_family(family="zamba2", layers=4, hidden_size=32, seed=0, vocab_size=60)  # 3 layers are hybrid
    assert removals(model, Stage(kinds, 0, group)) == most


def test_a_search_of_no_steps_has_nothing_to_clear_away(tiny: Path, tmp_path: Path) -> None:  # noqa: F811
    said = run("search", tiny, "--stages", "ssm: 0", "--metric", "random", *TEXT, "--output", tmp_path / "p.json")
    assert said["removals"] == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--kinds", "ssm", "--per", "flops", "--steps", "1"], "savings in 'flops' are unknown"),
        (["--kinds", "ssm", "--until", "decode 3"], "budget 'decode 3' is malformed"),
        (["--kinds", "ssm", "--per", "decode", "--metric", "kl", "--steps", "1"], "metric 'kl' cannot be weighed"),
        (["--stages", "ssm: 9", "--per", "decode"], "9 removals of ssm were asked for, the model has 4"),
        (["--kinds", "ssm"], "how much to remove of ssm: expected --steps or --until"),
        (["--stages", "ssm: 1", "--steps", "2"], "--steps 2 goes with --kinds"),
        (["--stages", "heads: 3 x 0"], "'heads: 3 x 0' takes nothing: expected x 1 or more"),
    ],
)
def test_mistakes_are_one_line(
    tiny: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    message: str,
) -> None:
    monkeypatch.setattr(component_costs, "savings", lambda *_, **__: pytest.fail("weighed before it was refused"))
    said, out, _ = call("search", tiny, *options, *TEXT, "--output", tmp_path / "p.json")
    assert said.startswith("error: ")
    assert message in said
    assert "\n" not in said
    assert not out
