"""Mamba-Shedder, reproduced: find what a selective state space model can do without, remove it, measure the rest.

A public name is imported when it is first asked for, so that the command line and the report start without torch.
"""

import os
import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import kernels
    from .benchmark import benchmark
    from .calibration import Calibration, calibrate
    from .channels import order_channels
    from .components import Component
    from .errors import DataError, ModelError, PlanError, ProfileError, RecordError, ShedderError
    from .evaluation import Scores, evaluate
    from .importance import perplexity
    from .inventory import describe
    from .loading import load_model
    from .plan import Plan, Removal, Stage
    from .recovery import recover
    from .removal import components, removed
    from .search import search
    from .surgery import extract, save_pruned

# Threads of GNU's OpenMP, which torch computes with, wait for each other by spinning, by default for so long that one
# other busy process makes a model on two cores twenty times slower. So little of it costs a tenth on a quiet machine.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

__all__ = [
    "Calibration", "Component", "DataError", "ModelError", "Plan", "PlanError", "ProfileError", "RecordError",
    "Removal", "Scores", "ShedderError", "Stage", "benchmark", "calibrate", "components", "describe", "evaluate",
    "extract", "kernels", "load_model", "order_channels", "perplexity", "recover", "removed", "save_pruned", "search",
]  # fmt: skip

_NAMES = {
    "benchmark": ("benchmark",),
    "calibration": ("Calibration", "calibrate"),
    "channels": ("order_channels",),
    "components": ("Component",),
    "errors": ("DataError", "ModelError", "PlanError", "ProfileError", "RecordError", "ShedderError"),
    "evaluation": ("Scores", "evaluate"),
    "importance": ("perplexity",),
    "inventory": ("describe",),
    "loading": ("load_model",),
    "plan": ("Plan", "Removal", "Stage"),
    "recovery": ("recover",),
    "removal": ("components", "removed"),
    "search": ("search",),
    "surgery": ("extract", "save_pruned"),
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names}


class _Package(ModuleType):
    """This package, in which a module does not hide the public function of its name, such as `search`."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _MODULE_OF and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name == "kernels":
        return import_module(".kernels", __name__)
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
