"""Recipes: the settings of a recovery tuning, with those of the paper as defaults (section 4.5, table 13).

Full tuning has the settings that the authors released for Mamba-2, LoRA those for Zamba2.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError, model_validator

from .errors import DataError

Method = Literal["full", "lora"]
DEFAULTS: dict[str, dict[str, Any]] = {
    "full": {"epochs": 1.0, "learning_rate": 5e-5, "loss_on": "all"},
    "lora": {
        "epochs": 2.0, "learning_rate": 1e-4, "loss_on": "response", "rank": 16, "alpha": 32,
        "targets": ("input", "output"),
    },
}  # fmt: skip
"""What the paper sets for each method. The released Mamba-2 trainer masks the prompt, yet its loss is on all tokens."""
OF_LORA = ("rank", "alpha", "targets")


class Recipe(BaseModel):
    """How to tune. `DEFAULTS` has what the method decides; the rest is the paper's for all models.

    epochs: passes over the data; steps: updates instead, if given. batch_size: rows per forward pass; accumulation:
    forward passes per update. warmup_steps: the learning rate rises for so long, then falls linearly to 0.
    max_length: tokens of a row, the rest is cut off. held_out: rows that are never trained on. loss_on: "all" tokens or
    the "response" only. rank, alpha, targets: LoRA's, with targets by role: "input" and "output" projections of the
    mixers, "mlp". evaluate_every: steps between held-out losses and checkpoints. patience: so many held-out losses in a
    row without a new best end the tuning; None never.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: Method = "full"
    epochs: float = Field(gt=0)
    steps: PositiveInt | None = None
    batch_size: PositiveInt = 32
    accumulation: PositiveInt = 1
    learning_rate: float = Field(gt=0)
    warmup_steps: NonNegativeInt = 100
    weight_decay: float = Field(default=0.0, ge=0)
    max_length: int = Field(default=256, ge=2)
    held_out: PositiveInt = 2000
    loss_on: Literal["all", "response"]
    rank: PositiveInt | None = None
    alpha: PositiveInt | None = None
    targets: tuple[Literal["input", "output", "mlp"], ...] | None = Field(default=None, min_length=1)
    evaluate_every: PositiveInt = 100
    patience: PositiveInt | None = None
    seed: int = 42

    @model_validator(mode="before")
    @classmethod
    def _with_defaults(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        unknown = sorted(set(values) - set(cls.model_fields))
        if unknown:
            raise ValueError(f"unknown key {unknown[0]!r}, expected one of {', '.join(cls.model_fields)}")
        method = values.get("method", "full")
        of_lora = [name for name in OF_LORA if values.get(name) is not None]
        if method == "full" and of_lora:
            raise ValueError(f"{of_lora[0]} belongs to method 'lora', the method is 'full'")
        given = {name: value for name, value in values.items() if value is not None}
        return {**DEFAULTS.get(str(method), {}), **given}

    @classmethod
    def of(cls, **settings: Any) -> Recipe:
        """The recipe of some settings. Raises DataError for one that is unknown or out of its range, naming it."""
        try:
            return cls(**settings)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            message = first["msg"].removeprefix("Value error, ")
            raise DataError(f"recover: {place + ': ' if place else ''}{message}") from error

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that is set, as JSON holds it."""
        return self.model_dump(mode="json", exclude_none=True)
