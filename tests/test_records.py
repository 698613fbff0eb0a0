"""Records: whole or not at all, refused when changed, and not computed twice."""

import errno
import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from shedder_utils import kernels, provenance, records
from shedder_utils.errors import RecordError
from shedder_utils.records import DataFacts, Metric, ModelFacts, Outcome, Request


def request_for(setting: str = "removed_1", samples: int = 8, removals: tuple[str, ...] = ("ssm:3",)) -> Request:
    return Request(
        study="ssm_pruning",
        profile="smoke",
        setting=setting,
        spec={"samples": samples, "evaluate": (0, 1)},
        model=ModelFacts(
            name="toy",
            ref="toy",
            dtype="float32",
            fingerprint="f" * 64,
            parameters_dense=100,
            parameters=90,
            removals=removals,
        ),
        data={"calibration": DataFacts(name="prose", fingerprint="d" * 64)},
    )


class Run:
    """A computation that counts how often it ran."""

    def __init__(self, value: float = 4.25):
        self.value, self.count = value, 0

    def __call__(self) -> Outcome:
        self.count += 1
        metrics = {"ppl": Metric(value=self.value), "acc": Metric(value=0.5, stderr=0.1, n=25)}
        return Outcome(metrics=metrics, plan={"removals": [{"component": "ssm:3", "score": 1.1}]})


@pytest.fixture
def keep(tmp_path: Path) -> Callable[..., tuple[records.Record, bool]]:
    def run(request: Request, compute: Callable[[], Outcome]) -> tuple[records.Record, bool]:
        return records.recorded(tmp_path, request, compute)

    return run


def test_versions_of_kernels_are_kept_where_there_are_any(tmp_path, keep, monkeypatch):
    versions = {"mamba-ssm": "2.3.2.post1", "causal-conv1d": None}
    monkeypatch.setattr(provenance, "_version", lambda package: versions.get(package, "1.0"))
    record, _ = keep(request_for(), Run())
    file = records.path(tmp_path, "smoke", "ssm_pruning", "toy", "removed_1")
    assert records.read(file) == record
    stored = json.loads(file.read_text())["environment"]
    assert (stored["mamba_ssm"], "causal_conv1d" in stored) == ("2.3.2.post1", False)


def test_record_reads_back_as_written(tmp_path, keep):
    record, computed = keep(request_for(), Run())
    file = records.path(tmp_path, "smoke", "ssm_pruning", "toy", "removed_1")
    assert computed
    assert records.read(file) == record
    assert record.model.removals == ("ssm:3",)
    assert record.spec == {"samples": 8, "evaluate": [0, 1]}
    assert record.environment.scan == kernels.active("cpu")
    assert record.cost.peak_mib > 1
    assert record.created.utcoffset().total_seconds() == 0
    assert {"schema", "checksum", "inputs"} <= json.loads(file.read_text()).keys()


def test_answers_to_single_items_are_kept_where_there_are_any(tmp_path, keep):
    keep(request_for(), lambda: Outcome(metrics={"acc": Metric(value=1, n=2, items="2:c0"), "ppl": Metric(value=3)}))
    file = records.path(tmp_path, "smoke", "ssm_pruning", "toy", "removed_1")
    assert records.read(file).metrics["acc"].items == "2:c0"
    found = json.loads(file.read_text())
    assert "items" not in found["metrics"]["ppl"]
    assert records.checksum(records.read(file)) == found["checksum"]


def test_same_inputs_are_computed_once(keep):
    run = Run()
    first, _ = keep(request_for(), run)
    assert keep(request_for(), run) == (first, False)
    assert run.count == 1


@pytest.mark.parametrize("changed", [request_for(samples=9), request_for(removals=("ssm:4",))])
def test_other_inputs_are_computed_again(keep, changed):
    run = Run()
    keep(request_for(), run)
    assert keep(changed, run)[1]
    assert run.count == 2


def test_inputs_leave_out_names_of_files_but_not_data():
    request = request_for()
    moved = request.model_copy(update={"profile": "pocket", "setting": "other"})
    other_data = request.model_copy(update={"data": {"calibration": DataFacts(name="prose", fingerprint="e" * 64)}})
    assert moved.inputs_fingerprint() == request.inputs_fingerprint()
    assert other_data.inputs_fingerprint() != request.inputs_fingerprint()


def test_infinite_perplexity_survives(tmp_path, keep):
    record, _ = keep(request_for(), Run(math.inf))
    assert records.find(tmp_path) == [record]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("4.25", "4.24"), "was changed"),
        (lambda text: text.replace('"n": 25', '"n":  25'), "was changed"),
        (lambda text: text[: len(text) // 2], "not whole JSON"),
        (lambda text: "[]", "checksum"),
        (lambda text: records._render({"schema": 1}), "study"),
    ],
)
def test_changed_or_broken_file_is_refused_in_one_line(tmp_path, keep, change, message):
    record, _ = keep(request_for(), Run())
    file = records.write(tmp_path, record)
    file.write_text(change(file.read_text()))
    with pytest.raises(RecordError, match=message) as error:
        keep(request_for(), Run())
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)
    file.unlink()
    assert keep(request_for(), Run())[1]


def test_misplaced_record_is_refused(tmp_path, keep):
    record, _ = keep(request_for(), Run())
    file = records.write(tmp_path, record)
    file.rename(file.with_name("removed_2.json"))
    with pytest.raises(RecordError, match="removed_2"):
        records.find(tmp_path)


def test_full_disk_keeps_the_old_record(tmp_path, keep, monkeypatch):
    old, _ = keep(request_for(), Run())

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RecordError, match="No space left"):
        keep(request_for(samples=9), Run(9.0))
    assert records.find(tmp_path) == [old]
    assert [file.name for file in tmp_path.rglob("*") if file.is_file()] == ["removed_1.json"]


def test_failed_run_leaves_nothing(tmp_path, keep):
    def fail() -> Outcome:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        keep(request_for(), fail)
    assert records.find(tmp_path) == []


def test_fold_has_one_row_for_each_metric(tmp_path, keep):
    keep(request_for("dense", removals=()), Run(3.0))
    keep(request_for("removed_1"), Run(5.0))
    frame = records.fold(tmp_path, study="ssm_pruning")
    assert list(frame["setting"]) == ["dense", "dense", "removed_1", "removed_1"]
    assert list(frame["n_removed"]) == [0, 0, 1, 1]
    assert frame.query("metric == 'ppl'")["value"].tolist() == [3.0, 5.0]
    assert records.fold(tmp_path, study="block_pruning").empty


@pytest.mark.parametrize("name", ["../elsewhere", "a/b", ".hidden", ""])
def test_names_cannot_leave_the_folder(name):
    with pytest.raises(ValueError, match="setting"):
        request_for(name)
