"""The checkpoint to go on from: the newest that is whole, and words for those that are not."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path

import pytest

from lorakit.errors import NotFound, Refused
from lorakit.training import SaveState, resume
from tests.training.trainer import At, tiny_trainer


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("trained")
    tiny_trainer(run, eval_strategy="steps", eval_steps=2, learning_rate=0.3).train()
    return run


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def test_the_newest(run: Path) -> None:
    assert resume(run) == resume(str(run)) == str(run / "checkpoint-6")
    assert tiny_trainer(run, steps=8).train(resume_from_checkpoint=resume(run)).global_step == 8


def test_copies_of_states_are_not_gone_on_from_nor_spoken_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny_trainer(tmp_path, callbacks=[SaveState("model", every=1)]).train()
    (tmp_path / "checkpoint-6").rename(tmp_path / "moved")
    with caplog.at_level(logging.WARNING):
        assert resume(tmp_path) == str(tmp_path / "checkpoint-4")
    assert caplog.text == ""


def test_none_where_nothing_was_saved_yet(tmp_path: Path) -> None:
    assert resume(tmp_path) is None
    assert resume(tmp_path / "nowhere") is None
    assert resume(tmp_path, "best") is None


def test_one_without_a_scheduler_is_said_to_lose_its_optimizer_too(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The Trainer loads both or none, and says nothing of it."""
    (run / "checkpoint-6" / "scheduler.pt").unlink()
    with caplog.at_level(logging.WARNING):
        resume(run)
    assert "holds no scheduler: training goes on with a fresh optimizer" in caplog.text
    moments: list[int] = []
    again = tiny_trainer(run, steps=7)
    again.add_callback(At(None, lambda: moments.append(len(again.optimizer.state_dict()["state"])), "on_train_begin"))
    again.train(resume_from_checkpoint=resume(run))
    assert moments == [0]


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("optimizer.pt", "optimizer.pt"),
        ("rng_state.pth", "rng_state.pth"),
        ("adapter_model.safetensors", "adapter_model.safetensors"),
        ("trainer_state.json", "trainer_state.json"),
    ],
)
def test_a_newest_one_that_is_cut_short_is_passed_over_with_words(
    run: Path, caplog: pytest.LogCaptureFixture, file: str, words: str
) -> None:
    broken = run / "checkpoint-6" / file
    state = broken.stat()
    broken.write_bytes(broken.read_bytes()[:-50])
    os.utime(broken, ns=(state.st_atime_ns, state.st_mtime_ns))
    with caplog.at_level(logging.WARNING):
        assert resume(run) == str(run / "checkpoint-4")
    assert f"training can't go on from '{run / 'checkpoint-6'}'" in caplog.text
    assert words in caplog.text


def test_one_that_was_never_finished_is_passed_over(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    (run / "checkpoint-6" / "trainer_state.json").unlink()
    (run / "checkpoint-8").mkdir()
    with caplog.at_level(logging.WARNING):
        assert resume(run) == str(run / "checkpoint-4")
    assert caplog.text.count("can't go on") == 2


def test_one_without_an_optimizer_is_gone_on_from_and_said_to_be(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    (run / "checkpoint-6" / "optimizer.pt").unlink()
    with caplog.at_level(logging.WARNING):
        assert resume(run) == str(run / "checkpoint-6")
    assert "holds no optimizer" in caplog.text


def test_the_best_by_its_own_evaluation(run: Path) -> None:
    log = json.loads((run / "checkpoint-6" / "trainer_state.json").read_text())["log_history"]
    losses = {entry["step"]: entry["eval_loss"] for entry in log if "eval_loss" in entry}
    assert resume(run, "best") == str(run / f"checkpoint-{min(losses, key=lambda step: losses[step])}")


def test_one_by_its_name(run: Path) -> None:
    (run / "odd").symlink_to("checkpoint-4")
    assert resume(run, "odd") == str(run / "odd")
    assert resume(run, "checkpoint-2") == str(run / "checkpoint-2")
    with pytest.raises(NotFound):
        resume(run, "even")
    (run / "checkpoint-2" / "trainer_state.json").unlink()
    with pytest.raises(Refused, match="can't go on"):
        resume(run, "checkpoint-2")
