"""Mamba-Shedder, reproduced: find what a selective state space model can do without, remove it, measure the rest."""

from . import kernels
from .calibration import Calibration, calibrate
from .components import Component
from .errors import DataError, ModelError, PlanError, ProfileError, RecordError, ShedderError
from .evaluation import Scores, evaluate
from .importance import perplexity
from .inventory import describe
from .loading import load_model
from .plan import Plan, Removal, Stage
from .removal import components, removed
from .search import search
from .surgery import extract, save_pruned

__all__ = [
    "Calibration", "Component", "DataError", "ModelError", "Plan", "PlanError", "ProfileError", "RecordError",
    "Removal", "Scores", "ShedderError", "Stage", "calibrate", "components", "describe", "evaluate", "extract",
    "kernels", "load_model", "perplexity", "removed", "save_pruned", "search",
]  # fmt: skip
