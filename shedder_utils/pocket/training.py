"""The recipe of the pocket models: for every architecture the same stages, and the same number of tokens in all.

`python -m shedder_utils.pocket.training pocket-mamba2` trains one from nothing and writes a standard Hugging Face
folder to `pocket/models/`. It can be stopped at any moment and goes on from its last checkpoint. What a model learns
first is to recall (`corpus.py`), and it leaves a stage of that early once it answers, at the latest after a fixed
number of steps; the last stage takes the rest of the tokens, 3.0 to 5.4 of 9.4 million. The batches of a stage are the
same for every architecture, and come in the same order.

B batch, L tokens, D model width.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import (
    AutoTokenizer,
    FalconMambaConfig,
    Mamba2Config,
    MambaConfig,
    PretrainedConfig,
    PreTrainedModel,
    Zamba2Config,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from .. import kernels
from ..errors import ModelError
from ..families import family_of
from ..hymba import HymbaConfig
from .corpus import ANSWER_WEIGHT, batch
from .prose import POCKET
from .tasks import TASKS, quick_accuracy

SIZE = {"vocab_size": 4096, "hidden_size": 96, "num_hidden_layers": 24, "tie_word_embeddings": True,
        "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1, "layer_norm_epsilon": 1e-5}  # fmt: skip
STATE_SIZE = 16  # of Mamba-1 and its relatives
INITIALIZER_RANGE = 0.1  # as Mamba's own: the usual 0.02 leaves the activations of so narrow a model far below 1
CONFIGS: dict[str, PretrainedConfig] = {
    "pocket-mamba": MambaConfig(**SIZE, state_size=STATE_SIZE),
    "pocket-mamba2": Mamba2Config(**SIZE, state_size=64, num_heads=6, head_dim=32, n_groups=1, chunk_size=64),
    "pocket-falcon-mamba": FalconMambaConfig(**SIZE, state_size=STATE_SIZE),
    "pocket-zamba2": Zamba2Config(
        **{**SIZE, "num_hidden_layers": 18},
        rms_norm_eps=1e-5,
        mamba_d_state=64,
        n_mamba_heads=6,
        mamba_ngroups=1,
        chunk_size=64,
        layers_block_type=["hybrid" if i in (5, 11, 17) else "linear_attention" for i in range(18)],
        num_mem_blocks=2,
        num_attention_heads=6,
        intermediate_size=400,
        adapter_rank=8,
        initializer_range=INITIALIZER_RANGE,
        max_position_embeddings=2048,
    ),
    "pocket-hymba": HymbaConfig(
        **{**SIZE, "num_hidden_layers": 16},
        num_attention_heads=6,
        num_key_value_heads=2,
        intermediate_size=250,
        mamba_d_state=STATE_SIZE,
        num_memory_tokens=16,
        sliding_window=64,
        initializer_range=INITIALIZER_RANGE,
    ),
}


@dataclass(frozen=True)
class Phase:
    """A stage of the corpus in batches (B, L), for so many steps at most.

    It ends before them when the model has answered a share `until` of the questions of the last `RECENT` steps.
    """

    stage: str
    batch_size: int
    length: int
    steps: int
    until: float = 2.0


RECENT = 50


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a training, but the architecture. `louder`: see `make_memory_louder`."""

    phases: tuple[Phase, ...] = (
        Phase("few words", 8, 128, 1000, 0.9),
        Phase("more words", 8, 128, 600, 0.85),
        Phase("all words", 8, 128, 600, 0.85),
        Phase("pairs", 8, 128, 1500, 0.85),
        Phase("recall", 8, 128, 1500, 0.8),
        Phase("stories", 4, 256, 1600),
        Phase("mix", 4, 256, 9200),
    )
    steps: int = 9200
    warmup: int = 100
    decay: int = 3000
    learning_rate: float = 2e-3
    louder: float = 10.0
    weight_decay: float = 0.05
    clip: float = 1.0
    seed: int = 20250429
    log_every: int = 100
    evaluate_every: int = 1000

    def rate(self, step: int) -> float:
        """The share of the learning rate at a step: up, level, down to a twentieth."""
        return min(1.0, (step + 1) / self.warmup, 0.05 + 0.95 * (self.steps - step) / self.decay)


PROGRESS = ("step", "tokens", "seconds", "phase", "step_in_phase", "recent", "curve")
"""What a checkpoint holds of a training, beside model and optimizer."""

RECIPES = {name: Recipe() for name in CONFIGS}


class Training:
    """One training under way: model, optimizer, step and curve, all of which its checkpoint holds."""

    def __init__(self, name: str, recipe: Recipe, checkpoint: Path) -> None:
        self.name, self.recipe, self.checkpoint = name, recipe, checkpoint
        self.tokenizer = AutoTokenizer.from_pretrained(POCKET / "tokenizer")
        torch.manual_seed(recipe.seed)
        self.model = AutoModelForCausalLM.from_config(CONFIGS[name]).train()
        family_of(self.model).prepare(self.model)
        make_memory_louder(self.model, recipe.louder)
        self.optimizer = optimizer(self.model, recipe)
        self.step, self.tokens, self.seconds = 0, 0, 0.0
        self.phase, self.step_in_phase, self.recent = 0, 0, list[float]()
        self.curve: list[dict[str, Any]] = []
        if checkpoint.exists():
            self._resume()

    def run(self) -> None:
        """Train to the end: a line every `log_every` steps, scores and a checkpoint every `evaluate_every`."""
        running: list[tuple[float, float]] = []
        while self.step < self.recipe.steps:
            started = time.perf_counter()
            running.append(self._train_step())
            self.seconds += time.perf_counter() - started
            self._advance(running[-1][1])
            evaluate = self.step % self.recipe.evaluate_every == 0 or self.step == self.recipe.steps
            if evaluate or self.step % self.recipe.log_every == 0:
                self._log(running, self._scores() if evaluate else {})
                running.clear()
            if evaluate:
                self._save()

    def _advance(self, answered: float) -> None:
        """Count a step, and move on to the next phase where it is time."""
        phase = self.recipe.phases[self.phase]
        self.step += 1
        self.step_in_phase += 1
        self.recent = [*self.recent, answered][-RECENT:]
        learned = len(self.recent) == RECENT and sum(self.recent) >= phase.until * RECENT
        if learned or self.step_in_phase == phase.steps:
            self.phase, self.step_in_phase, self.recent = self.phase + 1, 0, []

    def _train_step(self) -> tuple[float, float]:
        """One update; its loss, and the share of answer tokens that the model would have given."""
        recipe, phase = self.recipe, self.recipe.phases[self.phase]
        where = self.step_in_phase
        ids, weights = batch(phase.stage, recipe.seed, where, phase.batch_size, phase.length, self.tokenizer)
        logits = self.model(ids, use_cache=False).logits
        loss = weighted_loss(logits, ids, weights)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.learning_rate * recipe.rate(self.step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.tokens += ids.numel()
        answers = weights[:, 1:] == ANSWER_WEIGHT
        right = logits.detach()[:, :-1].argmax(-1)[answers] == ids[:, 1:][answers]
        return loss.item(), right.float().sum().item() / max(len(right), 1)

    def _scores(self) -> dict[str, float]:
        """Accuracies on the first items of each task, without lm-eval."""
        self.model.eval()
        scores = {task: round(quick_accuracy(self.model, self.tokenizer, task, limit=60), 3) for task in TASKS}
        self.model.train()
        return scores

    def _log(self, running: list[tuple[float, float]], scores: dict[str, float]) -> None:
        loss, answered = (sum(values) / len(running) for values in zip(*running, strict=True))
        point = {
            "step": self.step,
            "tokens": self.tokens,
            "hours": round(self.seconds / 3600, 4),
            "stage": self.recipe.phases[self.phase].stage,
            "loss": round(loss, 4),
            "answered": round(answered, 4),
            **scores,
        }
        self.curve.append(point)
        print(json.dumps(point), file=sys.stderr, flush=True)

    def _save(self) -> None:
        state = {
            "recipe": json.dumps(asdict(self.recipe)),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            **{name: getattr(self, name) for name in PROGRESS},
        }
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.checkpoint.with_suffix(".tmp")
        torch.save(state, temporary)
        temporary.replace(self.checkpoint)

    def _resume(self) -> None:
        state = torch.load(self.checkpoint, weights_only=True)
        if state["recipe"] != json.dumps(asdict(self.recipe)):
            raise ModelError(f"checkpoint {self.checkpoint} is of another recipe: delete it, or restore that recipe")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for name in PROGRESS:
            setattr(self, name, state[name])

    def export(self, folder: Path) -> None:
        """Write the model in bfloat16 with its tokenizer, recipe and curve."""
        self.model.to(torch.bfloat16).save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        history = {
            "name": self.name,
            "recipe": asdict(self.recipe),
            "tokens": self.tokens,
            "hours": round(self.seconds / 3600, 2),
            "threads": torch.get_num_threads(),
            "curve": self.curve,
        }
        (folder / "training.json").write_text(json.dumps(history, indent=1) + "\n")


def curves(names: Iterable[str]) -> pd.DataFrame:
    """The training curves of the pocket models among some: one row for each point, with the model's name."""
    points = [
        {"model": name, **point}
        for name in names
        if name in RECIPES
        for point in json.loads((POCKET / "models" / name / "training.json").read_text())["curve"]
    ]
    return pd.DataFrame(points)


def make_memory_louder(model: PreTrainedModel, times: float) -> None:
    """Let the scans of a new model write `times` as much into their states, and forget no faster.

    Published initialisations make steps so small that a state says little beside the skip D x, and a small model then
    takes several times as long to begin to recall. A step (dt) that many times larger with a decay rate (A) that many
    times smaller leaves dt A as it was. Where B and C come from x_proj (Mamba-1), they are made larger as well.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "A_log" in name:
                parameter -= math.log(times)
            elif "dt_bias" in name or ("dt_proj" in name and name.endswith("bias")):
                parameter += math.log(times)
            elif "x_proj" in name:
                parameter[-2 * STATE_SIZE :] *= 4


def weighted_loss(logits: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Mean next-token loss in nats of logits (B, L, V), each token of ids (B, L) counting by its weight (B, L)."""
    losses = cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    counted = weights[:, 1:].flatten()
    return (losses * counted).sum() / counted.sum()


def optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW that decays matrices, and neither norms and biases nor the scans' own parameters."""
    decayed = [p for name, p in model.named_parameters() if p.ndim >= 2 and "A_log" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim < 2 or "A_log" in name]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95))


def main(name: str) -> None:
    """Train one pocket model and write it to `pocket/models/`. Raises ModelError for an unknown name."""
    if name not in RECIPES:
        raise ModelError(f"pocket model {name!r} is unknown: expected one of {', '.join(RECIPES)}")
    kernels.install()
    training = Training(name, RECIPES[name], POCKET.parent / "runs" / "training" / f"{name}.pt")
    training.run()
    training.export(POCKET / "models" / name)


if __name__ == "__main__":
    main(sys.argv[1])
