"""The report: every number in its cell, verdicts that follow the numbers, and files that repeat byte for byte."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest
from matplotlib.transforms import Bbox
from world import (
    AS_IN_THE_PAPER,
    BLOCKS_1,
    BLOCKS_2,
    LAYERS,
    N_ITEMS,
    OTHER_WAY_ROUND,
    POCKET,
    RISES_AS_IN_THE_PAPER,
    SSMS_1,
    SSMS_2,
    World,
)

from shedder_utils import paper, profiles, records, report
from shedder_utils.errors import DataError, RecordError
from shedder_utils.files import in_project
from shedder_utils.plan import Plan, Removal
from shedder_utils.pocket.tasks import CHANCE
from shedder_utils.profiles import Profile
from shedder_utils.records import Metric
from shedder_utils.report import glance
from shedder_utils.report.criteria import CRITERIA
from shedder_utils.report.evidence import Advantage
from shedder_utils.report.rendering import escape_latex
from shedder_utils.report.tables import Cell


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path / "runs", loss=AS_IN_THE_PAPER, rise=RISES_AS_IN_THE_PAPER).write()


def cell(frame, model: str, pruned: int, column: str):
    found = frame[(frame["model"] == model) & (frame["pruned"] == pruned) & (frame["column"] == column)]
    assert len(found) == 1
    return found.iloc[0]


def verdict_of(name: str, root: Path, profile: Profile = POCKET):
    return report.verdicts([name], profile, root).items[0]


def test_values_land_in_their_cells_in_the_papers_units(world, tmp_path):
    frame = report.table(1, POCKET, world.root, tmp_path / "none").frame
    piqa = cell(frame, "pocket-mamba2", 3, "piqa")
    assert piqa["paper"] == 73.9
    assert piqa["yours"] == pytest.approx(100 * (0.8 - 0.01 - 3 * 0.06))
    assert piqa["yours_stderr"] == pytest.approx(100 * math.sqrt(0.61 * 0.39 / 400))
    assert (piqa["of"], piqa["stands_for"], piqa["verdict"]) == (24, 7, "not recorded")
    ppl = cell(frame, "pocket-mamba", 5, "ppl")
    assert (ppl["paper"], ppl["yours"]) == (7.51, pytest.approx(3 * math.exp(0.1)))
    ratio = cell(frame, "pocket-mamba", 5, "ratio")
    assert (ratio["paper"], ratio["yours"]) == (20.86, pytest.approx(12.5))


def test_average_is_the_mean_of_seven_with_its_standard_error(world, tmp_path):
    frame = report.table(2, POCKET, world.root, tmp_path / "none").frame
    seven = [cell(frame, "pocket-mamba", 8, column) for column in paper.columns()[1:-1]]
    average = cell(frame, "pocket-mamba", 8, "average")
    assert average["yours"] == pytest.approx(sum(one["yours"] for one in seven) / 7)
    assert average["yours_stderr"] == pytest.approx(math.sqrt(sum(one["yours_stderr"] ** 2 for one in seven)) / 7)
    assert average["paper"] == 47.6


def test_wide_table_has_four_lines_for_each_row_in_the_papers_order(world, tmp_path):
    table = report.table(2, POCKET, world.root, tmp_path / "none")
    assert [row[2] for row in table.rows][:32] == ["paper", "recorded", "yours", "difference"] * 8
    assert [row[1] for row in table.rows[4:8]] == ["16 of 64", "6 of 24", "6 of 24", "6 of 24"]
    assert table.rows[4][:5] == ("mamba-2.8b", "16 of 64", "paper", "9.23", "55.2")
    assert set(table.rows[5][3:-1]) == set(table.rows[7][3:-1]) == {"–"}
    assert table.rows[6][3] == f"{3 * math.exp(1.2):.2f} ± {0.06 * math.exp(1.2):.2f}"
    assert table.rows[6][4] == "47.0 ± 2.5"
    assert table.rows[7][-1] == "not recorded"
    assert all(len(row) == len(table.header) for row in table.rows)


def test_recorded_stands_beside_yours(world, tmp_path):
    World(tmp_path / "results", loss=AS_IN_THE_PAPER | {BLOCKS_1: 0.02}, rise=RISES_AS_IN_THE_PAPER).write()
    table = report.table(1, POCKET, world.root, tmp_path / "results")
    same, near, far = (
        cell(table.frame, *place, "piqa") for place in (("pocket-mamba2", 5), ("pocket-mamba", 3), ("pocket-mamba", 5))
    )
    assert (same["difference"], same["verdict"]) == (0, "same")
    assert (near["difference"], near["verdict"]) == (pytest.approx(3), "within 2 stderr")
    assert (far["difference"], far["verdict"]) == (pytest.approx(5), "differs")
    assert table.rows[7][-1] == "differs: Average"
    assert table.rows[11][-1] == "differs: " + ", ".join(table.header[5:-1])
    assert table.rows[11][3:6] == ("+0.00", "+0.00", "+5.0")
    assert {row[-1] for row in table.rows[15::4]} == {"same"}


@pytest.mark.parametrize(
    ("column", "recorded", "yours", "verdict"),
    [
        ("piqa", Metric(value=70, stderr=2), Metric(value=70.049, stderr=2), "same"),
        ("piqa", Metric(value=70, stderr=2), Metric(value=73.9, stderr=2), "within 2 stderr"),
        ("piqa", Metric(value=70, stderr=2), Metric(value=65.9, stderr=2), "differs"),
        ("ppl", Metric(value=4.0), Metric(value=4.004), "same"),
        ("ppl", Metric(value=4.0), Metric(value=4.006), "differs"),
        ("ppl", Metric(value=math.inf), Metric(value=math.inf), "same"),
        ("ppl", Metric(value=4.0), None, "not run"),
        ("ppl", None, Metric(value=4.0), "not recorded"),
    ],
)
def test_cell_verdict(column, recorded, yours, verdict):
    assert Cell(column, None, recorded, yours).verdict == verdict


def test_nothing_run_is_dashes_and_not_an_error(tmp_path):
    paths = report.build(POCKET, tmp_path / "runs", tmp_path / "results")
    endings = {path.stem: [other.suffix for other in paths if other.stem == path.stem] for path in paths}
    assert {f"table_{n}" for n in (1, 2, 6, 7, 13)} | {f"figure_{n}" for n in (1, 2, 3, 4)} <= set(endings)
    assert all(found[-1] == ".json" for found in endings.values()), "everything has its sidecar"
    assert {tuple(found) for name, found in endings.items() if name.startswith("table")} == {
        (".md", ".csv", ".tex", ".json")
    }
    assert {tuple(found) for name, found in endings.items() if "figure" in name} == {(".png", ".pdf", ".json")}
    assert all(path.stat().st_size and path.parent == tmp_path / "runs" / "figures" / "pocket" for path in paths)
    table = report.table(1, POCKET, tmp_path / "runs", tmp_path / "results")
    assert set(table.frame["verdict"]) == {"not run"}
    assert table.frame["yours"].isna().all()
    verdicts = report.verdicts(None, POCKET, tmp_path).items
    assert [item.id for item in verdicts] == [claim.id for claim in paper.claims()]
    assert {item.verdict for item in verdicts} == {"not run"}
    assert report.provenance(POCKET, tmp_path, "ssm_pruning").rows == (("runs", "–", "–"),)


def test_scores_of_another_order_or_other_weights_do_not_count(world):
    records.path(world.root, "pocket", *BLOCKS_1, "search").unlink()
    frame = report.table(1, POCKET, world.root, world.root).frame
    assert cell(frame, "pocket-mamba", 3, "ppl")["verdict"] == "not run"
    other = Plan(removals=[Removal(component="mamba_block:2")] * 6, dense_score=2.0, model={"layers": LAYERS})
    world.store(*BLOCKS_1, "search", plan=other)
    frame = report.table(1, POCKET, world.root, world.root).frame
    assert cell(frame, "pocket-mamba", 3, "ppl")["verdict"] == "not run"
    assert cell(frame, "pocket-mamba", 0, "ppl")["verdict"] == "same"


def test_broken_record_is_refused(world):
    file = records.path(world.root, "pocket", *SSMS_2, "06_removed")
    file.write_text(file.read_text().replace('"n": 400', '"n": 401'))
    for make in (lambda: report.table(2, POCKET, world.root), lambda: report.build(POCKET, world.root)):
        with pytest.raises(RecordError, match="06_removed"):
            make()


def test_search_record_without_a_plan_is_refused(world):
    world.store(*SSMS_2, "search", metrics={})
    with pytest.raises(RecordError, match="expected the plan"):
        report.figure(4, POCKET, world.root)


def test_claims_hold_when_the_records_are_as_in_the_paper(world):
    found = report.verdicts(["C1", "C2", "C12"], POCKET, world.root)
    assert [(item.id, item.verdict) for item in found.items] == [(name, "reproduced") for name in ("C1", "C2", "C12")]
    c1 = found.items[0]
    accuracy = [number for number in c1.numbers if "accuracy" in number.measure]
    assert [number.n_removed for number in accuracy] == [3, 5]
    assert accuracy[1].value == pytest.approx(100 * 5 * 0.05)
    assert accuracy[1].paper == pytest.approx((60.2 - 52.8) - (59.9 - 53.8))
    ratios = [number for number in c1.numbers if "LAMBADA" in number.measure]
    assert ratios[0].value == pytest.approx(math.exp(3 * 0.18))
    assert ratios[0].high == pytest.approx(ratios[0].value * math.exp(1.96 * 0.04))
    assert ratios[0].paper == pytest.approx((8.43 / 4.10) / (4.94 / 4.23))
    assert c1.why.endswith("Not compared, for the profile has no model for it: zamba2-2.7b.")
    assert "| C12 |" in found.to_markdown()
    assert "5 removed +25.0 [+21.8, +28.2] (paper +1.3)" in c1.summary[0]


def test_interval_of_a_difference_of_differences(world):
    number = next(n for n in verdict_of("C2", world.root).numbers if "accuracy" in n.measure and n.n_removed == 9)
    errors = [
        math.sqrt(sum((0.8 + 0.01 * i - loss * n) * (0.2 - 0.01 * i + loss * n) / N_ITEMS for i in range(-3, 4))) / 7
        for loss in (0.05, 0.002)
        for n in (0, 9)
    ]
    assert number.high - number.low == pytest.approx(100 * 2 * 1.96 * math.hypot(*errors))
    assert number.value == pytest.approx((number.low + number.high) / 2) == pytest.approx(100 * 9 * 0.048)


@pytest.mark.parametrize(
    ("own", "failed"), [(False, "not shown at this scale"), (True, "deviates")], ids=["small models", "paper's models"]
)
def test_claims_fail_when_the_numbers_flip(tmp_path, own, failed):
    World(tmp_path, loss=OTHER_WAY_ROUND, rise={key: 4 * value for key, value in OTHER_WAY_ROUND.items()}).write()
    profile = POCKET.model_copy(update={"papers_own_models": own})
    found = report.verdicts(["C1", "C2", "C12"], profile, tmp_path)
    assert [item.verdict for item in found.items] == [failed] * 3
    assert "0 speak for the claim" in found.items[0].why


def test_claims_are_close_when_only_some_comparisons_are_beyond_chance(tmp_path):
    World(tmp_path, loss=AS_IN_THE_PAPER | {BLOCKS_2: 0.0101}, rise=RISES_AS_IN_THE_PAPER).write()
    found = verdict_of("C1", tmp_path)
    assert (found.verdict, {number.outcome for number in found.numbers}) == ("close", {"for", "open"})


def test_mixed_evidence_is_no_success(tmp_path):
    World(tmp_path, loss=OTHER_WAY_ROUND, rise=RISES_AS_IN_THE_PAPER).write()
    found = verdict_of("C1", tmp_path)
    assert found.verdict == "not shown at this scale"
    assert {number.outcome for number in found.numbers} == {"for", "against"}


@pytest.mark.parametrize(("n_wrong", "verdict"), [(0, "reproduced"), (2, "close"), (3, "not shown at this scale")])
def test_crossover_counts_the_removals_at_which_the_sign_holds(world, n_wrong, verdict):
    plan = world.plan(*BLOCKS_2)
    lower = [removal.model_copy(update={"score": 1.0}) for removal in plan.removals[1 : 1 + n_wrong]]
    removals = [plan.removals[0], *lower, *plan.removals[1 + n_wrong :]]
    world.store(*BLOCKS_2, "search", plan=plan.model_copy(update={"removals": removals}))
    found = verdict_of("C12", world.root)
    assert (found.verdict, len(found.numbers)) == (verdict, 5 + 10)
    assert f"at {5 - n_wrong} of 5 counts for Mamba blocks and at 10 of 10 for SSMs" in found.why


def test_a_model_at_chance_shows_nothing(tmp_path):
    World(tmp_path, dense_accuracy=0.35, loss={BLOCKS_2: 0.06}, rise=RISES_AS_IN_THE_PAPER).write()
    found = verdict_of("C1", tmp_path)
    assert (found.verdict, len(found.numbers)) == ("not shown at this scale", 4)
    assert "pocket-mamba is not clearly above chance: dense average 35.0 ± 0.9, chance 32.1" in found.why


def test_random_models_show_nothing(tmp_path):
    smoke = profiles.load("smoke")
    ahead = {("block_pruning", "smoke-mamba2"): 0.5, ("ssm_pruning", "smoke-mamba"): 0.5}
    World(tmp_path, smoke, n_items=4, rise=ahead).write()
    found = report.verdicts(["C1", "C2", "C4", "C5", "C6", "C7", "C12"], "smoke", tmp_path)
    assert {item.verdict for item in found.items} == {"not shown at this scale"}
    assert all("untrained" in item.why for item in found.items)


def test_models_narrower_than_the_published_ones_decide_nothing(tmp_path):
    World(tmp_path, loss=AS_IN_THE_PAPER, rise=RISES_AS_IN_THE_PAPER).write()
    published = profiles.load("paper").models
    models = {name: published[model.paper] for name, model in POCKET.models.items()}
    found = report.verdicts(["C1", "C11"], POCKET.model_copy(update={"models": models}), tmp_path)
    assert [item.verdict for item in found.items] == ["not run at full width", "not run"]
    assert "pocket-mamba has 2,000,000 of 2,768,345,600 parameters" in found.items[0].why


def test_one_missing_evaluation_makes_a_claim_not_run(world):
    records.path(world.root, "pocket", *BLOCKS_2, "05_removed").unlink()
    found = verdict_of("C1", world.root)
    assert found.verdict == "not run"
    assert found.why == "There is no whole evaluation of pocket-mamba2 with 5 Mamba blocks removed."
    assert {number.n_removed for number in found.numbers} == {3}
    assert verdict_of("C2", world.root).verdict == "reproduced"


def test_an_evaluation_without_a_task_makes_a_claim_not_run(world):
    metrics = world.metrics(*SSMS_1, 8)
    del metrics["pocket_piqa/acc_norm"]
    world.store(*SSMS_1, "08_removed", 8, metrics)
    found = verdict_of("C2", world.root)
    assert found.verdict == "not run"
    assert found.why == "There is no whole evaluation of pocket-mamba with 8 SSMs removed."
    frame = report.table(2, POCKET, world.root, world.root).frame
    assert cell(frame, "pocket-mamba", 8, "average")["verdict"] == "not run"
    assert cell(frame, "pocket-mamba", 8, "arc_easy")["verdict"] == "same"


def test_claims_without_a_test_and_unknown_ones(tmp_path):
    assert verdict_of("C8", tmp_path).verdict == "not run"
    with pytest.raises(DataError, match="C13"):
        report.verdicts(["C13"], POCKET, tmp_path)


@pytest.mark.parametrize(
    ("low", "high", "outcome"), [(0.1, 2, "for"), (-1, 1, "open"), (-2, -0.1, "against"), (math.nan, math.nan, "open")]
)
def test_outcome_is_the_side_of_the_interval(low, high, outcome):
    assert Advantage("accuracy", 3, 0.0, low, high, 0).outcome == outcome


def test_same_records_give_the_same_bytes(world, tmp_path):
    first, second = (report.build(POCKET, world.root, world.root, tmp_path / name) for name in ("a", "b"))
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    assert all(str(tmp_path).encode() not in path.read_bytes() for path in first)


def test_sidecar_lists_the_records_drawn(world, tmp_path):
    for number, n_records in ((2, 8), (3, 10), (4, 4)):
        drawing = report.figure(number, POCKET, world.root)
        sidecar = json.loads(drawing.save(tmp_path)[2].read_text())
        assert len(sidecar["records"]) == n_records
        for entry in sidecar["records"]:
            assert records.read(world.root / entry["record"]).inputs == entry["inputs"]


def test_tables_and_claims_name_the_records_behind_them(world, tmp_path):
    other = World(tmp_path / "results", loss=AS_IN_THE_PAPER | {BLOCKS_1: 0.02}, rise=RISES_AS_IN_THE_PAPER).write()
    table = report.table(1, POCKET, world.root, other.root)
    sidecar = json.loads(table.save(tmp_path)[-1].read_text())
    for root, entries in ((world.root, sidecar["records"]), (other.root, sidecar["recorded"])):
        assert len(entries) == 8
        for entry in entries:
            record = records.read(root / entry["record"])
            assert (entry["inputs"], entry["checksum"]) == (record.inputs, records.checksum(record))
            assert f'"checksum": "{entry["checksum"]}"' in (root / entry["record"]).read_text()
    assert "pocket/block_pruning/pocket-mamba/03_removed.json" in (tmp_path / "table_1.md").read_text()
    verdicts = report.verdicts(["C1", "C12", "C6"], POCKET, world.root)
    behind = [[record.study for record in item.records] for item in verdicts.items]
    assert behind == [["block_pruning"] * 6 + ["dense"] * 2, ["block_pruning"] * 2 + ["ssm_pruning"] * 2, []]
    text, numbers, sources = verdicts.save(tmp_path)
    assert "01_mamba_block_pruning" in text.read_text()
    assert len(numbers.read_text().splitlines()) == 1 + sum(len(item.numbers) for item in verdicts.items)
    assert len(json.loads(sources.read_text())["records"]) == 10


def test_every_claim_says_what_its_test_is_and_where_it_is_told():
    assert list(CRITERIA) == [claim.id for claim in paper.claims()]
    for name, criterion in CRITERIA.items():
        assert in_project(f"notebooks/{criterion.notebook}.ipynb").exists(), name
        assert "Reproduced:" in criterion.test


def test_at_a_glance_needs_no_records_and_shows_those_there_are(world, tmp_path):
    empty = [glance.claims(POCKET, tmp_path / "a", tmp_path / "b"), glance.averages(POCKET, tmp_path / "a"),
             glance.costs(POCKET, tmp_path / "a"), glance.not_run(POCKET, tmp_path / "a")]  # fmt: skip
    assert all(table.to_markdown() for table in empty)
    assert {row[6] for row in empty[0].rows} == {"**not run**"}
    claims = {row[0]: row for row in glance.claims(POCKET, world.root, tmp_path / "b").rows}
    assert claims["C1"][3] == "+1.3"
    assert claims["C1"][5] == "+25.0 [+21.8, +28.2]"
    assert claims["C1"][6] == "**not run; yours: reproduced**"
    averages = glance.averages(POCKET, world.root, world.root).rows
    assert averages[1][:6] == ("1", "pocket-mamba", "mamba_block", "3", "57.7", f"{100 * (0.8 - 0.03):.1f}")
    missing = dict(glance.not_run(POCKET, world.root).rows)
    assert "pocket-mamba (components)" in missing["Runs of inventory"]
    assert [row[1] for row in glance.errata().rows] == paper.errata()


def test_figure_1_outlines_every_kind_of_the_inventories(tmp_path):
    """Count, and each component's share of the 2,000,000 parameters; what lies in a component is drawn inside it."""
    world = World(tmp_path, profiles.load("pocket"))
    found = {
        "pocket-mamba": {"mamba_block": (24, 1_800_000), "ssm": (24, 240_000)},
        "pocket-zamba2": {"mamba_block": (18, 1_260_000), "ssm": (18, 90_000), "mha": (3, 120_000),
                          "mlp": (3, 150_000), "transformer_block": (3, 300_000), "mlp_channels": (3, 150_000)},
    }  # fmt: skip
    for model, kinds in found.items():
        metrics = {f"{kind}/count": Metric(value=count) for kind, (count, _) in kinds.items()}
        metrics |= {f"{kind}/parameters": Metric(value=total) for kind, (_, total) in kinds.items()}
        world.store("inventory", model, "components", metrics=metrics)
    drawing = report.figure(1, world.profile, tmp_path)
    assert [record.model.name for record in drawing.records] == list(found)
    mamba, zamba2 = (axes for axes in drawing.figure.axes if axes.get_title())
    assert mamba.get_title() == "pocket-mamba\n2,000,000 parameters"
    assert list(outlines(mamba)) == ["Mamba block\n24 × 3.75%", "SSM\n24 × 0.50%"]
    boxes = outlines(zamba2)
    block, ssm, transformer, mha, mlp = boxes.values()
    assert list(boxes) == [
        "Mamba block\n18 × 3.50%", "SSM\n18 × 0.25%", "Transformer block\n3 × 5.00%", "MHA\n3 × 2.00%",
        "MLP\n3 × 2.50%\nwhole, or by channels",
    ]  # fmt: skip
    for inner, outer in ((ssm, block), (mha, transformer), (mlp, transformer)):
        assert Bbox.union([inner, outer]).bounds == outer.bounds
    assert not any(one.overlaps(other) for one, other in ((block, transformer), (mha, mlp)))


def outlines(axes) -> dict[str, Bbox]:
    """The dashed boxes of a panel of figure 1, by what is written in them."""
    dashed = [patch.get_bbox() for patch in axes.patches if not patch.get_fill()]
    return {text.get_text(): box for text, box in zip(axes.texts, dashed, strict=True)}


def test_figures_draw_the_papers_points_and_ours_on_shares_of_layers(world):
    figure = report.figure(3, POCKET, world.root).figure
    left, right = figure.axes[1], figure.axes[3]
    reported, ours = left.get_lines()[0], left.containers[1].lines[0]
    assert list(reported.get_xdata()) == [0, 25, 31.25, 37.5]
    assert list(reported.get_ydata()) == [4.10, 4.26, 5.89, 14.95]
    assert list(ours.get_xdata()) == [0, 25, pytest.approx(100 / 3), 37.5]
    assert ours.get_ydata()[-1] == pytest.approx(3 * math.exp(0.09))
    assert reported.get_markerfacecolor() == "white" != ours.get_markerfacecolor()
    assert right.containers[1].lines[0].get_ydata()[0] == pytest.approx(80)


def test_figure_4_draws_each_search_from_the_dense_model_on(world):
    left, right = report.figure(4, POCKET, world.root).figure.axes
    assert [len(line.get_xdata()) for line in (*left.get_lines(), *right.get_lines())] == [7, 7, 12, 12]
    assert left.get_lines()[1].get_ydata()[6] == pytest.approx(math.exp(1 + 6 * 0.2))
    assert left.get_lines()[1].get_xdata()[6] == pytest.approx(25)


def test_infinite_perplexity_is_shown_in_tables_and_left_out_of_figures(world):
    infinite = {"pocket_lambada/perplexity": Metric(value=math.inf, stderr=math.nan, n=400)}
    world.store(*BLOCKS_2, "05_removed", 5, world.metrics(*BLOCKS_2, 5) | infinite)
    assert "inf" in report.table(1, POCKET, world.root, world.root).to_markdown()
    assert report.figure(2, POCKET, world.root)._repr_png_().startswith(b"\x89PNG")
    assert verdict_of("C1", world.root).verdict == "close"


def test_tables_3_to_5_stand_beside_the_papers_rows(tmp_path):
    world = World(tmp_path, profiles.load("smoke"), n_items=4).write()
    found = {number: report.table(number, "smoke", world.root, world.root).frame for number in (3, 4, 5)}
    parts = found[3][(found[3]["column"] == "average") & found[3]["pruned"].notna()].set_index("target")
    assert parts.loc["mamba_block & mlp & mha + mlp_channels", "paper"] == 66.3
    assert parts.loc["mamba_block & mlp & mha + mlp_channels + ssm", "paper"] == 65.9
    assert list(parts.index)[:2] == ["dense", "mamba_block & transformer_block"]
    hymba = found[4].set_index(["pruned", "column"])
    assert hymba.loc[(1, "average"), "paper"] == 62.3
    columns = ("hellaswag", "piqa", "arc_easy", "arc_challenge", "winogrande")
    five = [hymba.loc[(1, column), "yours"] for column in columns]
    assert hymba.loc[(1, "average"), "yours"] == pytest.approx(sum(five) / 5)
    falcon = found[5].set_index(["target", "pruned", "column"])
    assert falcon.loc[("mamba_block", 1, "ppl"), "paper"] == 4.01
    assert falcon.loc[("ssm", 1, "ppl"), "paper"] == 3.47


def test_csv_has_one_line_for_each_cell(world, tmp_path):
    markdown, tidy, latex, _ = report.table(1, POCKET, world.root, world.root).save(tmp_path)
    rows = list(csv.DictReader(tidy.read_text().splitlines()))
    assert len(rows) == 2 * 3 * 10
    assert list(rows[0]) == [
        "model",
        "target",
        "pruned",
        "of",
        "stands_for",
        "column",
        "paper",
        "recorded",
        "recorded_stderr",
        "yours",
        "yours_stderr",
        "difference",
        "verdict",
    ]
    assert markdown.read_text().count("| yours |") == 6
    assert latex.read_text().count(r" \\") == 1 + 24


def test_latex_is_escaped(world):
    text = report.table(1, POCKET, world.root, world.root).to_latex()
    assert r"Ratio \%" in text
    assert r"LAMBADA ppl $\downarrow$" in text
    assert r"$\pm$" in text
    assert r"\caption{Training-free" in text
    assert text.count("{") - text.count(r"\{") == text.count("}") - text.count(r"\}")
    assert text.isascii()
    assert escape_latex("a_b & 5% {x} \\ ^ ~ #1 $2") == (
        r"a\_b \& 5\% \{x\} \textbackslash{} \textasciicircum{} \textasciitilde{} \#1 \$2"
    )


def test_provenance_names_weights_data_versions_and_cost(world):
    table = report.provenance(POCKET, world.root, "ssm_pruning")
    facts = {row[0]: row[1] for row in table.rows}
    assert facts["weights"] == f"pocket-mamba {'f' * 12}, float32"
    assert facts["data: tasks"] == f"seven {'d' * 12}"
    assert facts["commit"] == f"{'c' * 12} with changes"
    assert (facts["runs"], facts["seconds"], facts["peak memory"]) == ("5", "150", "809 MiB")
    assert "lm_eval 0.4.13" in facts["versions"]
    with pytest.raises(DataError, match="block_pruning"):
        report.provenance(POCKET, world.root, "table_1")


def test_the_version_that_scored_stands_below_scores_and_verdicts(world, tmp_path):
    place = "block_pruning", "pocket-mamba", "03_removed"
    other = World(tmp_path / "results", loss=AS_IN_THE_PAPER, rise=RISES_AS_IN_THE_PAPER).write()

    def notes(recorded: Path) -> list[str]:
        tables = [report.table(1, POCKET, world.root, recorded), glance.averages(POCKET, world.root, recorded),
                  glance.claims(POCKET, world.root, recorded), report.verdicts(["C1"], POCKET, recorded)]  # fmt: skip
        return [table.to_markdown().splitlines()[-1] for table in tables]

    assert all(note.endswith(" Scored with lm-eval 0.4.13.") for note in notes(other.root))
    record = records.read(records.path(other.root, "pocket", *place))
    older = record.environment.model_copy(update={"lm_eval": "0.4.2"})
    records.write(other.root, record.model_copy(update={"environment": older}))
    both = "0.4.13 and 0.4.2"
    *compared, alone = notes(other.root)
    assert all(note.endswith(f" Scored with lm-eval {both} (recorded), 0.4.13 (yours).") for note in compared)
    assert alone.endswith(f" Scored with lm-eval {both}.")
    assert report.table(1, POCKET, world.root, tmp_path).to_latex().count("Scored with lm-eval 0.4.13.") == 1
    assert "Scored" not in report.table(1, POCKET, tmp_path / "a", tmp_path / "b").to_markdown()
    assert "Scored" not in report.verdicts(None, POCKET, tmp_path / "a").to_markdown()


@pytest.mark.parametrize("make", [report.table, report.figure])
def test_unknown_numbers_are_refused(make, tmp_path):
    with pytest.raises(DataError, match="9: expected one of"):
        make(9, POCKET, tmp_path)


@pytest.mark.parametrize("name", profiles.names())
def test_profiles_know_the_chance_level_of_each_pocket_task(name):
    tasks = profiles.load(name).evaluation.tasks
    known = {t.task: t.chance for t in tasks if t.task in CHANCE and t.metric != "perplexity"}
    assert known == (CHANCE if name in ("smoke", "pocket") else {})
    assert all(t.chance == 0 for t in tasks if t.metric == "perplexity")
