"""`lorakit shrink`: a smaller adapter, and what that lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.commands import lorakit
from tests.folders import factors, linear_modules, write_adapter

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "a", factors(linear_modules(), 6), rank=6)


def test_the_folder_on_stdout_and_the_loss_on_stderr(capsys: Capture, adapter: Path, tmp_path: Path) -> None:
    ended = lorakit(capsys, "shrink", adapter, "--rank", 2, "--out", tmp_path / "out")
    assert (ended.code, ended.out) == (0, f"{tmp_path / 'out'}\n")
    assert "rank 2 on 6 modules, truncation error 0." in ended.err
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 2


def test_a_dry_run_reports_and_writes_nothing(capsys: Capture, adapter: Path, tmp_path: Path) -> None:
    ended = lorakit(capsys, "shrink", adapter, "--energy", 0.9, "--dry-run", "--json")
    assert ended.code == 0
    report = json.loads(ended.out)
    assert 0 < report["truncation_error"] <= 0.1**0.5
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_budget_may_be_written_short(capsys: Capture, adapter: Path, tmp_path: Path) -> None:
    assert lorakit(capsys, "shrink", adapter, "--budget", "0.2k", "--out", tmp_path / "out").code == 0
    record = json.loads((tmp_path / "out" / "lorakit.json").read_text())
    assert record["settings"] == {"budget": 200}
    assert record["report"]["parameters"] <= 200


@pytest.mark.parametrize("flags", [[], ["--rank", "0"], ["--rank", "1", "--budget", "5k"], ["--energy", "0"]])
def test_what_makes_no_sense_ends_with_2(capsys: Capture, adapter: Path, tmp_path: Path, flags: list[str]) -> None:
    ended = lorakit(capsys, "shrink", adapter, *flags, "--out", tmp_path / "out")
    assert (ended.code, ended.out) == (2, "")
    assert not (tmp_path / "out").exists()


def test_the_other_exit_codes(capsys: Capture, adapter: Path, tmp_path: Path) -> None:
    assert lorakit(capsys, "shrink", tmp_path / "nowhere", "--rank", 1, "--out", tmp_path / "out").code == 3
    assert lorakit(capsys, "shrink", adapter, "--rank", 1, "--out", adapter).code == 5
    assert lorakit(capsys, "shrink", adapter, "--rank", 1).code == 2
