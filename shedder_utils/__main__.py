"""The command line: `python -m shedder_utils run` and `report`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from .errors import ShedderError

app = typer.Typer(
    add_completion=False, no_args_is_help=True, help="Mamba-Shedder, reproduced.", pretty_exceptions_enable=False
)

Profile = Annotated[str, typer.Option(help="A profile's name, or the path of a YAML file.")]
Output = Annotated[Path, typer.Option(help="The folder for records, tables, figures and notebooks.")]


@app.command("run")
def run_notebooks(
    profile: Profile = "pocket",
    models: Annotated[str, typer.Option(help="Only these models of the profile, separated by commas.")] = "",
    studies: Annotated[str, typer.Option(help="Only these studies, separated by commas.")] = "",
    output: Output = Path("runs"),
) -> None:
    """Run the studies that are not recorded yet, through the notebooks, and print where tables and figures are."""
    from .notebooks import run

    for path in run(profile, models=_names(models), studies=_names(studies), output=output):
        print(path)


@app.command("report")
def rebuild_report(profile: Profile = "pocket", output: Output = Path("runs")) -> None:
    """Rebuild tables, figures and verdicts from the records, without a model, and print where they are."""
    from .report import build

    for path in build(profile, output):
        print(path)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def main() -> None:
    """Run a command; a mistake in the input ends it with one line on stderr."""
    try:
        app()
    except ShedderError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
