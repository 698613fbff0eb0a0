"""Importing the package: quick where no model is needed, and a public function keeps its name beside a module's."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import shedder_utils

LIGHT = """
import sys
import shedder_utils.__main__, shedder_utils.notebooks, shedder_utils.report
heavy = {"torch", "transformers", "numba", "lm_eval", "datasets", "matplotlib"} & set(sys.modules)
assert not heavy, heavy
"""


def test_commands_and_report_start_without_torch() -> None:
    finished = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True)
    assert (finished.returncode, finished.stderr) == (0, "")


LAYERS = (
    ("studies",), ("search", "surgery", "evaluation", "benchmark"), ("removal", "loading", "importance", "calibration"),
    ("families",), ("plan", "components", "kernels"),
)  # fmt: skip
"""What imports only from the same line and from those below, as CONTRIBUTING.md says."""
PACKAGE = Path(shedder_utils.__file__).parent
MODULES = {
    ".".join(file.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): file
    for file in PACKAGE.rglob("*.py")
    if file != PACKAGE / "__init__.py"
}


@cache
def imported(name: str) -> set[str]:
    """The modules of the package that one of them imports, at its top or in a function."""
    file, found = MODULES[name], set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            folder = file.relative_to(PACKAGE).parts[:-1]
            base = [*folder[: len(folder) - node.level + 1], *(node.module or "").split(".")]
            for alias in node.names:
                names = [".".join(filter(None, parts)) for parts in ([*base, alias.name], base)]
                found |= {next((one for one in names if one in MODULES), name)}
    return found - {name}


def reached(name: str) -> set[str]:
    """All that comes with a module."""
    found, todo = {name}, [name]
    while todo:
        new = imported(todo.pop()) - found
        found |= new
        todo += new
    return found


def test_imports_point_downwards() -> None:
    level = {name: depth for depth, names in enumerate(LAYERS) for name in names}
    below = {name: reached(name) for name in MODULES if name.partition(".")[0] in level}
    assert {"search", "surgery", "loading", "families.mamba2", "plan", "kernels.ssd"} <= below["studies"]
    for name, others in below.items():
        depth = level[name.partition(".")[0]]
        assert not [one for one in others if level.get(one.partition(".")[0], depth) < depth], name


def test_every_public_name_is_there() -> None:
    assert set(dir(shedder_utils)) == set(shedder_utils.__all__)
    for name in shedder_utils.__all__:
        assert getattr(shedder_utils, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'prune'"):
        shedder_utils.prune  # noqa: B018


@pytest.mark.parametrize("name", ["benchmark", "components", "search"])
def test_a_module_does_not_hide_the_function_of_its_name(name: str) -> None:
    setattr(shedder_utils, name, importlib.import_module(f"shedder_utils.{name}"))  # as an import of the module does
    assert inspect.isfunction(getattr(shedder_utils, name))


@pytest.mark.parametrize(("before", "after"), [(None, "10000"), ("7", "7")])
def test_threads_do_not_spin_for_long_unless_told_to(before: str | None, after: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    environment |= {} if before is None else {"GOMP_SPINCOUNT": before}
    code = "import os, shedder_utils; print(os.environ['GOMP_SPINCOUNT'])"
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == after
