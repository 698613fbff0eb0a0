"""A small tree of synthetic records: what a finished run of a profile leaves, without a model."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import yaml

from shedder_utils import profiles, records
from shedder_utils.plan import Plan, Removal, Stage
from shedder_utils.profiles import Profile
from shedder_utils.provenance import Code, Cost, Environment
from shedder_utils.records import DataFacts, Metric, ModelFacts, Record, Request

LAYERS, N_ITEMS, DENSE_PARAMETERS, PER_LAYER = 24, 400, 2_000_000, 50_000
TWO = ("pocket-mamba", "pocket-mamba2")


def two_models() -> Profile:
    """The pocket profile as it is for these two models, whatever others it has."""
    settings = profiles.load("pocket")
    studies = {
        name: study.model_copy(update={"rows": {model: rows for model, rows in study.rows.items() if model in TWO}})
        for name, study in settings.studies.items()
        if set(study.rows) & set(TWO)
    }
    models = {name: model for name, model in settings.models.items() if name in TWO}
    others: dict[str, object] = {"beyond": {}, "certainty": None, "pareto": None}
    for what in ("speed", "recovery"):
        tables = {name: table for name, table in getattr(settings, what).tables.items() if table.model in TWO}
        others[what] = getattr(settings, what).model_copy(update={"tables": tables})
    return settings.model_copy(update={"models": models, "studies": studies, **others})


POCKET = two_models()
ENVIRONMENT = Environment(
    python="3.11.1",
    torch="2.13.0",
    transformers="5.23.0",
    lm_eval="0.4.13",
    numba="0.68.1",
    shedder_utils="0.1.0",
    device="cpu",
    cpu="Some CPU",
    threads=2,
    scan="numba",
)


@dataclass
class World:
    """Records of one root: accuracy and perplexity fall and rise at a rate for each (study, model)."""

    root: Path
    profile: Profile = POCKET
    dense_accuracy: float = 0.8
    n_items: int = N_ITEMS
    loss: dict[tuple[str, str], float] = field(default_factory=dict)  # accuracy lost by each removal
    rise: dict[tuple[str, str], float] = field(default_factory=dict)  # log perplexity gained by each removal
    per_removal: int = PER_LAYER  # parameters that each removal takes
    dirty: bool = True

    def write(self) -> World:
        for model in self.profile.models:
            self.store("dense", model, "scores", metrics=self.metrics("dense", model, 0))
            for study in self.studies_of(model):
                self.store(study, model, "search", plan=self.plan(study, model))
                for n in filter(None, self.profile.studies[study].rows[model]):
                    self.store(study, model, f"{n:02d}_removed", n, self.metrics(study, model, n))
        return self

    def finish(self) -> World:
        """Also what `write` leaves out: inventories, and the scores without any SSM."""
        for model in self.profile.models:
            counts = {"ssm/count": Metric(value=LAYERS), "ssm/parameters": Metric(value=LAYERS * PER_LAYER)}
            self.store("inventory", model, "components", metrics=counts)
            self.store("dense", model, "without_ssms", metrics=self.metrics("dense", model, 0))
        return self.write()

    def studies_of(self, model: str) -> list[str]:
        return [name for name, study in self.profile.studies.items() if model in study.rows]

    def plan(self, study: str, model: str) -> Plan:
        settings = self.profile.searches[study]
        kind, steps = settings.kinds[0], settings.steps
        scores = [math.exp(1 + self.rise.get((study, model), 0.05) * n) for n in range(steps + 1)]
        removals = [
            Removal(component=f"{kind}:{LAYERS - n}", score=scores[n], parameters=PER_LAYER)
            for n in range(1, steps + 1)
        ]
        return Plan(removals=removals, dense_score=scores[0], stages=[Stage(kind, steps)], model={"layers": LAYERS})

    def metrics(self, study: str, model: str, n: int) -> dict[str, Metric]:
        found = {}
        for i, column in enumerate(self.profile.evaluation.tasks):
            if column.metric == "perplexity":
                value = 3 * math.exp(self.rise.get((study, model), 0.05) * n)
                found[f"{column.task}/perplexity"] = Metric(value=value, stderr=0.02 * value, n=self.n_items)
            else:
                value = self.dense_accuracy + 0.01 * (i - 4) - self.loss.get((study, model), 0.01) * n
                error = math.sqrt(max(value * (1 - value), 0.0) / self.n_items)
                found[f"{column.task}/{column.metric}"] = Metric(value=value, stderr=error, n=self.n_items)
        return found

    def store(
        self,
        study: str,
        model: str,
        setting: str,
        n: int = 0,
        metrics: dict[str, Metric] | None = None,
        plan: Plan | None = None,
    ) -> Path:
        gone = tuple(map(str, self.plan(study, model).components[:n])) if n else ()
        facts = ModelFacts(
            name=model,
            ref=model,
            dtype="float32",
            fingerprint="f" * 64,
            removals=gone,
            parameters_dense=DENSE_PARAMETERS,
            parameters=DENSE_PARAMETERS - n * self.per_removal,
            ratio=n * self.per_removal / DENSE_PARAMETERS,
        )
        data = {"tasks": DataFacts(name="seven", fingerprint="d" * 64)}
        request = Request(study=study, profile=self.profile.name, setting=setting, spec={}, model=facts, data=data)
        record = Record(
            **dict(request),
            metrics=metrics or {},
            plan=plan.model_dump(mode="json") if plan else None,
            environment=ENVIRONMENT,
            code=Code(commit="c" * 40, dirty=self.dirty),
            cost=Cost(seconds=30, peak_mib=800 + n),
            created=datetime(2025, 1, 1, tzinfo=UTC),
            inputs=request.inputs_fingerprint(),
        )
        return records.write(self.root, record)


BLOCKS_1, BLOCKS_2 = ("block_pruning", "pocket-mamba"), ("block_pruning", "pocket-mamba2")
SSMS_1, SSMS_2 = ("ssm_pruning", "pocket-mamba"), ("ssm_pruning", "pocket-mamba2")
AS_IN_THE_PAPER = {BLOCKS_1: 0.01, BLOCKS_2: 0.06, SSMS_1: 0.05, SSMS_2: 0.002}
RISES_AS_IN_THE_PAPER = {BLOCKS_1: 0.02, BLOCKS_2: 0.2, SSMS_1: 0.2, SSMS_2: 0.01}
OTHER_WAY_ROUND = {BLOCKS_1: 0.06, BLOCKS_2: 0.01, SSMS_1: 0.002, SSMS_2: 0.05}


def small_profile(folder: Path) -> Path:
    """A profile with two models, tables 1 and 2, and nothing that takes time to draw; returns its file."""
    content = yaml.safe_load((profiles.FOLDER / "pocket.yaml").read_text())
    content |= {"name": "small", "speed": None, "recovery": None, "beyond": {}, "certainty": None, "pareto": None}
    content["models"] = {name: content["models"][name] for name in TWO}
    content["studies"] = {name: content["studies"][name] for name in ("block_pruning", "ssm_pruning")}
    for study in content["studies"].values():
        study["rows"] = {model: rows for model, rows in study["rows"].items() if model in content["models"]}
    file = folder / "small.yaml"
    file.write_text(yaml.safe_dump(content))
    return file
