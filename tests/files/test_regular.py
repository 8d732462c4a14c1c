"""Files that anybody may have put there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lorakit.errors import InvalidFile, NotFound
from lorakit.files.regular import opened


def test_a_file_is_opened_through_links_too(tmp_path: Path) -> None:
    (tmp_path / "it").write_bytes(b"abc")
    (tmp_path / "link").symlink_to("it")
    for name in ("it", "link"):
        with opened(tmp_path / name) as stream:
            assert stream.read() == b"abc"


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("nowhere", NotFound, "there is no file"), ("folder", InvalidFile, "is a folder"),
        ("pipe", InvalidFile, "is a pipe"), ("x" * 1000, InvalidFile, "name too long"),
        ("nul\0", InvalidFile, "null byte"), ("circle", InvalidFile, "symbolic links"),
    ],
    ids=["nowhere", "folder", "pipe", "long", "nul", "circle"],
)  # fmt: skip
def test_what_is_none_is_said_at_once(tmp_path: Path, name: str, error: type[Exception], words: str) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises(error, match=rf"(?i){words}"), opened(tmp_path / name):
        pass


def test_a_file_of_somebody_else_names_the_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*args: object) -> int:  # root, as whom tests may run, can read every file
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", denied)
    with pytest.raises(InvalidFile, match=r"permission denied; chmod it, or run as its owner"), opened(tmp_path / "it"):
        pass
