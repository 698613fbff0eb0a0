"""What removal buys: speedups against the share of the work that is gone, and what is freed, from synthetic records."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from world import World

from shedder_utils import profiles, report
from shedder_utils.profiles import Profile
from shedder_utils.records import Metric

MIB, KIB = 2**20, 2**10


def speed_record(world: World, table: int, model: str, runs: dict[str, dict[str, float]]) -> None:
    metrics = {f"{n}/{name}": Metric(value=value) for n, found in runs.items() for name, value in found.items()}
    world.store("speed", model, f"table_{table}", metrics=metrics)


def run(prefill: float, decode: float, ideal: float, **sizes: float) -> dict[str, float]:
    found = {f"{phase}/ideal": ideal for phase in ("prefill", "decode")}
    for phase, value in (("prefill", prefill), ("decode", decode)):
        found |= {f"{phase}/speedup": value, f"{phase}/low": value - 0.05, f"{phase}/high": value + 0.1}
    return found | sizes


DENSE = run(1.0, 1.0, 1.0, parameters=2e6, bytes=8 * MIB, weight_bytes=8 * MIB, cache_bytes=400 * KIB)
BLOCKS = {
    "0": DENSE,
    "3": run(1.1, 1.2, 1.125, parameters=1.75e6, bytes=7 * MIB, weight_bytes=7 * MIB, cache_bytes=350 * KIB),
    "5": run(1.2, 1.4, 1.25, parameters=1.5e6, bytes=6 * MIB, weight_bytes=6 * MIB, cache_bytes=300 * KIB),
    "0 again": run(1.0, 1.0, 1.0),
}


@pytest.fixture
def world(tmp_path: Path) -> World:
    world = World(tmp_path)
    speed_record(world, 6, "pocket-mamba", BLOCKS)
    return world


def test_the_figure_has_measured_points_over_the_share_that_is_gone(world: World) -> None:
    drawing = report.figure("speedup", "pocket", world.root)
    for axes, values in zip(drawing.figure.axes, ([1.1, 1.2], [1.2, 1.4]), strict=True):
        ideal, points = axes.get_lines()[0], axes.containers[0]
        assert points.lines[0].get_xdata() == pytest.approx([100 * (1 - 1 / 1.125), 100 * (1 - 1 / 1.25)])
        assert list(points.lines[0].get_ydata()) == values
        low, high = points.lines[2][0].get_segments()[0][:, 1]
        assert (low, high) == pytest.approx((values[0] - 0.05, values[0] + 0.1))
        assert all(y == pytest.approx(1 / (1 - x / 100)) for x, y in zip(*ideal.get_data(), strict=True))
    assert [record.setting for record in drawing.records] == ["table_6"]
    assert drawing._repr_png_().startswith(b"\x89PNG")


def test_the_table_tells_what_went_and_what_was_not_recorded(world: World) -> None:
    table = report.table("freed", "pocket", world.root)
    assert table.rows[0] == ("pocket-mamba", "none", "2,000,000", "8.00", "8.00", "400.0")
    assert table.rows[2] == (
        "pocket-mamba", "5", "1,500,000 (-25.0%)", "6.00 (-25.0%)", "6.00 (-25.0%)", "300.0 (-25.0%)",
    )  # fmt: skip
    assert ("pocket-mamba2", "9", "–", "–", "–", "–") in table.rows
    assert table.frame.set_index(["model", "removed"]).loc[("pocket-mamba", 3), "cache_bytes"] == 350 * KIB


def with_a_further_table(folder: Path) -> Profile:
    content = yaml.safe_load((profiles.FOLDER / "pocket.yaml").read_text())
    content["speed"]["tables"]["mamba_ssms"] = {
        "study": "ssm_pruning", "model": "pocket-mamba", "new_tokens": 16, "rows": {0: None, 6: None}
    }  # fmt: skip
    file = folder / "further.yaml"
    file.write_text(yaml.safe_dump(content | {"name": "further"}))
    return profiles.load(file)


def test_models_that_the_papers_tables_leave_out_are_timed_by_name(tmp_path: Path) -> None:
    profile = with_a_further_table(tmp_path)
    world = World(tmp_path, profile)
    speed_record(world, "mamba_ssms", "pocket-mamba", {"0": DENSE, "6": BLOCKS["3"], "0 again": BLOCKS["0 again"]})
    table = report.table("mamba_ssms", profile, tmp_path)
    assert table.title.startswith("Inference speed of pruned pocket-mamba")
    assert [row[1] for row in table.rows[:3]] == ["recorded", "yours", "difference"]  # no line of the paper's
    labels = [text.get_text() for text in report.figure("speedup", profile, tmp_path).figure.legends[0].get_texts()]
    assert "pocket-mamba (mamba_ssms)" in labels
