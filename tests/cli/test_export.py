"""`lorakit export`: a checkpoint to somewhere else, with digests."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.checkpoints.moving.archives import files_below
from tests.checkpoints.moving.web import sha256
from tests.checkpoints.written import write_checkpoint
from tests.cli.commands import lorakit

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "runs" / "sql" / "checkpoint-500")


def test_the_place_is_printed_and_the_rest_is_said_beside_it(capsys: Capture, checkpoint: Path, tmp_path: Path) -> None:
    ended = lorakit(capsys, "export", checkpoint, tmp_path / "out")
    assert (ended.code, ended.out) == (0, f"{tmp_path / 'out'}\n")
    assert ended.err.startswith("exported 3 files, ")
    assert files_below(tmp_path / "out") == files_below(checkpoint)
    ended = lorakit(capsys, "export", checkpoint, tmp_path / "out.tar.gz")
    assert sha256((tmp_path / "out.tar.gz").read_bytes()) in ended.err
    assert lorakit(capsys, "export", checkpoint, tmp_path / "out").code == 5
    assert lorakit(capsys, "export", tmp_path / "none", tmp_path / "other").code == 3


def test_json_names_every_file_with_its_digest(capsys: Capture, checkpoint: Path, tmp_path: Path) -> None:
    result = json.loads(lorakit(capsys, "export", checkpoint, tmp_path / "out", "--json").out)
    assert result["digests"] == {name: sha256(data) for name, data in files_below(checkpoint).items()}
    assert (result["destination"], result["way"]) == (str(tmp_path / "out"), "folder")


def test_a_dry_run_writes_nothing(capsys: Capture, checkpoint: Path, tmp_path: Path) -> None:
    ended = lorakit(capsys, "export", checkpoint, tmp_path / "out.zip", "--dry-run")
    assert ended.out.split() == sorted(files_below(checkpoint))
    assert ended.err.endswith(f"would go to '{tmp_path / 'out.zip'}'; nothing was written\n")
    assert not (tmp_path / "out.zip").exists()


def test_there_and_back(capsys: Capture, checkpoint: Path, tmp_path: Path) -> None:
    lorakit(capsys, "export", tmp_path / "runs" / "sql", tmp_path / "sql.zip")
    ended = lorakit(capsys, "fetch", tmp_path / "sql.zip", "--out", tmp_path / "back")
    assert ended.code == 0
    assert "note: every file is as lorakit.sha256 says" in ended.err
    assert files_below(tmp_path / "back") == files_below(checkpoint)
