"""Tables as text: Markdown for notebooks and GitHub, LaTeX for papers, CSV for everything else."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from ..files import write_atomically

DASH = "–"
_LATEX = str.maketrans({
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "↓": r"$\downarrow$", "×": r"$\times$",
    "<": r"\textless{}", ">": r"\textgreater{}", DASH: "--",
})  # fmt: skip


@dataclass(frozen=True)
class Table:
    """A table to look at (header and rows of text) with the numbers behind it (`frame`, one line for each of them).

    name: of its files, such as "table_1"; title and note: plain text above and below it.
    """

    name: str
    title: str
    note: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    frame: pd.DataFrame

    def to_markdown(self) -> str:
        """Title, table and note."""
        return f"**{self.title}**\n\n{markdown(self.header, self.rows)}\n{self.note}\n"

    def to_latex(self) -> str:
        """A `table*` as wide as the page; LaTeX numbers it itself."""
        head, *body = [" & ".join(map(escape_latex, row)) + r" \\" for row in (self.header, *self.rows)]
        title, note = escape_latex(self.title.split(". ", 1)[-1]), escape_latex(self.note)
        lines = [
            r"% needs \usepackage{booktabs,graphicx}", r"\begin{table*}", rf"\caption{{{title}}}",
            r"\resizebox{\textwidth}{!}{%", rf"\begin{{tabular}}{{{'l' * len(self.header)}}}", r"\toprule",
            head, r"\midrule", *body, r"\bottomrule", r"\end{tabular}}", rf"\par\footnotesize {note}", r"\end{table*}",
        ]  # fmt: skip
        return "\n".join(lines) + "\n"

    def _repr_markdown_(self) -> str:
        return self.to_markdown()

    def save(self, folder: str | Path) -> list[Path]:
        """Write NAME.md, NAME.csv (the numbers) and NAME.tex. Raises RecordError where they cannot be stored."""
        texts = {
            "md": self.to_markdown(),
            "csv": self.frame.to_csv(index=False, float_format="%.6g", lineterminator="\n"),
            "tex": self.to_latex(),
        }
        paths = [Path(folder, f"{self.name}.{ending}") for ending in texts]
        for path, text in zip(paths, texts.values(), strict=True):
            write_atomically(path, text)
        return paths


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [[cell.replace("|", r"\|") for cell in row] for row in (header, ["---"] * len(header), *rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def escape_latex(text: str) -> str:
    """Text as LaTeX sets it literally."""
    return text.translate(_LATEX)
