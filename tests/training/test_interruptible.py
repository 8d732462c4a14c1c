"""Ctrl+C: a full checkpoint first; what is trained after it is what would have been trained anyway."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

from lorakit.training import Interruptible, resume
from tests.training.programs import ended, lines_until, trained, training
from tests.training.trainer import At, same, tiny_trainer, weights


def press(number: signal.Signals = signal.SIGINT) -> Any:
    return lambda: os.kill(os.getpid(), number)


def each_step() -> Interruptible:
    return Interruptible(every_seconds=0)


@pytest.fixture(autouse=True)
def signals_as_they_were() -> Any:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the suite itself may run in the background
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    after = {number: signal.getsignal(number) for number in before}
    for number, handler in before.items():
        signal.signal(number, handler)
    assert after == before, "whatever happened, the handlers of before are back"


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Trainer]:
    """Trainings that nothing interrupts; when and what they save changes nothing of them."""
    done: dict[str, Trainer] = {}

    def trained_through(**arguments: Any) -> Trainer:
        trained_by = {name: value for name, value in arguments.items() if not name.startswith("save_")}
        if repr(trained_by) not in done:
            trainer = tiny_trainer(tmp_path_factory.mktemp("straight"), **trained_by)
            trainer.train()
            done[repr(trained_by)] = trainer
        return done[repr(trained_by)]

    return trained_through


@pytest.mark.parametrize(
    ("step", "arguments"),
    [
        (3, {}),
        (4, {}),
        (3, {"save_strategy": "no"}),
        (3, {"save_only_model": True}),
        (3, {"gradient_accumulation_steps": 2}),
        (3, {"eval_strategy": "steps", "eval_steps": 3}),
        (8, {"save_strategy": "epoch", "steps": 12}),
    ],
)
def test_what_was_interrupted_and_resumed_is_bit_equal_to_what_ran_through(
    tmp_path: Path, straight: Callable[..., Trainer], step: int, arguments: dict[str, Any]
) -> None:
    through = straight(**arguments)
    first = tiny_trainer(tmp_path / "run", callbacks=[each_step(), At(step, press())], **arguments)
    with pytest.raises(SystemExit) as end:
        first.train()
    assert end.value.code == 130
    assert resume(tmp_path / "run") == str(tmp_path / "run" / f"checkpoint-{step}")
    second = tiny_trainer(tmp_path / "run", callbacks=[each_step()], **arguments)
    second.train(resume_from_checkpoint=resume(tmp_path / "run"))
    assert same(weights(second), weights(through))
    mine, theirs = ([entry.get("loss") for entry in one.state.log_history[:-1]] for one in (second, through))
    assert mine == theirs
    assert not same(weights(through), weights(tiny_trainer(tmp_path / "untrained", **arguments)))


def test_sigterm_does_the_same_and_ends_with_143(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, callbacks=[each_step(), At(3, press(signal.SIGTERM))])
    with pytest.raises(SystemExit) as end:
        trainer.train()
    assert end.value.code == 143
    assert resume(tmp_path) == str(tmp_path / "checkpoint-3")


def test_while_it_evaluates_it_saves_that_very_step(tmp_path: Path) -> None:
    at = At(2, press(), "on_prediction_step")
    trainer = tiny_trainer(tmp_path, callbacks=[each_step(), at], eval_strategy="steps", eval_steps=2, save_steps=5)
    with pytest.raises(SystemExit):
        trainer.train()
    assert trainer.state.global_step == 2
    assert resume(tmp_path) == str(tmp_path / "checkpoint-2")


def test_it_saves_although_the_trainer_would_keep_the_best_alone(tmp_path: Path) -> None:
    """With save_strategy="best" the Trainer takes the wish to save back, when an evaluation was no better."""
    best = {"save_strategy": "best", "metric_for_best_model": "loss", "greater_is_better": True}
    at = At(4, press())
    trainer = tiny_trainer(
        tmp_path, callbacks=[each_step(), at], eval_strategy="steps", eval_steps=1, save_total_limit=1,
        load_best_model_at_end=True, learning_rate=0.1, **best,
    )  # fmt: skip
    with pytest.raises(SystemExit):
        trainer.train()
    assert (trainer.state.global_step, resume(tmp_path)) == (4, str(tmp_path / "checkpoint-4"))
    assert "optimizer.pt" in os.listdir(tmp_path / "checkpoint-4")


def test_in_the_last_step_it_still_saves_and_says_130(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, callbacks=[each_step(), At(6, press())], save_strategy="no")
    with pytest.raises(SystemExit) as end:
        trainer.train()
    assert end.value.code == 130
    assert resume(tmp_path) == str(tmp_path / "checkpoint-6")


def test_an_evaluation_that_is_due_is_not_waited_for_when_the_system_asks(tmp_path: Path) -> None:
    evaluated: list[int] = []
    at = At(2, press(signal.SIGTERM))
    seen = At(None, lambda: evaluated.append(2), "on_evaluate")
    with pytest.raises(SystemExit):
        tiny_trainer(tmp_path, callbacks=[each_step(), at, seen], eval_strategy="steps", eval_steps=2).train()
    assert (resume(tmp_path), evaluated) == (str(tmp_path / "checkpoint-2"), [])


def test_who_catches_the_end_in_a_notebook_has_a_trainer_as_it_was(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, callbacks=[each_step(), At(3, press())], save_only_model=True)
    with pytest.raises(SystemExit):
        trainer.train()
    assert trainer.args.save_only_model
    assert "eval_loss" in trainer.evaluate()
    assert trainer.state.global_step == 3


def test_two_of_them_are_as_good_as_one(tmp_path: Path) -> None:
    twice = [each_step(), each_step()]
    tiny_trainer(tmp_path / "through", steps=1, callbacks=twice).train()
    with pytest.raises(KeyboardInterrupt):
        press()()
    with pytest.raises(SystemExit):
        tiny_trainer(tmp_path / "run", callbacks=[*twice, At(3, press())]).train()
    assert resume(tmp_path / "run") == str(tmp_path / "run" / "checkpoint-3")
    with pytest.raises(KeyboardInterrupt):
        press()()


def test_after_the_last_look_ctrl_c_does_what_it_did_before(tmp_path: Path) -> None:
    at = At(6, press(), "on_train_end")
    with pytest.raises(KeyboardInterrupt):
        tiny_trainer(tmp_path, callbacks=[at, each_step()]).train()
    assert resume(tmp_path) == str(tmp_path / "checkpoint-6")


def test_after_a_training_that_failed_ctrl_c_does_what_it_did_before(tmp_path: Path) -> None:
    def fail() -> None:
        raise ValueError("no data")

    with pytest.raises(ValueError, match="no data"):
        tiny_trainer(tmp_path, callbacks=[each_step(), At(2, fail)]).train()
    with pytest.raises(KeyboardInterrupt):
        press()()


def test_in_another_thread_it_says_that_it_can_not_and_trains(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = tiny_trainer(tmp_path, steps=2, callbacks=[each_step()])
    with caplog.at_level(logging.WARNING):
        thread = threading.Thread(target=trainer.train)
        thread.start()
        thread.join()
    assert trainer.state.global_step == 2
    assert "Ctrl+C will save nothing" in caplog.text


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_as_a_program_it_ends_without_a_traceback_and_goes_on_when_started_again(
    tmp_path: Path, number: signal.Signals
) -> None:
    """With processes that load data, which a terminal's Ctrl+C reaches, too, and a launcher's SIGTERM ends."""
    loading = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    with training(tmp_path / "run", seconds=0.3, **loading) as process:
        lines_until(process, "step 3")
        os.killpg(process.pid, number)
        code, shown = ended(process)
    assert code == 128 + number, shown
    assert "saving a full checkpoint at the end of this step" in shown
    assert "Traceback" not in shown
    begun: list[int] = []
    again = tiny_trainer(tmp_path / "run", callbacks=[each_step()])
    again.add_callback(At(None, lambda: begun.append(again.state.global_step + 1)))
    again.train(resume_from_checkpoint=resume(tmp_path / "run"))
    assert (begun[0] >= 3, begun[-1]) == (True, 6)


def test_the_second_time_it_ends_at_once() -> None:
    """A program without the seconds that a Trainer needs to start; that one does so is tested above."""
    program = (
        "import os, signal, time; from lorakit.training.signals import SignalFlag\n"
        "flag = SignalFlag([signal.SIGINT, signal.SIGTERM], once=True, said='saving')\n"
        "def on_train_begin(): flag.install()\n"
        "on_train_begin()\n"
        "os.kill(os.getpid(), signal.SIGINT)\n"
        "print(flag.received, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGINT); time.sleep(60)"
    )
    before = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    ended_so = subprocess.run([sys.executable, "-c", before + program], capture_output=True, text=True)
    assert (ended_so.returncode, ended_so.stdout, ended_so.stderr) == (-signal.SIGINT, "2\n", "saving")


@pytest.mark.slow
def test_when_one_of_two_ranks_is_told_both_save_and_stop_at_the_same_step(tmp_path: Path) -> None:
    with training(tmp_path / "run", ranks=2, steps=200, save_steps=500, kill=[3, "SIGTERM"], rank=1) as process:
        _, shown = ended(process)
    checkpoint = Path(resume(tmp_path / "run") or "")
    assert {"rng_state_0.pth", "rng_state_1.pth", "optimizer.pt"} <= set(os.listdir(checkpoint)), shown
    step = int(checkpoint.name.removeprefix("checkpoint-"))
    assert 3 <= step < 200
    assert {f"saved {step} by rank {rank}" in shown for rank in (0, 1)} == {True}
    assert "143" in shown, "torchrun names the code that its ranks ended with"
    assert 'Traceback (most recent call last):\n  File "' not in shown.partition("torch/distributed")[0]


@pytest.mark.slow
def test_what_one_of_two_ranks_is_told_in_the_last_steps_is_not_lost(tmp_path: Path) -> None:
    """They look only now and then, and at the last step."""
    fast = {"save_strategy": "no", "seconds": 0.02}
    with training(tmp_path, ranks=2, steps=29, kill=[29, "SIGTERM"], rank=1, **fast) as process:
        _, shown = ended(process)
    assert resume(tmp_path) == str(tmp_path / "checkpoint-29"), shown


@pytest.mark.slow
def test_two_ranks_that_were_interrupted_go_on_to_the_same_weights(tmp_path: Path) -> None:
    end = str(tmp_path / "weights")
    assert trained(tmp_path / "straight", ranks=2, weights=end + "-straight")[0] == 0
    code, shown = trained(tmp_path / "run", ranks=2, kill=[3, "SIGINT"])
    assert code != 0, shown
    assert (resume(tmp_path / "run") or "").endswith(("checkpoint-3", "checkpoint-4")), shown
    code, shown = trained(tmp_path / "run", ranks=2, weights=end)
    assert code == 0, shown
    for rank in (0, 1):
        straight, resumed = (torch.load(f"{end}{which}.{rank}", weights_only=True) for which in ("-straight", ""))
        assert same(straight, resumed)
