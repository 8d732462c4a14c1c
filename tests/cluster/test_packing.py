"""What a task is given means the same in another working directory."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from lorakit.cluster.packing import packed, unpacked
from lorakit.files.safetensors import StoredTensor


@dataclass(frozen=True, slots=True)
class Part:
    where: Path
    tensors: tuple[StoredTensor, ...]


def test_every_path_is_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    stored = StoredTensor("a", Path("base/model.safetensors"), "F32", (2,), 8, 16)
    block = packed({"part": Part(Path("out"), (stored, stored)), "name": "base"})
    monkeypatch.chdir("/")
    found = unpacked(block)
    assert found["name"] == "base"
    assert found["part"].where == tmp_path / "out"
    assert found["part"].tensors[0].file == tmp_path / "base" / "model.safetensors"
    assert found["part"].tensors[0] is found["part"].tensors[1]


def test_a_path_through_a_link_is_left_as_it_is(tmp_path: Path) -> None:
    assert os.fspath(unpacked(packed(tmp_path / "link" / ".." / "file"))) == f"{tmp_path}/link/../file"
