"""Rows that only the paper has: shown with dashes beside them, and named among what was not run."""

from __future__ import annotations

import pandas as pd
import pytest
from world import World

from shedder_utils import paper, profiles, report
from shedder_utils.report import glance
from shedder_utils.report.counterparts import ABSENT, absent, absent_models, words


def named(number: int, profile: str) -> list[str]:
    return [words(row) for row in absent(number, profiles.load(profile))]


def test_the_papers_profile_leaves_no_row_out():
    whole = profiles.load("paper")
    assert not [row for number in range(1, 13) for row in absent(number, whole)]
    assert not [model for number in range(1, 13) for model in absent_models(number, whole)]


def test_rows_without_counterpart_are_found_in_every_table():
    assert {number: named(number, "pocket") for number in range(1, 13) if named(number, "pocket")} == {
        4: ["hymba_block: 7 of 32"]
    }
    assert named(1, "smoke") == ["mamba_block: 14 of 54"]
    assert named(3, "smoke")[-1] == "mamba_block & mlp & mha + mlp_channels + ssm, 15.48 %"
    assert named(5, "smoke") == [f"{kind}: {n} of 64" for kind in ("mamba_block", "ssm") for n in (15, 20)]
    assert named(7, "smoke") == ["ssm: 24 of 64"]
    assert named(11, "smoke") == ["pruned, 15.48 %", "tuned, 15.48 %"]
    assert absent_models(2, profiles.load("laptop")) == ["zamba2-2.7b"]
    assert named(2, "laptop") == [], "of models that the profile has"


def test_a_row_that_only_the_paper_has_stands_in_its_place(tmp_path):
    world = World(tmp_path, profiles.load("pocket")).write()
    table = report.table(4, "pocket", world.root, world.root)
    assert [(row[0], row[1], row[2], row[-1]) for row in table.rows[8:11]] == [
        ("hymba-1.5b", "7 of 32", "paper", ""), ("pocket-hymba", "–", "recorded, yours", ABSENT),
        ("hymba-1.5b", "8 of 32", "paper", ""),
    ]  # fmt: skip
    assert table.rows[8][-2] == "61.7"
    assert set(table.rows[9][3:-1]) == {"–"}
    lines = table.frame[table.frame["stands_for"] == 7].set_index("column")
    assert (lines.loc["average", "paper"], lines.loc["average", "verdict"]) == (61.7, ABSENT)
    assert lines[["pruned", "recorded", "yours", "difference"]].isna().all(axis=None)
    assert f"hymba_block,,,7,average,61.7,,,,,,{ABSENT}" in table.save(tmp_path)[1].read_text()
    assert ("4", "pocket-hymba", "hymba_block", "–", "61.7", "–", "–", "–", ABSENT) in glance.averages(
        "pocket", world.root, world.root
    ).rows


@pytest.mark.parametrize("number", range(1, 13))
def test_all_tables_have_the_papers_rows(number, tmp_path):
    """Also where nothing was run: as many lines marked as its own as the paper has rows of the profile's models."""
    table = report.table(number, "smoke", tmp_path, tmp_path)
    values = [value for row in paper.rows(number) for value in row.values.values() if value is not None]
    shared = 2 if number == 5 else 1  # the paper has the dense row of table 5 for either kind
    assert sum("paper" in row for row in table.rows) == len(paper.rows(number)) - shared + 1
    assert all(len(row) == len(table.header) for row in table.rows)
    assert set(table.frame["paper"].dropna()) >= {value for value in values if number < 10}
    assert (table.frame["verdict"] == ABSENT).sum() == sum(row[-1] == ABSENT for row in table.rows) * (
        len(table.header) - 4 if number < 6 else 2
    )


def test_rows_of_tables_of_speed_say_of_how_many(tmp_path):
    world = World(tmp_path, profiles.load("pocket")).write()
    counted = {number: [(row[1], row[0]) for row in report.table(number, "pocket", world.root, world.root).rows]
               for number in (8, 9)}  # fmt: skip
    assert [label for source, label in counted[9] if source == "paper"] == ["paper: 0 of 32", "paper: 7 of 32"]
    assert [label for source, label in counted[9] if source == "yours"] == ["none", "4 of 24", "none, second run"]
    assert ("yours", "12") in counted[8], "of several kinds"


def test_what_was_not_run_names_rows_and_models_of_the_paper(tmp_path):
    missing = dict(glance.not_run("pocket", tmp_path).rows)
    assert missing["Rows of table 4"] == ("no row of profile pocket stands for hymba-1.5b, hymba_block: 7 of 32")
    assert "Rows of table 1" not in missing
    laptop = dict(glance.not_run("laptop", tmp_path).rows)
    assert laptop["Models of table 1"] == "profile laptop has none that stands for zamba2-2.7b"
    assert pd.notna(laptop["Table 3"])


def test_calibration_texts_are_not_called_sequences():
    columns = glance.compared_profiles()
    row = next(row for row in columns.rows if row[0] == "calibration")
    told = dict(zip(columns.header, row, strict=True))
    assert told["paper"] == ("alpaca: 256 texts, joined and cut into sequences of 2048 tokens, for hymba-1.5b 1024")
