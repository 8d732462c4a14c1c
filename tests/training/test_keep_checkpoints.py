"""Retention inside a trainer: the policies of prune, and nothing that is not this training's own."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import pytest

from lorakit.checkpoints.retention import KeepBest, KeepEvery, KeepLast, Policy, Retention
from lorakit.errors import UsageError
from lorakit.training import KeepCheckpoints, SaveOnRequest, SaveState
from lorakit.training.requests import ask
from tests.checkpoints.written import write_checkpoint
from tests.training.trainer import At, tiny_trainer


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


def steps(run: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("checkpoint-")) for path in run.glob("checkpoint-*"))


@pytest.mark.parametrize(
    ("keep", "left"),
    [
        (KeepLast(2), [4, 5]),
        ({"keep_last": 2, "keep_every": 2}, [2, 4, 5]),
        ([KeepLast(1), KeepEvery(3)], [3, 5]),
        (Retention((KeepLast(1),), spare_newest=False), [5]),
        (Retention(max_bytes=1), [5]),
    ],
)
def test_after_each_save_what_no_policy_keeps_is_gone(run: Path, keep: Any, left: list[int]) -> None:
    seen: list[list[int]] = []
    at = At(4, lambda: seen.append(steps(run)), "on_step_end")
    tiny_trainer(run, steps=5, callbacks=[KeepCheckpoints(keep), at], save_steps=1).train()
    assert steps(run) == left
    assert len(seen[0]) <= 3, "it does not wait for the end"


@pytest.mark.parametrize("lora", [True, False])
def test_the_best_by_their_own_evaluation_stay(run: Path, lora: bool) -> None:
    trainer = tiny_trainer(
        run, steps=6, callbacks=[KeepCheckpoints([KeepBest(1), KeepLast(1)])], save_steps=1, eval_strategy="steps",
        eval_steps=1, lora=lora, learning_rate=0.3,
    )  # fmt: skip
    trainer.train()
    losses = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    assert steps(run) == sorted({6, min(losses, key=lambda step: (losses[step], step))})


def test_until_one_was_evaluated_all_stay(run: Path) -> None:
    tiny_trainer(run, callbacks=[KeepCheckpoints([KeepBest(1), KeepLast(1)])], save_steps=1).train()
    assert steps(run) == [1, 2, 3, 4, 5, 6]


def test_what_an_earlier_training_wrote_is_neither_removed_nor_counted(run: Path) -> None:
    for step in (1, 900, 1000):
        write_checkpoint(run / f"checkpoint-{step}")
    tiny_trainer(run, callbacks=[KeepCheckpoints(KeepLast(2))], save_steps=2).train()
    assert steps(run) == [1, 4, 6, 900, 1000]


def test_with_earlier_all_of_the_run_are_judged(run: Path) -> None:
    for step in (1, 2):
        state = write_checkpoint(run / f"checkpoint-{step}") / "trainer_state.json"
        for path in (run / f"checkpoint-{step}").iterdir():
            os.utime(path, (step, step))
        os.utime(state, (step + 1, step + 1))
    tiny_trainer(run, callbacks=[KeepCheckpoints(KeepLast(2), earlier=True)], save_steps=3).train()
    assert steps(run) == [3, 6]


def test_what_training_went_on_from_stays(run: Path) -> None:
    tiny_trainer(run, steps=4).train()
    again = tiny_trainer(run, steps=8, callbacks=[KeepCheckpoints(KeepLast(1), earlier=True)], save_steps=2)
    again.train(resume_from_checkpoint=str(run / "checkpoint-2"))
    assert steps(run) == [2, 8]


def test_what_was_asked_for_by_name_and_copies_of_states_stay(run: Path) -> None:
    run.mkdir()
    ask(run, name="first")
    callbacks = [SaveOnRequest(), SaveState("model", every=2), KeepCheckpoints(KeepLast(1))]
    tiny_trainer(run, steps=5, callbacks=callbacks, save_steps=1).train()
    assert steps(run) == [1, 5]
    assert (run / "first").resolve() == run / "checkpoint-1"
    copies = {path.name for path in run.glob("model_checkpoint-*")}
    assert copies == {"model_checkpoint-2", "model_checkpoint-4", "model_checkpoint-5"}


def test_the_best_that_the_trainer_loads_at_the_end_stays(run: Path) -> None:
    trainer = tiny_trainer(
        run, callbacks=[KeepCheckpoints(KeepLast(1))], save_steps=1, eval_strategy="steps", eval_steps=1,
        load_best_model_at_end=True, learning_rate=0.3,
    )  # fmt: skip
    trainer.train()
    assert steps(run) == sorted({trainer.state.best_global_step, 6})


def test_beside_save_total_limit_training_does_not_begin(run: Path) -> None:
    with pytest.raises(UsageError, match="leave save_total_limit out"):
        tiny_trainer(run, callbacks=[KeepCheckpoints(KeepLast(1))], save_total_limit=3).train()


def test_a_file_says_it_too(run: Path, tmp_path: Path) -> None:
    (tmp_path / "keep.yaml").write_text("keep_last: 1\nkeep_every: 4\n")
    tiny_trainer(run, callbacks=[KeepCheckpoints(str(tmp_path / "keep.yaml"))]).train()
    assert steps(run) == [4, 6]


def test_nothing_to_keep_is_no_policy() -> None:
    with pytest.raises(UsageError, match="nothing says which checkpoints to keep"):
        KeepCheckpoints([])


def test_what_can_not_be_removed_is_warned_of_once_and_training_goes_on(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken:
        def reasons(self, checkpoints: Any, now: float) -> dict[str, str]:
            raise OSError("the disk is odd")

    broken: Policy = Broken()
    with caplog.at_level(logging.WARNING):
        tiny_trainer(run, callbacks=[KeepCheckpoints(broken)], save_steps=1).train()
    assert len(steps(run)) == 6
    assert caplog.text.count("no checkpoint was removed: the disk is odd") == 1


def test_nothing_of_what_was_removed_is_left_behind(run: Path) -> None:
    tiny_trainer(run, callbacks=[KeepCheckpoints(KeepLast(1))], save_steps=1).train()
    assert sorted(os.listdir(run)) == ["checkpoint-6"]
