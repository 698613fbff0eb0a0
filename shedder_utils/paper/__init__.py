"""The paper: what it reports, claims and sets, and where it disagrees with itself.

Muñoz, Yuan, Jain: "Mamba-Shedder: Post-Transformer Compression for Efficient Selective Structured State Space
Models", NAACL 2025. All values come from `paper.yaml` beside this file; accuracies are percentages.
"""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from ..errors import DataError
from ..plan import Plan
from ..released import KINDS

FILE = Path(__file__).parent / "paper.yaml"
Label = str | int | float


@dataclass(frozen=True)
class Row:
    """One row of a table: its labels (model, kind, pruned, ratio, ...) and its values by column; None: not reported."""

    labels: dict[str, Label]
    values: dict[str, float | None]


@dataclass(frozen=True)
class Claim:
    """What the paper says in words, and where."""

    id: str
    where: str
    text: str


@cache
def _content() -> dict[str, Any]:
    """The file; callers give away copies of it."""
    return dict(yaml.safe_load(FILE.read_text(encoding="utf-8")))


def models() -> dict[str, dict[str, Any]]:
    """The paper's models: Hub id, number of blocks, kind, parameters."""
    return deepcopy(_content()["models"])


def columns() -> list[str]:
    """The columns of tables 1, 2, 3 and 5: perplexity, seven accuracies, their average."""
    return list(_content()["columns"])


def accuracies(model: str) -> list[str]:
    """The accuracies whose mean is the average in the tables of a model: five for Hymba (table 4), seven for others."""
    row = next(row for table in range(1, 6) for row in rows(table) if row.labels["model"] == model)
    return [column for column in row.values if column not in ("ppl", "average")]


def hyperparameters() -> dict[str, Any]:
    """Table 13 and the settings of the released scripts."""
    return deepcopy(_content()["hyperparameters"])


def claims() -> list[Claim]:
    """What the paper says in words, C1 to C12."""
    return [Claim(**claim) for claim in _content()["claims"]]


def errata() -> list[str]:
    """Where the paper disagrees with itself or with the files its authors released."""
    return list(_content()["errata"])


def plans() -> list[str]:
    """The names of the removal orders that the authors released, such as "mamba-2.8b" and "zamba2-2.7b-10"."""
    return [name for name in _content()["released"] if name.startswith(tuple(_content()["models"]))]


def plan(name: str) -> Plan:
    """A removal order that the authors released, for the paper's full-size model. Raises DataError for another name."""
    if name not in plans():
        raise DataError(f"the paper has no plan {name!r}: expected one of {', '.join(plans())}")
    keys = {kind: key for key, kind in KINDS.items()} | {"mlp_channels_kept": "pruned_mlp_channels"}
    order = _content()["released"][name]
    found = Plan.from_released({keys[kind]: removals for kind, removals in order.items() if kind in keys})
    model = next(model for model in _content()["models"] if name.startswith(model))
    return found.model_copy(update={"model": {"ref": models()[model]["hub"]}})


def released(name: str, n_removed: int) -> dict[str, float]:
    """The perplexity ("ppl") and average accuracy that the authors' files give after n removals of an order of theirs.

    Either may be missing. Raises DataError for an order that `plan` does not have.
    """
    whole, order = len(plan(name)), _content()["released"][name]
    given = {column: order.get(column, {}) for column in ("ppl", "average")}
    by_count = {column: values if isinstance(values, dict) else {whole: values} for column, values in given.items()}
    return {column: values[n_removed] for column, values in by_count.items() if n_removed in values}


@cache
def rows(table: int) -> tuple[Row, ...]:
    """The rows of a table of numbers, 1 to 12, in the paper's order. Raises DataError for another number."""
    if table in (1, 2):
        found = _by_model(table)
    elif table == 3:
        found = _granularities()
    elif table == 4:
        found = _hymba()
    elif table == 5:
        found = _falcon_mamba()
    elif 6 <= table <= 9:
        found = _speedups(table)
    elif 10 <= table <= 12:
        found = _recovery(table)
    else:
        raise DataError(f"table {table}: expected one of the paper's tables of numbers, 1 to 12")
    return tuple(found)


def reported(
    table: int, model: str | None = None, pruned: int | None = None, **labels: Label
) -> dict[str, float | None]:
    """The values by column of the one row of a table that has these labels.

    table: 1 to 12. model: the paper's name, such as "mamba2-2.7b". pruned: how many components are gone.
    labels: others that a row has: kind (1, 2, 4 to 7, 9), ratio and target and pruned_ssm (3), state (8, 10 to 12).
    Raises DataError when no row has them, or rows that differ.
    """
    wanted: dict[str, Label] = dict(labels)
    wanted |= {} if model is None else {"model": model}
    wanted |= {} if pruned is None else {"pruned": pruned}
    found = [row for row in rows(table) if wanted.items() <= row.labels.items()]
    if not found:
        raise DataError(f"table {table} has no row with {_words(wanted)}; see paper.rows({table})")
    if any(row.values != found[0].values for row in found):
        raise DataError(f"table {table} has {len(found)} rows with {_words(wanted)}; tell them apart by other labels")
    return dict(found[0].values)


def _words(labels: dict[str, Label]) -> str:
    return ", ".join(f"{name} {value}" for name, value in labels.items()) or "no label"


def _row(names: list[str], values: list[float | None], **labels: Label) -> Row:
    return Row(labels, dict(zip(names, values, strict=True)))


def _by_model(table: int) -> Iterator[Row]:
    kind = {1: "mamba_block", 2: "ssm"}[table]
    for model, entries in _content()[f"table_{table}"].items():
        for entry in entries:
            labels = {name: value for name, value in entry.items() if name != "values"}
            yield _row(columns(), entry["values"], model=model, kind=kind, **labels)


def _granularities() -> Iterator[Row]:
    for entry in _content()["table_3"]:
        labels = {name: value for name, value in entry.items() if name != "values"}
        yield _row(columns(), entry["values"], model="zamba2-2.7b", **labels)


def _hymba() -> Iterator[Row]:
    names = [*_content()["tasks"]["five"], "average"]
    for entry in _content()["table_4"]:
        yield _row(names, entry["values"], model="hymba-1.5b", kind="hymba_block", pruned=entry["pruned"])


def _falcon_mamba() -> Iterator[Row]:
    table = _content()["table_5"]
    for kind in ("mamba_block", "ssm"):
        for entry in [{"pruned": 0, "values": table["dense"]}, *table[kind]]:
            yield _row(columns(), entry["values"], model="falcon-mamba-7b", kind=kind, pruned=entry["pruned"])


def _speedups(table: int) -> Iterator[Row]:
    content = _content()["speedup"][f"table_{table}"]
    for step, values in content["rows"].items():
        label: dict[str, Label] = {"pruned": step} if isinstance(step, int) else {"state": step}
        yield _row(["prefill", "decode"], values, model=content["model"], kind=content["kind"], **label)


def _recovery(table: int) -> Iterator[Row]:
    """States are as the file names them; table 11 has two ratios, which become a label beside the state."""
    content = dict(_content()["recovery"][f"table_{table}"])
    model = content.pop("model")
    for state, values in content.items():
        inner = {state: values} if isinstance(values, list) else values
        label: dict[str, Label] = {} if isinstance(values, list) else {"ratio": float(state)}
        for name, pair in inner.items():
            yield _row(["ppl", "average"], pair, model=model, state=name, **label)
