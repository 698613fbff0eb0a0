"""The commands beside `run` and `report`: pruning a model of one's own, measuring it, and asking what a run takes.

Each command writes its results to files, its progress to stderr, and one line of JSON to stdout. A mistake in the input
raises ShedderError, which `__main__` turns into one line on stderr and exit code 1; wrong usage exits with 2.
"""

import typer

from . import measuring, planning, pruning


def register(app: typer.Typer) -> None:
    """Add the commands of this package to the command line."""
    for name, command in {**pruning.COMMANDS, **measuring.COMMANDS, **planning.COMMANDS}.items():
        app.command(name)(command)
