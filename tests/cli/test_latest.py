"""`lorakit latest`: one path on stdout, or the reason why there is none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lorakit.store.catalog import Facts
from lorakit.store.kept import Described, keep_checkpoint
from tests.checkpoints.written import write_checkpoint, write_model_checkpoint
from tests.cli.commands import lorakit
from tests.folders import write_adapter

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step in (90, 1000):
        write_checkpoint(tmp_path / "runs" / "sql" / f"checkpoint-{step}")
    return tmp_path / "runs" / "sql"


def test_the_path_and_nothing_else(capsys: Capture, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = lorakit(capsys, "latest", run)
    assert (ended.code, ended.out, ended.err) == (0, f"{run / 'checkpoint-1000'}\n", "")
    monkeypatch.chdir(run.parent)
    assert lorakit(capsys, "latest", "sql").out == "sql/checkpoint-1000\n"


def test_one_that_is_still_being_written_is_passed_over(capsys: Capture, run: Path) -> None:
    write_adapter(run / "checkpoint-2000")
    assert lorakit(capsys, "latest", run).out == f"{run / 'checkpoint-1000'}\n"


def test_whole_models_count(capsys: Capture, tmp_path: Path) -> None:
    folder = write_model_checkpoint(tmp_path / "full" / "checkpoint-7")
    assert lorakit(capsys, "latest", tmp_path / "full").out == f"{folder}\n"


def test_as_data_it_is_what_ls_says(capsys: Capture, run: Path) -> None:
    rows = json.loads(lorakit(capsys, "ls", run, "--json").out)
    assert json.loads(lorakit(capsys, "latest", run, "--json").out) == rows[-1]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("runs", "name one of sql"),
        ("chat", "incomplete: nothing says yet that its writer is done"),
        ("empty", "there is no checkpoint in"),
        ("nowhere", "there is no folder"),
    ],
)
def test_where_there_is_none_stdout_is_empty_and_the_reason_said(
    capsys: Capture, run: Path, tmp_path: Path, name: str, reason: str
) -> None:
    write_adapter(tmp_path / "chat")
    (tmp_path / "empty").mkdir()
    ended = lorakit(capsys, "latest", tmp_path / name)
    assert (ended.code, ended.out) == (3, "")
    assert reason in ended.err


def test_a_run_that_only_the_store_knows(capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAKIT_HOME", str(tmp_path / "home"))
    kept = []
    for step, loss in ((100, 1.0), (200, 2.0)):
        described = Described("adapter", "transformers", step, Facts(step=step, eval_loss=loss, eval_step=step))
        source = write_checkpoint(tmp_path / f"old-{step}", seed=step)
        kept.append(keep_checkpoint(tmp_path / "home", source, described, run="old", unchanged=lambda: True))
    ended = lorakit(capsys, "latest", "old")
    assert (ended.code, ended.out, ended.err) == (0, f"{kept[1].folder}\n", "")
    assert json.loads(lorakit(capsys, "latest", "old", "--json").out)["id"] == kept[1].id
    ended = lorakit(capsys, "latest", "olt")
    assert (ended.code, ended.out, "did you mean 'old'?" in ended.err) == (3, "", True)


def test_what_is_newer_and_passed_over_is_said_beside_the_path(capsys: Capture, run: Path) -> None:
    for file in write_adapter(run.parent / "last").iterdir():
        file.rename(run / file.name)
    ended = lorakit(capsys, "latest", run)
    assert (ended.code, ended.out) == (0, f"{run / 'checkpoint-1000'}\n")
    assert f"'{run}' is newer than checkpoint-1000, but is incomplete: nothing says yet" in ended.err
