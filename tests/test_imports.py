"""Importing the package: quick where no model is needed, and a public function keeps its name beside a module's."""

from __future__ import annotations

import importlib
import inspect
import os
import subprocess
import sys

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
