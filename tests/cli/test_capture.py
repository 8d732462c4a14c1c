"""`lorakit capture`: what it says, and what it costs to be asked."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkpoints.written import write_checkpoint
from tests.cli.commands import lorakit
from tests.training.capturing.captures import captured, kept_of, template, writer

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("LORAKIT", "FLEXAI"):
        monkeypatch.delenv(f"{name}_OUTPUT_CHECKPOINT_DIR", raising=False)
    monkeypatch.setenv("LORAKIT_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_as_json_each_thing_is_a_line_on_stderr(tmp_path: Path, home: Path) -> None:
    source = template(tmp_path)
    (source / "trainer_state.json").write_text('{"global_step": 1, "log_history": [{"step": 1, "eval_loss": NaN}]}')
    ended = captured(home, "--json", "--", *writer(source, steps=1))
    (line,) = map(json.loads, ended.stderr.splitlines())
    (kept,) = kept_of(home)
    assert (line["event"], line["id"], line["uid"], line["step"]) == ("kept", kept.id, kept.uid, 1)
    assert line["folder"] == str(kept.folder)
    assert line["eval_loss"] is None
    assert math.isnan(kept.facts.eval_loss or 0)


def test_what_is_left_is_said_as_json_too(tmp_path: Path, home: Path) -> None:
    ended = captured(home, "--json", "--", "sh", "-c", "mkdir $LORAKIT_OUTPUT_CHECKPOINT_DIR/checkpoint-1; exit 2")
    left, note = map(json.loads, ended.stderr.splitlines())
    assert ended.returncode == 2
    assert (left["event"], left["name"]) == ("left", "checkpoint-1")
    assert note["event"] == "note"


def test_a_dry_run_runs_nothing(capsys: Capture, tmp_path: Path, home: Path) -> None:
    source = write_checkpoint(tmp_path / "runs" / "checkpoint-5")
    ended = lorakit(capsys, "capture", "--dry-run", "-C", source, "--", "touch", tmp_path / "made")
    assert ended.code == 0
    assert f"touch would write its checkpoints into a folder of its own, and start from {source}" in ended.err
    assert not (tmp_path / "made").exists()
    assert not home.exists()


def test_a_dry_run_says_what_can_not_be_started_from(capsys: Capture, tmp_path: Path) -> None:
    (tmp_path / "runs" / "empty").mkdir(parents=True)
    ended = lorakit(capsys, "capture", "--dry-run", "-C", tmp_path / "runs" / "empty", "--", "true")
    assert ended.code == 4
    assert "can't be started from" in ended.err


def test_what_a_name_would_do_to_a_terminal_is_written_out(tmp_path: Path, home: Path) -> None:
    script = "mkdir \"$LORAKIT_OUTPUT_CHECKPOINT_DIR/checkpoint-1$(printf '\\033[31m')\""
    ended = captured(home, "--", "sh", "-c", script)
    assert "left checkpoint-1\\x1b[31m where it is" in ended.stderr


def test_options_behind_the_program_are_the_programs(capsys: Capture) -> None:
    with_dashes = lorakit(capsys, "capture", "--", "sh", "-c", 'test "$1" = --json', "sh", "--json")
    without = lorakit(capsys, "capture", "sh", "-c", 'test "$1" = --json', "sh", "--json")
    assert (with_dashes.code, without.code) == (0, 0)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 2, "PROGRAM"), (["--", "no-such-program"], 127, "no program 'no-such-program'"),
        (["--", "/etc/passwd"], 126, "can't be executed"), (["--run", "a/b", "--", "true"], 4, "can't be a name"),
        (["--run", "latest", "--", "true"], 4, "reserved"), (["-C", "nowhere", "--", "true"], 3, "nowhere"),
        (["--", ""], 2, "no name"), (["-C", "", "--", "true"], 2, "-C names nothing"),
        (["--dry-run", "--run", "a/b", "--", "true"], 4, "can't be a name"),
    ],
)  # fmt: skip
def test_what_can_not_be_run_is_said(capsys: Capture, home: Path, arguments: list[str], code: int, words: str) -> None:
    ended = lorakit(capsys, "capture", *arguments)
    assert ended.code == code
    assert words in ended.err
    assert not list(home.glob("captures/*"))


def test_a_reader_of_stderr_that_goes_away_is_no_reason_to_end_the_program(tmp_path: Path, home: Path) -> None:
    command = [sys.executable, "-m", "lorakit", "capture", "--", *writer(template(tmp_path), steps=3, pause=0.2)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
        assert process.stderr
        process.stderr.close()
        assert process.wait(60) == 0
    assert len(kept_of(home)) == 3


def test_it_starts_without_torch() -> None:
    code = "import sys, lorakit.cli.capture, lorakit.training.capture; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
