"""The plans that the paper's authors released: JSON files, one list for each kind of component.

    {"pruned_mamba_block_idx": [2, 6, 12], "pruned_ssm_idx": [], "pruned_mlp_channels": {"0": 3072, "1": 10240}}

A list is in the order of removal. Mamba blocks, SSMs and what Hymba has are numbered by layer; attention, MLPs and
MLP channels of Zamba2 by hybrid position, as here. `pruned_mlp_channels` gives every MLP's width in the end.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from .components import Component
from .errors import PlanError

KINDS = {
    "pruned_mamba_block_idx": "mamba_block",
    "pruned_hymba_block_idx": "hymba_block",
    "pruned_self_attn_idx": "attention",
    "pruned_mha_idx": "mha",
    "pruned_mlp_idx": "mlp",
    "pruned_moe_idx": "mlp",
    "pruned_mlp_channels": "mlp_channels",
    "pruned_ssm_idx": "ssm",
}
"""The kind of component that each key of the files lists."""
FULL_WIDTHS = {10240, 5504}
"""The MLP widths of Zamba2-2.7B and Hymba-1.5B: an MLP of that width kept all its channels."""


class Step(NamedTuple):
    """One removal of a released plan: see `plan.Removal`."""

    component: Component
    kept: int | None
    stage: int


def read(source: str | Path | Mapping[str, Any]) -> list[Step]:
    """The removals of a released file, or of its content.

    The files keep no order between kinds. Here the stages of table 3 follow each other: blocks, attention and MLPs,
    then MLP channels, then SSMs; stages that remove nothing do not count.
    Raises PlanError for a file that cannot be read, an unknown key, and what is not an index or a width.
    """
    where = "released plan" if isinstance(source, Mapping) else f"released plan {source}"
    content = source if isinstance(source, Mapping) else _content(source, where)
    unknown = [key for key in content if key not in KINDS]
    if unknown or not content:
        found = f"key {unknown[0]!r} is unknown" if unknown else "it is empty"
        raise PlanError(f"{where}: {found}: expected {', '.join(KINDS)}")
    whole: list[tuple[Component, int | None]] = []
    ssms: list[tuple[Component, int | None]] = []
    for key, kind in KINDS.items():
        if kind != "mlp_channels":
            indices = _indices(content.get(key, []), f"{where}: {key}")
            (ssms if kind == "ssm" else whole).extend((Component(kind, index), None) for index in indices)
    mlps = {component.index for component, _ in whole if component.kind == "mlp"}
    channels = list(_channels(content.get("pruned_mlp_channels", {}), mlps, f"{where}: pruned_mlp_channels"))
    stages = [stage for stage in (whole, channels, ssms) if stage]
    return [Step(component, kept, number) for number, stage in enumerate(stages) for component, kept in stage]


def _content(path: str | Path, where: str) -> Mapping[str, Any]:
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise PlanError(f"{where} cannot be read ({error.strerror}): check the path") from error
    except ValueError as error:
        raise PlanError(f"{where} is not JSON ({error}): expected a file of the authors' release") from error
    if not isinstance(content, dict):
        raise PlanError(f"{where} holds a {type(content).__name__}: expected keys such as 'pruned_ssm_idx'")
    return content


def _indices(found: Any, where: str) -> list[int]:
    if not isinstance(found, list) or not all(_is_count(index) for index in found):
        raise PlanError(f"{where}: {str(found)[:80]} is not a list of indices from 0 up")
    if len(set(found)) < len(found):
        raise PlanError(f"{where}: {next(i for i in found if found.count(i) > 1)} is removed more than once")
    return found


def _channels(found: Any, gone: set[int], where: str) -> Iterator[tuple[Component, int]]:
    """The MLPs that lost some of their channels, and the width left; `gone`: those removed whole, listed uncut."""
    if not isinstance(found, Mapping):
        raise PlanError(f"{where}: {str(found)[:80]} is not a map from MLP to width")
    for position, width in found.items():
        if not (str(position).isdecimal() and _is_count(width) and width > 0):
            raise PlanError(f"{where}: {position!r}: {width!r} is not an MLP and its width")
    widths = {int(position): width for position, width in found.items()}
    full = FULL_WIDTHS | {width for position, width in widths.items() if position in gone}
    for position, width in sorted(widths.items()):
        if position not in gone and width not in full:
            yield Component("mlp_channels", position), width


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
