"""Profiles: one YAML file says which models, data, tasks and studies a run is made of.

The package ships `pocket` (the default), `smoke` (tests), `paper` (the paper's own models, for GPUs) and `laptop`
(small public models); any path to a YAML file works as well. Every key is checked before anything starts, and an
unknown one is refused.
"""

from functools import lru_cache
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, NonNegativeInt, PositiveInt, ValidationError, model_validator

from .. import paper
from ..errors import ProfileError
from ..recipe import Recipe
from ..records import Name
from .beyond import CERTAINTY as CERTAINTY
from .beyond import PARETO as PARETO
from .beyond import Certainty as Certainty
from .beyond import Pareto as Pareto
from .pruning import RELEASED as RELEASED
from .pruning import ReleasedOrder as ReleasedOrder
from .pruning import StageSettings as StageSettings
from .pruning import Strategy as Strategy
from .pruning import Study as Study
from .strict import Settings as _Settings

FOLDER = Path(__file__).parent
DEFAULT = "pocket"
"""The profile of whoever names none."""
INVENTORY, DENSE, SPEED, RECOVERY = "inventory", "dense", "speed", "recovery"
"""The names of the studies beside the pruning studies: what models hold, how they score as they are, how fast they are
with parts removed, and tuned again."""
SEARCH, SAVINGS = "search", "savings"
"""Of a pruning study, the records of its search and of what components save, as that search weighs them."""


class RandomModel(_Settings):
    """An untrained model, built on the spot; hidden_size is the model width D."""

    family: str
    layers: PositiveInt
    hidden_size: PositiveInt
    seed: int


class CalibrationChanges(_Settings):
    """What one model's calibration has of its own."""

    sequence_length: PositiveInt
    batch_size: PositiveInt


class ProfileModel(_Settings):
    """One model: what to load (`ref`) or to build (`random`), and the paper's model it stands for.

    revision: of a Hub id. shape: the published config.json, so that costs are known before the download; download_gb:
    the size of its files. calibration: where it differs from the profile's. accuracy: the metric of all its accuracies,
    where the paper's table of this model has one of its own.
    """

    family: str
    paper: str
    ref: str | None = None
    revision: str | None = None
    random: RandomModel | None = None
    shape: dict[str, Any] | None = None
    download_gb: float = Field(default=0.0, ge=0)
    calibration: CalibrationChanges | None = None
    accuracy: str | None = None

    @model_validator(mode="after")
    def _check(self) -> "ProfileModel":
        if (self.ref is None) == (self.random is None):
            raise ValueError("expected one of 'ref' and 'random'")
        if self.paper not in paper.models():
            raise ValueError(f"the paper has no model {self.paper!r}, expected one of {', '.join(paper.models())}")
        return self


class CalibrationSettings(_Settings):
    """What `calibrate` is given: a data source, and how many sequences of how many tokens."""

    source: str
    samples: PositiveInt
    sequence_length: PositiveInt
    batch_size: PositiveInt
    seed: int


class Column(_Settings):
    """A column of the paper's tables, the lm-eval task and metric that fill it, and the accuracy of guessing."""

    column: str
    task: str
    metric: str
    chance: float = Field(default=0.0, ge=0, lt=1)


class EvaluationSettings(_Settings):
    """The tasks in the order of the paper's columns; limit is the number of items per task, None for all.

    prose: held-out text whose perplexity is measured as well.
    """

    tasks: tuple[Column, ...]
    prose: CalibrationSettings
    limit: PositiveInt | None = None
    batch_size: PositiveInt

    @property
    def task_names(self) -> list[str]:
        """Each lm-eval task once, in order."""
        return list(dict.fromkeys(column.task for column in self.tasks))


class SpeedTable(_Settings):
    """One of tables 6 to 9, or one beside them: a model less some of a study's removals, timed against the dense one.

    rows: after how many removals, and the paper's row that each stands beside, by its number or its name, if any.
    """

    study: str
    model: str
    new_tokens: int = Field(ge=2)
    rows: dict[NonNegativeInt, int | str | None]


class Speed(_Settings):
    """How speed is measured: the prompt's tokens, rounds that count, and what for each table, by number or name."""

    prompt_tokens: PositiveInt
    batches: PositiveInt
    tables: dict[PositiveInt | Name, SpeedTable]


class RecoveryRow(_Settings):
    """A model after some of a study's removals, which is tuned again.

    stands_for: the paper's number of removals, in table 11 its ratio; None for a row that the paper does not have.
    """

    study: str
    removed: PositiveInt
    stands_for: float | None = None

    @property
    def state(self) -> str:
        """Its name in records: study and count."""
        return f"{self.study}_{self.removed:02d}"


class RecoveryTable(_Settings):
    """One of tables 10 to 12: a model, how it is tuned, and from which states; the dense one is tuned as well."""

    model: str
    recipe: Recipe
    rows: tuple[RecoveryRow, ...] = Field(min_length=1)


class Recovery(_Settings):
    """Recovery tuning: the instructions, a name or path as `instructions.instructions` takes it, and the tables."""

    source: str
    tables: dict[Annotated[int, Field(ge=10, le=12)], RecoveryTable]


class Profile(_Settings):
    """All settings of a run; models and studies are by name.

    papers_own_models: whether the models are those of the paper itself, so that a claim can fail on them and not just
    stay unseen. device, dtype: where models run and as what; None takes what `load_model` takes. search_gib: what a
    search may hold beside the model; None leaves it to `search`. threads: of the process that runs the notebooks; None
    takes what torch takes. released: the orders that the authors released, scored without a search. beyond, certainty,
    pareto: what the paper did not ask.
    """

    name: str
    title: str
    papers_own_models: bool = False
    device: Literal["cpu", "cuda"] = "cpu"
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    search_gib: float | None = Field(default=None, gt=0)
    threads: PositiveInt | None = None
    models: dict[str, ProfileModel]
    calibration: CalibrationSettings
    evaluation: EvaluationSettings
    studies: dict[str, Study]
    speed: Speed | None = None
    recovery: Recovery | None = None
    released: tuple[ReleasedOrder, ...] = ()
    beyond: dict[Name, Strategy] = Field(default_factory=dict)
    certainty: Certainty | None = None
    pareto: Pareto | None = None

    @property
    def study_names(self) -> tuple[str, ...]:
        """All studies of the profile: the pruning studies with what comes before and after them, where it is set."""
        set_apart = {
            RELEASED: self.released, SPEED: self.speed, RECOVERY: self.recovery, CERTAINTY: self.certainty,
            PARETO: self.pareto,
        }  # fmt: skip
        return (INVENTORY, DENSE, *self.searches, *(name for name, settings in set_apart.items() if settings))

    @property
    def searches(self) -> dict[str, Study | Strategy]:
        """All pruning studies, the paper's and those beyond it."""
        return {**self.studies, **self.beyond}

    def calibration_of(self, model: str) -> CalibrationSettings:
        """The calibration settings of a model."""
        changes = self.models[model].calibration
        return self.calibration.model_copy(update=changes.model_dump() if changes else {})

    def calibration_in(self, study: str, model: str) -> CalibrationSettings:
        """The calibration settings of a study's search on a model."""
        samples = self.beyond[study].samples if study in self.beyond else None
        return self.calibration_of(model).model_copy(update={"samples": samples} if samples else {})

    def metric_of(self, model: str, column: Column) -> str:
        """The lm-eval metric that fills a column for a model."""
        own = self.models[model].accuracy if model in self.models else None
        return own if own and column.metric != "perplexity" else column.metric

    def accuracies_of(self, model: str) -> list[str]:
        """The columns whose mean is the average of a model: those of the paper's tables of the one it stands for."""
        return paper.accuracies(self.models[model].paper)

    def chance_of(self, model: str) -> float:
        """The average of guessing, as a fraction, over the same columns."""
        averaged = self.accuracies_of(model)
        return fmean(column.chance for column in self.evaluation.tasks if column.column in averaged)

    @model_validator(mode="after")
    def _check(self) -> "Profile":
        for name, study in self.searches.items():
            for model in study.rows:
                if model not in self.models:
                    known = ", ".join(self.models)
                    raise ValueError(f"rows of study {name}: no model {model!r}, expected one of {known}")
        for one in self.released:
            if one.model not in self.models or not one.order.startswith(self.models[one.model].paper):
                raise ValueError(f"released: order {one.order} is not one of a model {one.model!r}")
        for number, table in self.speed.tables.items() if self.speed else ():
            if table.study not in self.studies or table.model not in self.studies[table.study].rows:
                raise ValueError(f"speed, table {number}: no study {table.study!r} of a model {table.model!r}")
        for number, tuned in self.recovery.tables.items() if self.recovery else ():
            for row in tuned.rows:
                pruned = self.studies.get(row.study)
                if pruned is None or row.removed not in pruned.rows.get(tuned.model, {}):
                    where = f"{tuned.model} with {row.removed} removed"
                    raise ValueError(f"recovery, table {number}: {where} is no row of a study {row.study!r}")
        if self.pareto is not None:
            for name in self.pareto.studies:
                if name not in self.searches or self.pareto.model not in self.searches[name].rows:
                    raise ValueError(f"pareto: no study {name!r} of a model {self.pareto.model!r}")
        for model in self.certainty.models if self.certainty else ():
            if model not in self.models:
                raise ValueError(f"certainty: no model {model!r}, expected one of {', '.join(self.models)}")
        return self


def names() -> list[str]:
    """The profiles that ship with the package."""
    return sorted(file.stem for file in FOLDER.glob("*.yaml"))


def load(name_or_path: str | Path | Profile) -> Profile:
    """Read a profile by name, or from the path of a YAML file; one that is read already is given back.

    Raises ProfileError when it does not exist or does not fit, naming the key.
    """
    if isinstance(name_or_path, Profile):
        return name_or_path
    file = Path(name_or_path)
    if file.suffix not in (".yaml", ".yml"):
        file = FOLDER / f"{name_or_path}.yaml"
    try:
        return _read(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ProfileError(
            f"profile {name_or_path}: not found; expected one of {', '.join(names())} or the path of a YAML file"
        ) from error
    except yaml.YAMLError as error:
        raise ProfileError(f"profile {name_or_path}: is not YAML: {' '.join(str(error).split())}") from error
    except ValidationError as error:
        raise ProfileError(f"profile {name_or_path}: {_explain(error)}") from error


@lru_cache
def _read(text: str) -> Profile:
    """The profile that a file's text says, read once: every table and figure asks for it again."""
    return Profile.model_validate(yaml.safe_load(text))


def _explain(error: ValidationError) -> str:
    """The first thing wrong with a profile: where, and what was expected."""
    first = error.errors()[0]
    place = ".".join(str(key) for key in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    return f"in {place}: {message}" if place else message
