"""Settings of what the paper did not ask: how sure an order is, and what each strategy buys in speed."""

from itertools import product
from typing import NamedTuple

from pydantic import Field, PositiveInt

from ..records import Name
from .strict import Settings

CERTAINTY, PARETO = "certainty", "pareto"
"""The names of these studies."""


class Draw(NamedTuple):
    """Calibration data by its source, the number of sequences and the seed."""

    source: str
    sequences: int
    seed: int


class Certainty(Settings):
    """One search with each source, size and seed of calibration data, for each model.

    kind: what competes; steps: how many go. sources: how many texts of each are drawn; sequences: how many sequences
    of them are taken; the others are as for a calibration.
    """

    models: tuple[str, ...] = Field(min_length=1)
    kind: str
    steps: PositiveInt
    sources: dict[Name, PositiveInt] = Field(min_length=1)
    sequences: tuple[PositiveInt, ...] = Field(min_length=1)
    seeds: tuple[int, ...] = Field(min_length=2)
    sequence_length: PositiveInt
    batch_size: PositiveInt

    @property
    def draws(self) -> dict[str, Draw]:
        """Every draw by its name, such as "pocket-prose-12-1"."""
        found = [Draw(*draw) for draw in product(self.sources, self.sequences, self.seeds)]
        return {f"{draw.source}-{draw.sequences}-{draw.seed}": draw for draw in found}


class Pareto(Settings):
    """A model less what each of these studies removes in its rows, all timed in one run; see `benchmark`."""

    model: str
    studies: tuple[str, ...] = Field(min_length=1)
    prompt_tokens: PositiveInt
    new_tokens: int = Field(ge=2)
    batches: PositiveInt
