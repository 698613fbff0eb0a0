"""Records: one run, one JSON file, with what it was made from, what it cost and a checksum.

`results/` (recorded, committed) and `runs/` (what your runs write) have one shape,
`<root>/<profile>/<study>/<model>/<setting>.json`. A run whose record exists with the same inputs is not
repeated. A file is replaced whole or not at all, and one that was changed by hand is refused.
"""

import hashlib
import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import pandas as pd
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, ValidationError

from .errors import RecordError
from .files import write_atomically
from .provenance import Code, Cost, Environment, Meter, code_version, environment

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
"""A part of a record's path."""

Json = Annotated[dict[str, Any], BeforeValidator(lambda value: json.loads(json.dumps(value)))]
"""Settings exactly as they will be read back: tuples are lists, keys are strings."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants", populate_by_name=True)


class ModelFacts(_Strict):
    """The model of a run: which weights, how many parameters, and what was removed from it, in order.

    name is the profile's, ref what `load_model` was given; fingerprint is the sha256 of the weights;
    parameters are unique ones, dense and after the removals, such as ("mamba_block:17", "mamba_block:4"); ratio is the
    share removed as the paper counts it, from 0 to 1.
    """

    name: Name
    ref: str
    revision: str | None = None
    dtype: str
    fingerprint: str
    parameters_dense: int
    parameters: int
    ratio: float = 0.0
    removals: tuple[str, ...] = ()


class DataFacts(_Strict):
    """One data source of a run; the fingerprint is the sha256 of what the model was given."""

    name: str
    revision: str | None = None
    fingerprint: str


class Metric(_Strict):
    """A measured number with its standard error and the number of items behind it, where it has them.

    items: of an accuracy, which items were answered rightly, as `statistics.packed` writes it.
    """

    value: float
    stderr: float | None = None
    n: int | None = None
    items: str | None = Field(default=None, exclude_if=lambda items: items is None)


class Outcome(_Strict):
    """What a run computed: metrics by name and, for a search, its plan."""

    metrics: dict[str, Metric]
    plan: Json | None = None


class Request(_Strict):
    """Everything that decides a run's outcome, known before it starts. data is by role, such as "calibration"."""

    study: Name
    profile: Name
    setting: Name
    spec: Json
    model: ModelFacts
    data: dict[str, DataFacts]

    def inputs_fingerprint(self) -> str:
        """sha256 of study, settings, weights, removals and data; neither place nor machine is part of it."""
        model = self.model.model_dump(mode="json", include={"fingerprint", "dtype", "removals"})
        data = {role: source.fingerprint for role, source in self.data.items()}
        return _sha256({"study": self.study, "spec": self.spec, "model": model, "data": data})


class Record(Request):
    """One finished run, as it lies on disk; `inputs` is its request's fingerprint."""

    schema_: Literal[1] = Field(1, alias="schema")
    metrics: dict[str, Metric]
    plan: Json | None = None
    environment: Environment
    code: Code
    cost: Cost
    created: datetime
    inputs: str


def checksum(record: Record) -> str:
    """sha256 of all that a record says: the checksum in its file."""
    return _sha256(json.loads(record.model_dump_json(by_alias=True)))


def path(root: str | Path, profile: str, study: str, model: str, setting: str) -> Path:
    """Where a record lies under `results/` or `runs/`."""
    return Path(root, profile, study, model, f"{setting}.json")


def write(root: str | Path, record: Record) -> Path:
    """Write a record whole or not at all and return its path.

    Raises RecordError when it cannot be stored, such as on a full disk; a record that was there stays.
    """
    target = _path_of(root, record)
    write_atomically(target, _render(json.loads(record.model_dump_json(by_alias=True))))
    return target


def read(file: str | Path) -> Record:
    """Read one record.

    Raises RecordError when the file is missing, was changed after it was written, or has another form.
    """
    try:
        text = Path(file).read_text(encoding="utf-8")
        content = json.loads(text)
    except OSError as error:
        raise RecordError(f"{file}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise RecordError(f"{file}: is not whole JSON ({error}); restore it, or delete it and run again") from error
    checksum = content.pop("checksum", None) if isinstance(content, dict) else None
    if checksum is None:
        raise RecordError(f"{file}: expected a record with a checksum, found none; delete it and run again")
    if text != _render(content):
        raise RecordError(f"{file}: was changed after it was written; restore it, or delete it and run again")
    try:
        return Record.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(key) for key in first["loc"])
        raise RecordError(f"{file}: {place}: {first['msg']}; delete it and run again") from error


def find(
    root: str | Path, *, profile: str = "*", study: str = "*", model: str = "*", setting: str = "*"
) -> list[Record]:
    """All records under root whose names match, in order of their paths.

    Raises RecordError for a broken record, and for one that lies where another belongs.
    """
    records = []
    for file in sorted(Path(root).glob(f"{profile}/{study}/{model}/{setting}.json")):
        record = read(file)
        if _path_of(root, record) != file:
            raise RecordError(f"{file}: holds the record of {_path_of(root, record)}; move or delete it")
        records.append(record)
    return records


def fold(root: str | Path, *, profile: str = "*", study: str = "*", model: str = "*") -> pd.DataFrame:
    """One row for each metric of each record: its names, removals, parameters, value, stderr and n."""
    columns = (
        "profile",
        "study",
        "model",
        "setting",
        "n_removed",
        "parameters_dense",
        "parameters",
        "metric",
        "value",
        "stderr",
        "n",
    )
    rows = [
        (
            record.profile,
            record.study,
            record.model.name,
            record.setting,
            len(record.model.removals),
            record.model.parameters_dense,
            record.model.parameters,
            name,
            metric.value,
            metric.stderr,
            metric.n,
        )
        for record in find(root, profile=profile, study=study, model=model)
        for name, metric in record.metrics.items()
    ]
    return pd.DataFrame(rows, columns=columns)


def recorded(
    root: str | Path, request: Request, compute: Callable[[], Outcome], device: str = "cpu"
) -> tuple[Record, bool]:
    """The record of a request: the one on disk when its inputs are the same, else computed and written.

    device: where it computes, such as "cuda:0". Returns the record and whether it was computed now. Raises RecordError
    when the one on disk is broken or the new one cannot be stored.
    """
    file = _path_of(root, request)
    inputs = request.inputs_fingerprint()
    if file.exists():
        record = read(file)
        if record.inputs == inputs:
            return record, False
    with Meter() as meter:
        outcome = compute()
    record = Record(
        **dict(request),
        metrics=outcome.metrics,
        plan=outcome.plan,
        environment=environment(device),
        code=code_version(),
        cost=meter.cost,
        created=datetime.now(UTC).replace(microsecond=0),
        inputs=inputs,
    )
    write(root, record)
    return record, True


def _path_of(root: str | Path, request: Request) -> Path:
    return path(root, request.profile, request.study, request.model.name, request.setting)


def _render(content: dict[str, Any]) -> str:
    """The text of a record's file: its content, then the checksum of it."""
    return json.dumps({**content, "checksum": _sha256(content)}, indent=2, ensure_ascii=False) + "\n"


def _sha256(content: dict[str, Any]) -> str:
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
