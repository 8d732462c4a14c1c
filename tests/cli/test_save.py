"""`lorakit save`: one path on stdout, or what to do."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lorakit.training.requests import FOLDER, Receipt, answer, claim, listening
from tests.cli.commands import lorakit

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "sql").mkdir()
    return tmp_path / "sql"


@contextmanager
def a_trainer_that_answers(run: Path, note: str | None = None) -> Iterator[None]:
    """The trainer's side of the protocol; the Trainer itself is in tests/training."""
    over = threading.Event()

    def work() -> None:
        with listening(run):
            while not over.wait(0.01):
                for request in claim(run):
                    answer(run, Receipt(request.uuid, 500, "checkpoint-500", 0.2, None if note else request.name, note))

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def requests(run: Path) -> list[str]:
    return sorted(path.name for path in (run / FOLDER).glob("save-request-*"))


def test_with_wait_the_checkpoints_path_and_nothing_else(capsys: Capture, run: Path) -> None:
    with a_trainer_that_answers(run):
        ended = lorakit(capsys, "save", run, "--wait", "30")
    assert (ended.code, ended.out, ended.err) == (0, f"{run}/checkpoint-500\n", "")
    assert requests(run) == []


def test_as_json_the_receipt(capsys: Capture, run: Path) -> None:
    with a_trainer_that_answers(run):
        ended = lorakit(capsys, "save", run, "--wait", "30", "--name", "before-lr-drop", "--json")
    said = json.loads(ended.out)
    assert said.pop("uuid")
    assert said == {
        "step": 500, "path": f"{run}/checkpoint-500", "seconds": 0.2, "name": "before-lr-drop", "note": None,
        "run": str(run),
    }  # fmt: skip


def test_a_name_that_could_not_be_given_is_said(capsys: Capture, run: Path) -> None:
    with a_trainer_that_answers(run, note="the name is\x1b taken"):
        ended = lorakit(capsys, "save", run, "--wait", "30", "--name", "odd")
    assert (ended.code, ended.out) == (0, f"{run}/checkpoint-500\n")
    assert ended.err == "note: the name is\\x1b taken\n"


def test_without_wait_it_is_asked_and_stays_asked(capsys: Capture, run: Path) -> None:
    ended = lorakit(capsys, "save", run, "--reason", "to see")
    assert ended.code == 0
    file = Path(ended.out.rstrip("\n"))
    assert json.loads(file.read_text())["reason"] == "to see"
    assert "no trainer listens there now: is it training, with lorakit.training.SaveOnRequest" in ended.err
    with listening(run):
        assert "asked; a trainer listens there" in lorakit(capsys, "save", run).err
        said = json.loads(lorakit(capsys, "save", run, "--json").out)
    assert said["listening"]["pid"] == os.getpid()
    assert len(requests(run)) == 3


def test_when_nobody_answers_in_time_it_is_withdrawn_and_ends_with_1(capsys: Capture, run: Path) -> None:
    ended = lorakit(capsys, "save", run, "--wait", "0.2")
    assert (ended.code, ended.out) == (1, "")
    assert "answered within 0.2 s; none listens there: is it training, with lorakit.training.SaveOnRequest" in ended.err
    assert "the request was withdrawn" in ended.err
    assert requests(run) == []
    with listening(run):
        assert "a trainer listens there (process" in lorakit(capsys, "save", run, "--wait", "0.1").err


def test_one_that_is_being_saved_is_not_withdrawn(capsys: Capture, run: Path) -> None:
    def take() -> None:
        while not list(claim(run)):
            _pause()

    taken = threading.Thread(target=take)
    taken.start()
    ended = lorakit(capsys, "save", run, "--wait", "2")
    taken.join()
    assert ended.code == 1
    assert "has taken the request up, but has not saved within 2 s" in ended.err
    assert [name.endswith(".claimed") for name in requests(run)] == [True]


def _pause() -> None:
    threading.Event().wait(0.01)


def test_who_stops_waiting_takes_the_request_back(run: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "lorakit", "save", str(run), "--wait", "60"], stderr=subprocess.PIPE, text=True
    ) as process:
        while not (run / FOLDER).is_dir() or not requests(run):
            _pause()
        _pause()
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 130
    assert requests(run) == []


def test_a_dry_run_asks_nothing(capsys: Capture, run: Path) -> None:
    ended = lorakit(capsys, "save", run, "--name", "odd", "--dry-run")
    assert (ended.code, ended.out) == (0, "")
    assert "nothing was asked" in ended.err
    assert os.listdir(run) == []
    (run / "odd").mkdir()
    assert lorakit(capsys, "save", run, "--name", "odd", "--dry-run").code == 5


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["nowhere"], 3), (["sql/checkpoint-5"], 2), (["sql", "--name", "latest"], 4), (["sql", "--name", "a/b"], 4),
        (["sql", "--name", "checkpoint-5"], 4), (["sql", "--wait", "-1"], 2), ([], 2),
        ([""], 2), (["sql", "--wait", "nan"], 2), (["odd"], 2),
    ],
)  # fmt: skip
def test_what_can_not_be_asked_ends_with_its_code(
    capsys: Capture, run: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int
) -> None:
    monkeypatch.chdir(run.parent)
    (run / "checkpoint-5").mkdir()
    (run.parent / "odd").symlink_to(run / "checkpoint-5")
    assert lorakit(capsys, "save", *arguments).code == code
    assert not (run / FOLDER).exists()
