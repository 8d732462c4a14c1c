"""A save when somebody asks: in any setting of the trainer, once, with a receipt, on all ranks, whatever dies."""

from __future__ import annotations

import json
import logging
import os
import signal
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from lorakit.training import SaveOnRequest, resume
from lorakit.training.requests import (
    AXOLOTL,
    Receipt,
    Request,
    ask,
    claim,
    left_unanswered,
    listener,
    listening,
    receipt_of,
    request_file,
    wait_for,
)
from tests.training.programs import LIMIT, ended, lines_until, training
from tests.training.trainer import At, tiny_trainer


class Asker:
    """Asks as somebody else would, when the trainer is at a step."""

    def __init__(self, run: Path, **words: Any) -> None:
        self.run, self.words = run, words
        self.requests: list[Request] = []

    def __call__(self) -> None:
        self.run.mkdir(exist_ok=True)
        self.requests.append(ask(self.run, **self.words))

    @property
    def receipts(self) -> list[Receipt]:
        found = [receipt_of(self.run, request) for request in self.requests]
        return [receipt for receipt in found if receipt is not None]


def each_step() -> SaveOnRequest:
    """Looks at the end of each, however fast they are."""
    return SaveOnRequest(every_seconds=0)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


def saved(run: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("checkpoint-")) for path in run.glob("checkpoint-*"))


def left_over(run: Path) -> list[str]:
    return sorted(name for name in os.listdir(run / ".lorakit") if not name.startswith("save-result-"))


@pytest.mark.parametrize(
    ("step", "arguments", "steps"),
    [
        (3, {}, [2, 3, 4, 6]),
        (4, {}, [2, 4, 6]),
        (3, {"save_strategy": "no"}, [3]),
        (6, {"save_strategy": "no"}, [6]),
        (3, {"save_strategy": "no", "gradient_accumulation_steps": 3}, [3]),
        (3, {"save_strategy": "no", "save_only_model": True}, [3]),
        (3, {"save_strategy": "epoch", "steps": 10}, [3, 8, 10]),
        (8, {"save_strategy": "epoch", "steps": 10}, [8, 10]),
    ],
)
def test_it_saves_the_step_in_which_it_was_asked_once_and_says_where(
    run: Path, step: int, arguments: dict[str, Any], steps: list[int]
) -> None:
    asker = Asker(run, reason="to see")
    before = time.time()
    tiny_trainer(run, callbacks=[each_step(), At(step, asker)], **arguments).train()
    [receipt] = asker.receipts
    assert (receipt.step, receipt.path, receipt.name) == (step, f"checkpoint-{step}", None)
    assert 0 <= receipt.seconds <= time.time() - before
    assert saved(run) == steps
    files = set(os.listdir(run / receipt.path))
    assert "trainer_state.json" in files
    assert ("optimizer.pt" in files) != bool(arguments.get("save_only_model"))
    assert left_over(run) == ["listening.json"]


@pytest.mark.parametrize("event", ["on_epoch_end", "on_evaluate", "on_save", "on_train_end"])
def test_who_asks_at_the_very_end_is_answered_too(run: Path, event: str) -> None:
    asker = Asker(run)
    arguments = {"save_strategy": "steps" if event in ("on_save", "on_train_end") else "no"}
    at = At(6, asker, event)
    tiny_trainer(run, callbacks=[at, each_step()], eval_strategy="steps", eval_steps=3, **arguments).train()
    assert [receipt.step for receipt in asker.receipts] == [6] * len(asker.requests)
    assert asker.requests


def test_several_that_ask_meanwhile_share_a_save_and_each_gets_a_receipt(run: Path) -> None:
    asker = Asker(run)
    tiny_trainer(run, callbacks=[each_step(), At(3, asker), At(3, asker), At(3, asker)], save_strategy="no").train()
    assert [receipt.step for receipt in asker.receipts] == [3, 3, 3]
    assert saved(run) == [3]
    assert len({receipt.uuid for receipt in asker.receipts}) == 3


def test_an_evaluation_that_takes_the_wish_to_save_back_only_delays_it(run: Path) -> None:
    """save_strategy="best" decides anew at each evaluation."""
    best = {"save_strategy": "best", "metric_for_best_model": "loss", "greater_is_better": True}
    asker = Asker(run)
    at = At(4, asker)
    evaluating = {"eval_strategy": "steps", "eval_steps": 2, "learning_rate": 0.1}
    tiny_trainer(run, callbacks=[each_step(), at], **evaluating, **best).train()
    assert [receipt.step for receipt in asker.receipts] == [5]


def test_a_name_is_a_link_to_the_checkpoint(run: Path) -> None:
    asker = Asker(run, name="before-lr-drop")
    tiny_trainer(run, callbacks=[each_step(), At(3, asker)]).train()
    assert [(one.name, one.path, one.note) for one in asker.receipts] == [("before-lr-drop", "checkpoint-3", None)]
    assert (run / "before-lr-drop").resolve() == (run / "checkpoint-3").resolve()


def test_where_the_trainer_removes_checkpoints_a_name_is_a_copy(run: Path) -> None:
    asker = Asker(run, name="before-lr-drop")
    tiny_trainer(run, callbacks=[each_step(), At(3, asker)], save_total_limit=1).train()
    [receipt] = asker.receipts
    assert (receipt.name, receipt.path, saved(run)) == ("before-lr-drop", "before-lr-drop", [6])
    assert {"adapter_model.safetensors", "optimizer.pt", "rng_state.pth"} <= set(os.listdir(run / "before-lr-drop"))
    assert resume(run, "before-lr-drop") == str(run / "before-lr-drop")


@pytest.mark.parametrize("limit", [None, 2])
def test_a_name_that_leads_elsewhere_is_not_followed(run: Path, limit: int | None) -> None:
    """Whoever may write a request need not be whom the trainer's own files are for."""
    (run / ".lorakit").mkdir(parents=True)
    said = {"uuid": "a" * 32, "time": 0, "name": "../outside", "reason": None}
    (run / ".lorakit" / f"save-request-{'a' * 32}.json").write_text(json.dumps(said))
    tiny_trainer(run, steps=2, callbacks=[each_step()], save_total_limit=limit).train()
    receipt = receipt_of(run, Request("a" * 32, 0))
    assert receipt is not None
    assert (receipt.name, receipt.path) == (None, "checkpoint-1")
    assert "can't be a name" in (receipt.note or "")
    assert os.listdir(run.parent) == ["run"]


def test_a_name_that_was_taken_meanwhile_is_said_and_the_checkpoint_is_there(run: Path) -> None:
    asker = Asker(run, name="odd")
    tiny_trainer(run, callbacks=[each_step(), At(3, asker), At(3, lambda: (run / "odd").mkdir())]).train()
    [receipt] = asker.receipts
    assert (receipt.name, receipt.step) == (None, 3)
    assert "exists already" in (receipt.note or "")


def test_axolotls_trigger_file_is_one_save(run: Path) -> None:
    trainer = tiny_trainer(run, callbacks=[each_step(), At(3, (run / AXOLOTL).touch)], save_strategy="no")
    trainer.train()
    assert saved(run) == [3]
    assert AXOLOTL not in os.listdir(run)
    [result] = [json.loads(path.read_text()) for path in (run / ".lorakit").glob("save-result-*.json")]
    assert (result["step"], result["path"]) == (3, "checkpoint-3")


def test_sigusr1_is_one_save_and_the_earlier_handler_is_called_as_well(run: Path) -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: seen.append(number))
    try:
        at = At(3, lambda: os.kill(os.getpid(), signal.SIGUSR1))
        tiny_trainer(run, callbacks=[SaveOnRequest(every_seconds=3600), at], save_strategy="no").train()
        os.kill(os.getpid(), signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert (saved(run), seen) == ([3], [signal.SIGUSR1] * 2)


def test_what_was_claimed_when_a_trainer_died_is_answered_by_the_next(run: Path) -> None:
    run.mkdir()
    lost = ask(run)
    list(claim(run))
    tiny_trainer(run, callbacks=[each_step()], save_strategy="no").train()
    assert [receipt.step for receipt in [receipt_of(run, lost)] if receipt] == [1]
    assert left_unanswered(run) == []


@pytest.mark.parametrize("limit", [None, 2])
def test_what_was_saved_and_named_when_a_trainer_died_is_what_the_next_one_says(run: Path, limit: int | None) -> None:
    run.mkdir()
    requests = [ask(run, name="odd") for _ in range(2)]

    def die(*_: Any) -> None:
        raise OSError("killed here")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lorakit.training.save_on_request.answer", die)
        tiny_trainer(run, steps=2, callbacks=[each_step()], save_total_limit=limit).train()
    assert len(left_unanswered(run)) == 2
    again = tiny_trainer(run, steps=3, callbacks=[each_step()], save_total_limit=limit)
    again.train(resume_from_checkpoint=resume(run))
    for receipt in (receipt_of(run, request) for request in requests):
        assert receipt is not None
        assert (receipt.name, receipt.path, receipt.step) == ("odd", "odd" if limit else "checkpoint-1", 1)


@pytest.mark.parametrize("limit", [None, 2])
def test_two_that_ask_for_the_same_name_at_once_both_have_it(run: Path, limit: int | None) -> None:
    asker = Asker(run, name="odd")
    tiny_trainer(run, callbacks=[each_step(), At(3, asker), At(3, asker)], save_total_limit=limit).train()
    assert [(one.name, one.step) for one in asker.receipts] == [("odd", 3)] * 2


def test_a_place_that_was_taken_when_it_began_is_taken_when_it_is_free(run: Path) -> None:
    run.mkdir()
    lost = ask(run)
    list(claim(run))
    other = ExitStack()
    other.enter_context(listening(run))
    heard: list[Any] = []
    at = [At(2, other.close), At(4, lambda: heard.append((listener(run) or {}).get("pid")))]
    tiny_trainer(run, callbacks=[each_step(), *at], save_strategy="no").train()
    assert [receipt.step for receipt in [receipt_of(run, lost)] if receipt] == [2]
    assert heard == [os.getpid()]


def test_it_listens_while_it_trains_and_no_longer(run: Path) -> None:
    heard: list[Any] = []
    tiny_trainer(run, steps=2, callbacks=[each_step(), At(2, lambda: heard.append(listener(run)))]).train()
    assert [said["pid"] for said in heard] == [os.getpid()]
    assert listener(run) is None


def test_where_nothing_can_be_written_it_says_so_once_and_trains(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    run.mkdir()
    (run / ".lorakit").write_text("in the way")
    with caplog.at_level(logging.WARNING):
        trainer = tiny_trainer(run, callbacks=[each_step()])
        trainer.train()
    assert trainer.state.global_step == 6
    assert caplog.text.count("nobody can ask this training to save by a file, only by SIGUSR1") == 1


def test_a_request_that_can_not_be_claimed_is_said_once_and_causes_no_save(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run.mkdir()
    request = ask(run)
    request_file(run, request).with_name(f"{request_file(run, request).name}.claimed").mkdir()
    with caplog.at_level(logging.WARNING):
        tiny_trainer(run, callbacks=[each_step()], save_strategy="no").train()
    assert saved(run) == []
    assert caplog.text.count("a request to save can't be taken up") == 1


@pytest.mark.slow
def test_killed_between_claim_and_save_the_next_training_answers(run: Path) -> None:
    """Although the processes that loaded its data live on for a while."""
    run.mkdir()
    request = ask(run, name="odd")
    loading = {"dataloader_num_workers": 2, "dataloader_persistent_workers": True}
    with training(run, kill=[1, "SIGKILL", "on_step_end"], save_strategy="no", **loading) as process:
        assert process.wait(LIMIT) == -signal.SIGKILL
    assert (left_unanswered(run), saved(run), listener(run)) == ([request], [], None)
    tiny_trainer(run, callbacks=[each_step()], save_strategy="no").train()
    assert [(one.name, one.step) for one in [receipt_of(run, request)] if one] == [("odd", 1)]


def test_rank_0_is_asked_and_two_ranks_save_the_same_step(run: Path) -> None:
    run.mkdir()
    with training(run, ranks=2, steps=400, save_steps=1000, seconds=0.02, save_total_limit=2) as process:
        lines_until(process, "step 5")
        receipt = wait_for(run, ask(run, name="odd"), LIMIT)
        process.send_signal(signal.SIGTERM)
        _, shown = ended(process)
    assert receipt is not None, shown
    assert receipt.name == "odd"
    assert {f"saved {receipt.step} by rank {rank}" in shown for rank in (0, 1)} == {True}, shown
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= set(os.listdir(run / "odd"))


@pytest.mark.slow
def test_sigusr1_to_any_rank_makes_all_save(run: Path) -> None:
    with training(run, ranks=2, steps=8, save_steps=1000, kill=[3, "SIGUSR1"], rank=1, seconds=0.3) as process:
        code, shown = ended(process)
    assert code == 0, shown
    step = saved(run)[0]
    assert 3 <= step < 8
    assert {f"saved {step} by rank {rank}" in shown for rank in (0, 1)} == {True}
