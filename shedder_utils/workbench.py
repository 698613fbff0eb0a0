"""The workbench of a study: one model of a profile with its data, and where its records go.

A run that is recorded with the same inputs is not repeated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from . import kernels, profiles
from .calibration import Calibration, calibrate
from .components import Cut
from .errors import ProfileError
from .families import random_model
from .files import in_project
from .inventory import ratio
from .loading import fingerprint, load_model
from .pocket.tokenizer import load_tokenizer
from .profiles import Profile
from .records import DataFacts, ModelFacts, Outcome, Record, Request, recorded
from .removal import removed
from .schedule import report_progress

_ON_ACCELERATOR: WeakSet[Workbench] = WeakSet()
"""The workbench whose model is on the accelerator, if one is."""


class Workbench:
    """One model of a profile with its data, and where its records go.

    profile: a name, a path, or one that is read already; model: a name in it; output: the folder of the records, from
    the project's root. Raises ProfileError for a model that the profile does not have.
    """

    def __init__(self, profile: str | Path | Profile, model: str, output: str | Path = "runs") -> None:
        self.profile = profiles.load(profile)
        if model not in self.profile.models:
            raise ProfileError(
                f"profile {profile}: no model {model!r}, expected one of {', '.join(self.profile.models)}"
            )
        self.name, self.output = model, in_project(output)

    @cached_property
    def _loaded(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        self._take_accelerator()
        settings = self.profile.models[self.name]
        if settings.random is not None:
            kernels.install()
            tokenizer = load_tokenizer()
            return random_model(**settings.random.model_dump(), vocab_size=len(tokenizer)), tokenizer
        dtype = getattr(torch, self.profile.dtype) if self.profile.dtype else None
        model, tokenizer = load_model(
            settings.ref or self.name, device=self.profile.device, dtype=dtype, revision=settings.revision
        )
        if tokenizer is None:
            raise ProfileError(f"profile {self.profile.name}: model {self.name} has no tokenizer, studies need one")
        return model, tokenizer

    def _take_accelerator(self) -> None:
        """Set the model aside that another workbench has on the accelerator: one at a time is what `plan` counts on."""
        if self.profile.device == "cpu" or self in _ON_ACCELERATOR:
            return
        for other in _ON_ACCELERATOR:
            other._move("cpu")
        _ON_ACCELERATOR.clear()
        _ON_ACCELERATOR.add(self)
        self._move(self.profile.device)

    def _move(self, device: str) -> None:
        """Move the model, if it is loaded."""
        if "_loaded" in vars(self):
            self._loaded[0].to(device)

    @property
    def model(self) -> PreTrainedModel:
        """The dense model, loaded when first asked for; other workbenches' models leave the accelerator to it."""
        self._take_accelerator()
        return self._loaded[0]

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        return self._loaded[1]

    @cached_property
    def calibration(self) -> Calibration:
        """The calibration data of the profile."""
        return calibrate(tokenizer=self.tokenizer, **self.profile.calibration_of(self.name).model_dump())

    def calibration_in(self, study: str) -> Calibration:
        """The calibration data of a study's search."""
        wanted = self.profile.calibration_in(study, self.name)
        if wanted == self.profile.calibration_of(self.name):
            return self.calibration
        return calibrate(tokenizer=self.tokenizer, **wanted.model_dump())

    @cached_property
    def prose(self) -> Calibration:
        """The held-out prose of the profile."""
        return calibrate(tokenizer=self.tokenizer, **self.profile.evaluation.prose.model_dump())

    @cached_property
    def _fingerprint(self) -> str:
        return fingerprint(self.model)

    def record(
        self,
        study: str,
        setting: str,
        spec: dict[str, Any],
        data: dict[str, DataFacts],
        gone: Sequence[Cut],
        compute: Callable[[Request], Outcome],
    ) -> Record:
        """The record of one run on this model less `gone`: the one on disk if its inputs are the same."""
        settings, dense = self.profile.models[self.name], self.model.num_parameters()
        with removed(self.model, gone):
            left = self.model.num_parameters()
        model = ModelFacts(
            name=self.name,
            ref=settings.ref or f"random:{self.name}",
            revision=getattr(self.model.config, "_commit_hash", None),
            dtype=str(self.model.dtype).removeprefix("torch."),
            fingerprint=self._fingerprint,
            parameters_dense=dense,
            parameters=left,
            ratio=ratio(self.model, gone),
            removals=tuple(map(str, gone)),
        )
        request = Request(study=study, profile=self.profile.name, setting=setting, spec=spec, model=model, data=data)
        record, computed = recorded(self.output, request, lambda: compute(request), str(self.model.device))
        if computed:
            report_progress(self.profile, self.output, record)
        return record

    def checkpoint(self, request: Request) -> Path:
        """Where a run keeps what it has so far: all that there is of it until it is recorded, and to be deleted after.

        request: what the run's computation is given, or its record.
        """
        name = f"{request.setting}-{request.inputs_fingerprint()[:12]}.part"
        return self.output / request.profile / request.study / self.name / name
