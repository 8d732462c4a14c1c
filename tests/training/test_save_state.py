"""Copies of some states of every so many checkpoints."""

from __future__ import annotations

import logging
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from transformers import LlamaForCausalLM

from lorakit.errors import UsageError
from lorakit.training import Interruptible, SaveState, resume
from tests.training.trainer import At, same, tiny_model, tiny_trainer, weights


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


def copies(run: Path) -> list[str]:
    return sorted(path.name for path in run.iterdir() if not path.name.startswith("checkpoint-"))


def test_every_other_checkpoint_and_the_last_are_kept_and_rotation_does_not_touch_them(run: Path) -> None:
    tiny_trainer(run, steps=7, callbacks=[SaveState("model", every=2)], save_steps=1, save_total_limit=1).train()
    assert copies(run) == [f"model_checkpoint-{step}" for step in (2, 4, 6, 7)]
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-7"]


def test_a_copy_of_an_adapter_is_one_for_peft_with_the_weights_of_that_step(run: Path) -> None:
    states: dict[int, Any] = {}
    trainer = tiny_trainer(run, steps=4, callbacks=[SaveState(every=1)])
    trainer.add_callback(At(2, lambda: states.update({2: weights(trainer)}), "on_step_end"))
    trainer.train()
    base = tiny_model(lora=False)
    loaded = PeftModel.from_pretrained(base, run / "model_checkpoint-2")
    assert same(dict(loaded.state_dict()), states[2])
    held = set(os.listdir(run / "model_checkpoint-2"))
    assert held == {"adapter_config.json", "adapter_model.safetensors", "README.md", "lorakit.json"}


def test_a_copy_of_a_whole_model_is_one_for_transformers(run: Path) -> None:
    trainer = tiny_trainer(run, callbacks=[SaveState(every=100)], lora=False)
    trainer.train()
    assert copies(run) == ["model_checkpoint-6"]
    assert same(dict(LlamaForCausalLM.from_pretrained(run / "model_checkpoint-6").state_dict()), weights(trainer))


def test_other_states_give_it_their_names(run: Path) -> None:
    tiny_trainer(run, callbacks=[SaveState("optimizer,model", every=3)]).train()
    assert copies(run) == ["model_optimizer_checkpoint-6"]
    assert "optimizer.pt" in os.listdir(run / "model_optimizer_checkpoint-6")


@pytest.mark.parametrize(
    "arguments",
    [
        {"save_strategy": "no"},
        {"save_strategy": "epoch"},
        {"max_steps": -1, "num_train_epochs": 0.75},
        {"save_steps": 4},
    ],
)
def test_the_last_step_is_always_kept(run: Path, arguments: dict[str, Any]) -> None:
    tiny_trainer(run, callbacks=[SaveState(every=100)], **arguments).train()
    assert copies(run) == ["model_checkpoint-6"]


@pytest.mark.parametrize("event", ["on_step_end", "on_evaluate", "on_save", "on_epoch_end"])
def test_a_training_that_is_stopped_early_has_its_last_step_kept(run: Path, event: str) -> None:
    trainer = tiny_trainer(run, callbacks=[SaveState(every=100)], eval_strategy="steps", eval_steps=2)

    def stop() -> None:
        trainer.control.should_training_stop = True

    step = 8 if event == "on_epoch_end" else 4
    trainer.args.max_steps = 20
    trainer.add_callback(At(step, stop, event))
    trainer.train()
    assert (trainer.state.global_step, copies(run)) == (step, [f"model_checkpoint-{step}"])


@pytest.mark.parametrize("first", [True, False])
def test_an_interruption_is_no_end(run: Path, first: bool) -> None:
    interruptible = Interruptible(every_seconds=0)
    both = [SaveState(every=100), interruptible] if first else [interruptible, SaveState(every=100)]
    with pytest.raises(SystemExit):
        tiny_trainer(run, callbacks=[*both, At(3, lambda: os.kill(os.getpid(), signal.SIGTERM))]).train()
    assert copies(run) == []
    tiny_trainer(run, callbacks=both).train(resume_from_checkpoint=resume(run))
    assert copies(run) == ["model_checkpoint-6"]


def test_a_copy_of_an_earlier_training_is_not_touched(run: Path) -> None:
    (run / "model_checkpoint-6").mkdir(parents=True)
    (run / "model_checkpoint-6" / "mine").touch()
    tiny_trainer(run, callbacks=[SaveState(every=100)]).train()
    earlier, later = copies(run)
    assert os.listdir(run / earlier) == ["mine"]
    assert later.startswith("model_checkpoint-6_20")


def test_a_copy_that_fails_is_warned_of_and_training_goes_on(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        at = At(4, lambda: (run / "checkpoint-4" / "adapter_model.safetensors").unlink(), "on_save")
        trainer = tiny_trainer(run, callbacks=[at, SaveState(every=2)])
        trainer.train()
    assert trainer.state.global_step == 6
    assert copies(run) == ["model_checkpoint-6"]
    assert "no copy" in caplog.text


def test_what_a_killed_training_left_of_a_copy_is_cleared(run: Path) -> None:
    (run / ".model_checkpoint-3.tmp-0123456789ab").mkdir(parents=True)
    (run / ".model_checkpoint-3.tmp-0123456789ab" / "adapter_model.safetensors").write_bytes(b"half")
    tiny_trainer(run, callbacks=[SaveState(every=100)]).train()
    assert copies(run) == ["model_checkpoint-6"]


def test_what_makes_no_sense_is_refused_before_training() -> None:
    with pytest.raises(UsageError, match="'weights' is no state of a checkpoint: there are model, optimizer"):
        SaveState("weights", every=1)
    with pytest.raises(UsageError, match="every=0"):
        SaveState(every=0)
