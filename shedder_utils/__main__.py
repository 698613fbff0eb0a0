"""The command line: `python -m shedder_utils`; `commands/` has what is not about a whole profile."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from . import commands, profiles
from .commands.options import finish, say
from .commands.planning import warn_of_slow_scan
from .errors import ModelError, ShedderError

app = typer.Typer(
    add_completion=False, no_args_is_help=True, help="Mamba-Shedder, reproduced.", pretty_exceptions_enable=False
)

SHARED = ("search", "evaluate")
"""The commands that several processes can share; each would do all of the work of another."""

Profile = Annotated[str, typer.Option(help="A profile's name, or the path of a YAML file.")]
Output = Annotated[Path, typer.Option(help="The folder for records, tables, figures and notebooks.")]


@app.callback()
def check_alone(context: typer.Context) -> None:
    """Raises ModelError for a command that several processes were started with and cannot share."""
    if "TORCHELASTIC_RUN_ID" in os.environ and context.invoked_subcommand not in SHARED:
        raise ModelError(
            f"torchrun or accelerate started several processes, which only {' and '.join(SHARED)} can share: give this "
            "command to python alone"
        )


@app.command("run")
def run_notebooks(
    profile: Profile = profiles.DEFAULT,
    models: Annotated[str, typer.Option(help="Only these models of the profile, separated by commas.")] = "",
    studies: Annotated[str, typer.Option(help="Only these studies, separated by commas.")] = "",
    output: Output = Path("runs"),
) -> None:
    """Run the studies that are not recorded yet, through the notebooks, and say where tables and figures are."""
    from .notebooks import run

    warn_of_slow_scan(profile)
    _written(profile, run(profile, models=_names(models), studies=_names(studies), output=output))


@app.command("report")
def rebuild_report(profile: Profile = profiles.DEFAULT, output: Output = Path("runs")) -> None:
    """Rebuild tables, figures and verdicts from the records, without a model, and say where they are."""
    from .report import build

    _written(profile, build(profile, output))


@app.command("verify")
def verify_records(profile: Profile = profiles.DEFAULT, output: Output = Path("runs")) -> None:
    """Check your records against the recorded ones and the paper, and that what is recorded is whole."""
    from .report.verify import summary, verify

    found = verify(profile, output)
    for line in (*found, summary(found)):
        say(str(line))
    broken = any(finding.fatal for finding in found)
    finish({"profile": profile, "broken": broken, "findings": [asdict(finding) for finding in found]})
    if broken:
        raise typer.Exit(1)


@app.command("record")
def record_run(profile: Profile = profiles.DEFAULT, output: Output = Path("runs")) -> None:
    """For maintainers: make a finished run the recorded one, ready to commit, and say which files were written."""
    from .recording import record

    _written(profile, record(profile, output))


def _written(profile: str, files: Sequence[Path]) -> None:
    """Say which files a command left, for people and for programs."""
    for file in files:
        say(str(file))
    finish({"profile": profile, "files": [str(file) for file in files]})


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


commands.register(app)


def main() -> None:
    """Run a command; a mistake in the input ends it with one line on stderr."""
    try:
        app()
    except ShedderError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
