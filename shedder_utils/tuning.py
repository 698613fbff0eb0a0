"""The training behind recovery: transformers' Trainer, with a held-out loss that decides what is kept and when to stop.

Loss is the mean over tokens of the next token's cross-entropy, or with a teacher of KL(teacher || model), in nats.
Checkpoints and the best state hold what is trained, and nothing else.

B batch, L tokens, V vocabulary.
"""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .errors import ModelError
from .instructions import IGNORED, Example, Instructions, collate
from .recipe import Recipe

DIVERGED = 1.1
"""A held-out loss above its start by this factor ends the tuning."""
LOGS_PER_EVALUATION = 5
WEIGHTS, BEST, STATE = "trained.safetensors", "best.safetensors", "trainer_state.json"


class Tuning(Trainer):
    """One tuning of a model, in place. `curve` and `stopped` say how it went.

    folder: for checkpoints and the best state; what it holds of this tuning is gone on from. teacher: a dense model.
    """

    loss_is_scaled_for_ga = False
    control: Any

    def __init__(
        self,
        model: PreTrainedModel,
        recipe: Recipe,
        data: Instructions,
        folder: Path,
        teacher: PreTrainedModel | None,
        progress: bool,
    ) -> None:
        self.recipe, self.teacher, self.folder = recipe, teacher, folder
        self.stopped: str | None = None
        self.resumed = last_checkpoint(folder)
        collator = partial(collate, loss_on=recipe.loss_on)
        arguments = _arguments(recipe, folder, model.device.type == "cpu", start=self.resumed is None)
        super().__init__(
            model=model, args=arguments, data_collator=collator, train_dataset=data.train, eval_dataset=data.held_out
        )
        self.remove_callback(PrinterCallback)
        self.add_callback(CheckGradients(model))
        if progress:
            self.add_callback(Progress())

    def run(self) -> None:
        """Train to the end, or until it is time to stop, and leave the model in its best state."""
        self.train(resume_from_checkpoint=self.resumed)
        if self.curve[-1]["step"] != self.state.global_step and self.stopped is None:
            self.evaluate()
        load_trained(self.model, self.folder / BEST)

    @property
    def curve(self) -> list[dict[str, float]]:
        """The held-out losses by step, the first one before any update."""
        return [entry for entry in self.points if "held_out_loss" in entry]

    @property
    def points(self) -> list[dict[str, float]]:
        """All finite losses by step: `loss` is the mean since the point before, `held_out_loss` that of the step."""
        kept = ("step", "loss", "held_out_loss")
        logged = [{name: entry[name] for name in kept if name in entry} for entry in self.state.log_history]
        return [entry for entry in logged if len(entry) > 1 and all(map(math.isfinite, entry.values()))]

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, **_: Any
    ) -> Tensor:
        """The mean loss of a batch; one that is not finite ends the tuning."""
        logits = model(input_ids=inputs["input_ids"], use_cache=False).logits
        if self.teacher is None:
            total, count = cross_entropy(logits, inputs["labels"])
        else:
            with torch.no_grad():
                aim = self.teacher(input_ids=inputs["input_ids"], use_cache=False).logits
            total, count = divergence(logits, aim, inputs["labels"])
        loss = total / count
        if not torch.isfinite(loss):
            self._stop(f"the training loss is {loss.item()}")
        return loss

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """The held-out cross-entropy: log it, keep what is the best so far, and stop where there is no use in more.

        Raises ModelError where it is no number before any update.
        """
        now = self._held_out_loss()
        earlier = [entry["held_out_loss"] for entry in self.curve]
        if not earlier and not math.isfinite(now):
            raise ModelError(
                f"recover: the held-out loss is {now} before any update, expected a finite number: the model's weights "
                "or logits are not finite, look at the checkpoint it was loaded from, or load it in float32"
            )
        self.log({"held_out_loss": now})
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, {"eval_loss": now})
        best, waited = min(earlier, default=math.inf), len(earlier) - earlier.index(min(earlier)) if earlier else 0
        if now < best:
            save_trained(self.model, self.folder / BEST)
        elif not math.isfinite(now) or now > DIVERGED * earlier[0]:
            self._stop(f"the held-out loss is {now:.3f}, it was {earlier[0]:.3f} at the start")
        elif self.recipe.patience and waited >= self.recipe.patience:
            self._stop(f"{waited} held-out losses in a row were no better than {best:.3f}")
        return {"eval_loss": now}

    def _held_out_loss(self) -> float:
        model, size = self.model, self.recipe.batch_size
        rows: list[Example] = sorted(self.eval_dataset, key=lambda example: len(example.ids))
        total, count = 0.0, 0
        model.eval()
        with torch.no_grad():
            for begin in range(0, len(rows), size):
                batch = collate(rows[begin : begin + size], self.recipe.loss_on)
                logits = model(input_ids=batch["input_ids"].to(model.device), use_cache=False).logits
                loss, tokens = cross_entropy(logits, batch["labels"].to(model.device))
                total, count = total + loss.item(), count + tokens
        model.train()
        return total / count

    def _stop(self, why: str) -> None:
        self.stopped = self.stopped or f"step {self.state.global_step}: {why}"
        self.control.should_training_stop, self.control.should_save = True, False

    def _save_checkpoint(self, *arguments: Any, **options: Any) -> None:
        if self.stopped is None:
            super()._save_checkpoint(*arguments, **options)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """What the Trainer's checkpoint holds of the model."""
        save_trained(self.model, Path(output_dir or self.args.output_dir, WEIGHTS))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_trained(self.model, Path(resume_from_checkpoint, WEIGHTS))


class CheckGradients(TrainerCallback):
    """Before the first update: refuse an adapter that no gradient reaches, for it would train nothing in silence."""

    def __init__(self, model: nn.Module) -> None:
        self.adapters = {name: tensor for name, tensor in model.named_parameters() if ".lora_B." in name}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Raise ModelError, naming the adapter."""
        for name, tensor in self.adapters.items() if state.global_step == 0 else ():
            if tensor.grad is None or not tensor.grad.any():
                raise ModelError(f"LoRA: no gradient reaches {name}: its projection is bypassed, choose other targets")


class Progress(TrainerCallback):
    """One line on stderr: steps, losses and the time left."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Begin, or go on."""
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="recover", leave=False)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Count."""
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        """Show the last of each loss."""
        shown = {name: logs[name] for name in ("loss", "held_out_loss") if name in logs}
        self.losses = {**getattr(self, "losses", {}), **shown}
        self.bar.set_postfix(self.losses)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Clear the line."""
        self.bar.close()


def cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, int]:
    """The sum over counted tokens of the next token's cross-entropy, and their number.

    logits: (B, L, V); labels: (B, L) int64, IGNORED where a token does not count.
    """
    counted, targets = _counted(labels)
    return F.cross_entropy(logits[:, :-1][counted].float(), targets, reduction="sum"), len(targets)


def divergence(logits: Tensor, aim: Tensor, labels: Tensor) -> tuple[Tensor, int]:
    """The sum over counted tokens of KL(aim || logits) of the next token, and their number; shapes as above."""
    counted, targets = _counted(labels)
    ours, theirs = (x[:, :-1][counted].float().log_softmax(-1) for x in (logits, aim))
    return F.kl_div(ours, theirs, reduction="sum", log_target=True), len(targets)


def _counted(labels: Tensor) -> tuple[Tensor, Tensor]:
    following = labels[:, 1:]
    counted = following != IGNORED
    return counted, following[counted]


def save_trained(model: nn.Module, file: Path) -> None:
    """Write what is trained of a model; at any moment the file is the old one or the new one, whole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    trained = {name: tensor.detach() for name, tensor in model.named_parameters() if tensor.requires_grad}
    save_file(trained, temporary)
    temporary.replace(file)


@torch.no_grad()
def load_trained(model: nn.Module, file: Path) -> None:
    """Give a model what `save_trained` wrote."""
    parameters = dict(model.named_parameters())
    for name, tensor in load_file(file).items():
        parameters[name].copy_(tensor)


def last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that is whole: the Trainer writes its state last."""
    for found in sorted(folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"), key=_step, reverse=True):
        try:
            json.loads((found / STATE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        return str(found)
    return None


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _arguments(recipe: Recipe, folder: Path, on_cpu: bool, start: bool) -> TrainingArguments:
    """start: whether the held-out loss before the first update is still to be taken.

    One GPU whatever there is: on several the Trainer would train as many batches at a time, which is another recipe.
    """
    every = recipe.evaluate_every
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=recipe.steps or -1, num_train_epochs=recipe.epochs,
        per_device_train_batch_size=recipe.batch_size, gradient_accumulation_steps=recipe.accumulation,
        learning_rate=recipe.learning_rate, warmup_steps=recipe.warmup_steps, lr_scheduler_type="linear",
        optim="adamw_torch" if on_cpu else "adamw_torch_fused", weight_decay=recipe.weight_decay,
        eval_strategy="steps", eval_steps=every, eval_on_start=start, save_strategy="steps", save_steps=every,
        save_total_limit=1,
        logging_steps=max(1, every // LOGS_PER_EVALUATION), logging_nan_inf_filter=False, seed=recipe.seed,
        use_cpu=on_cpu, dataloader_pin_memory=not on_cpu, remove_unused_columns=False, disable_tqdm=True,
        report_to="none",
    )  # fmt: skip
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments
