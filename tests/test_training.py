"""The training of the pocket models: it goes on where it was stopped, and to the next stage when it has learned."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import Mamba2Config

from shedder_utils import ModelError
from shedder_utils.pocket import training
from shedder_utils.pocket.training import Phase, Recipe, Training, make_memory_louder

RECIPE = Recipe(
    phases=(Phase("few words", 2, 32, 3), Phase("mix", 2, 64, 100)), steps=8, decay=4, log_every=2, evaluate_every=4
)


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    config = Mamba2Config(
        vocab_size=4096, hidden_size=16, num_hidden_layers=2, num_heads=2, head_dim=16, state_size=8, n_groups=1,
        chunk_size=16, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    monkeypatch.setitem(training.CONFIGS, "tiny", config)
    monkeypatch.setattr(training, "quick_accuracy", lambda *_, **__: 0.0)


def test_a_stopped_training_ends_where_an_uninterrupted_one_does(tmp_path: Path) -> None:
    whole = Training("tiny", RECIPE, tmp_path / "whole.pt")
    whole.run()
    stopped = Training("tiny", RECIPE, tmp_path / "stopped.pt")
    steps = iter(range(6))
    train_step = stopped._train_step

    def until_stopped() -> tuple[float, float]:
        if next(steps, None) is None:
            raise KeyboardInterrupt
        return train_step()

    stopped._train_step = until_stopped  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        stopped.run()
    resumed = Training("tiny", RECIPE, tmp_path / "stopped.pt")
    assert resumed.step == 4
    resumed.run()
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name
    assert [point["loss"] for point in resumed.curve] == [point["loss"] for point in whole.curve]
    assert whole.tokens == 3 * 2 * 32 + 5 * 2 * 64


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path: Path) -> None:
    Training("tiny", RECIPE, tmp_path / "tiny.pt").run()
    with pytest.raises(ModelError, match="another recipe"):
        Training("tiny", replace(RECIPE, learning_rate=1e-4), tmp_path / "tiny.pt")


def test_a_phase_ends_when_its_questions_are_answered(tmp_path: Path) -> None:
    phases = (Phase("few words", 2, 32, 1000, until=0.5), Phase("mix", 2, 64, 1000))
    tiny = Training("tiny", replace(RECIPE, phases=phases), tmp_path / "tiny.pt")
    for answered in [0.0] * 30 + [1.0] * 24:
        tiny._advance(answered)
    assert (tiny.phase, tiny.step_in_phase) == (0, 54)
    tiny._advance(1.0)
    assert (tiny.phase, tiny.step_in_phase) == (1, 0)


def test_a_louder_memory_forgets_no_faster() -> None:
    model = training.AutoModelForCausalLM.from_config(training.CONFIGS["tiny"])
    mixer = model.backbone.layers[0].mixer
    decay = mixer.A_log.exp() * mixer.dt_bias.exp()
    make_memory_louder(model, 10.0)
    assert torch.allclose(mixer.A_log.exp() * mixer.dt_bias.exp(), decay)
    assert torch.allclose(mixer.A_log.exp().max(), torch.tensor(0.2))
