"""Tables as text: Markdown for notebooks and GitHub, LaTeX for papers, CSV for everything else.

Beside everything that is shown lies a sidecar, a JSON file that names the records behind it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from .. import records
from ..files import write_atomically
from ..records import Record

DASH = "–"
_LATEX = str.maketrans({
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "↓": r"$\downarrow$", "×": r"$\times$",
    "<": r"\textless{}", ">": r"\textgreater{}", DASH: "--",
})  # fmt: skip


@dataclass(frozen=True)
class Table:
    """A table to look at (header and rows of text) with the numbers behind it (`frame`, one line for each of them).

    name: of its files, such as "table_1"; title and note: plain text above and below it; records, recorded: those
    behind your numbers, and behind the recorded ones.
    """

    name: str
    title: str
    note: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    frame: pd.DataFrame
    records: tuple[Record, ...] = field(default=(), repr=False)  # a notebook keeps the repr
    recorded: tuple[Record, ...] = field(default=(), repr=False)

    @property
    def _below(self) -> str:
        return f"{self.note}{scored_with(recorded=self.recorded, yours=self.records)}"

    def to_markdown(self) -> str:
        """Title, table and note, with the version that scored."""
        return f"**{self.title}**\n\n{markdown(self.header, self.rows)}\n{self._below}\n"

    def to_latex(self) -> str:
        """A `table*` as wide as the page; LaTeX numbers it itself."""
        head, *body = [" & ".join(map(escape_latex, row)) + r" \\" for row in (self.header, *self.rows)]
        title, note = escape_latex(self.title.split(". ", 1)[-1]), escape_latex(self._below)
        lines = [
            r"% needs \usepackage{booktabs,graphicx}", r"\begin{table*}", rf"\caption{{{title}}}",
            r"\resizebox{\textwidth}{!}{%", rf"\begin{{tabular}}{{{'l' * len(self.header)}}}", r"\toprule",
            head, r"\midrule", *body, r"\bottomrule", r"\end{tabular}}", rf"\par\footnotesize {note}", r"\end{table*}",
        ]  # fmt: skip
        return "\n".join(lines) + "\n"

    def _repr_markdown_(self) -> str:
        return self.to_markdown()

    def save(self, folder: str | Path) -> list[Path]:
        """Write NAME.md, NAME.csv (the numbers), NAME.tex and NAME.json (the records behind them).

        Raises RecordError where they cannot be stored.
        """
        sources = f"\nRecords: {', '.join(map(place, self.records))}.\n" if self.records else ""
        texts = {
            "md": self.to_markdown() + sources,
            "csv": self.frame.to_csv(index=False, float_format="%.6g", lineterminator="\n"),
            "tex": self.to_latex(),
            "json": sidecar({"table": self.name, "caption": self.title}, self.records, recorded=self.recorded),
        }
        return save(texts, folder, self.name)


def save(texts: dict[str, str], folder: str | Path, name: str) -> list[Path]:
    """Write texts, by the endings of their files. Raises RecordError where they cannot be stored."""
    paths = [Path(folder, f"{name}.{ending}") for ending in texts]
    for path, text in zip(paths, texts.values(), strict=True):
        write_atomically(path, text)
    return paths


def sidecar(about: dict[str, Any], shown: Iterable[Record], **more: Iterable[Record]) -> str:
    """The text of a sidecar: what it is about, then the places, inputs and checksums of the records shown."""
    lists = {name: [_source(record) for record in found] for name, found in {"records": shown, **more}.items()}
    return json.dumps({**about, **lists}, indent=2, ensure_ascii=False) + "\n"


def _source(record: Record) -> dict[str, str]:
    return {"record": place(record), "inputs": record.inputs, "checksum": records.checksum(record)}


def place(record: Record) -> str:
    """Where a record lies under its root."""
    return records.path("", record.profile, record.study, record.model.name, record.setting).as_posix()


def scored_with(**found: Iterable[Record]) -> str:
    """The version of lm-eval behind the scores among some records, as a sentence to go on with; empty without scores.

    found: records by whose they are, which is said where the versions differ.
    """
    scored = {whose: [record for record in shown if "tasks" in record.data] for whose, shown in found.items()}
    versions = {
        whose: " and ".join(sorted({f"{record.environment.lm_eval}" for record in shown}))
        for whose, shown in scored.items()
        if shown
    }
    if len(set(versions.values())) > 1:
        versions = {whose: f"{version} ({whose})" for whose, version in versions.items()}
    return f" Scored with lm-eval {', '.join(dict.fromkeys(versions.values()))}." if versions else ""


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [[cell.replace("|", r"\|") for cell in row] for row in (header, ["---"] * len(header), *rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def escape_latex(text: str) -> str:
    """Text as LaTeX sets it literally."""
    return text.translate(_LATEX)
