"""`lorakit unmerge`: the folder on stdout, and the exit codes of its refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.cli.commands import lorakit
from tests.folders import stored

Capture = pytest.CaptureFixture[str]


def test_the_base_comes_back(capsys: Capture, base: Path, adapter: Path, tmp_path: Path) -> None:
    assert lorakit(capsys, "merge", adapter, "--out", tmp_path / "out", "--undo").code == 0
    tensors = stored(base)
    shutil.rmtree(base)
    planned = lorakit(capsys, "unmerge", tmp_path / "out", "--dry-run")
    assert planned.out.endswith("from what was kept of the difference; nothing was written\n")
    ended = lorakit(capsys, "unmerge", tmp_path / "out", "--out", tmp_path / "back")
    assert (ended.code, ended.out) == (0, f"{tmp_path / 'back'}\n")
    assert "the identity is the base's (llama-" in ended.err
    back = stored(tmp_path / "back")
    assert back.keys() == tensors.keys()
    assert all(np.array_equal(back[name], tensors[name]) for name in tensors)


def test_as_data(capsys: Capture, adapter: Path, tmp_path: Path) -> None:
    lorakit(capsys, "merge", adapter, "--out", tmp_path / "out")
    ended = lorakit(capsys, "unmerge", tmp_path / "out", "--out", tmp_path / "back", "--json")
    assert (ended.code, ended.err) == (0, "")
    assert (json.loads(ended.out)["how"], json.loads(ended.out)["tensors"]) == ("base", 10)


def test_what_can_not_be_is_refused(capsys: Capture, base: Path, adapter: Path, tmp_path: Path) -> None:
    lorakit(capsys, "merge", adapter, "--out", tmp_path / "out")
    assert lorakit(capsys, "unmerge", tmp_path / "out").code == 2
    assert lorakit(capsys, "unmerge", tmp_path / "out", "--out", adapter).code == 5
    assert lorakit(capsys, "unmerge", base, "--out", tmp_path / "back").code == 3
    shutil.rmtree(base)
    ended = lorakit(capsys, "unmerge", tmp_path / "out", "--out", tmp_path / "back")
    assert (ended.code, "would not give the base back" in ended.err) == (4, True)
    assert not (tmp_path / "back").exists()
