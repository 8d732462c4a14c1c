"""A node that does not see what the others see is named, with the path."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from lorakit.cluster import sight as module
from lorakit.cluster.sight import Sight, ensure_seen, sight_of
from lorakit.errors import Conflict, NotFound, UsageError


@pytest.fixture(autouse=True)
def named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test is another node."""
    module._states.cache_clear()
    monkeypatch.setattr(module.socket, "gethostname", lambda: "gpu-7")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    file = tmp_path / "base" / "model.safetensors"
    file.parent.mkdir()
    file.write_bytes(b"1" * 5000)
    return file


def test_a_node_that_sees_all_says_nothing(tmp_path: Path, base: Path) -> None:
    with sight_of(tmp_path, [base, base]) as sight:
        assert (tmp_path / sight.mark).exists()
        sight.ensure_here()
        sight.ensure_unchanged()
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_file_that_is_not_there_is_named(tmp_path: Path, base: Path) -> None:
    with sight_of(tmp_path, [base]) as sight:
        base.unlink()
        with pytest.raises(NotFound, match=f"node 'gpu-7' does not see '{base}': --ray needs a file system that all"):
            sight.ensure_here()
    with pytest.raises(NotFound, match=f"node 'gpu-7' does not see '{base}'"):
        ensure_seen([base])


def test_another_file_of_the_same_name_and_size_is_told(tmp_path: Path, base: Path) -> None:
    with sight_of(tmp_path, [base]) as sight:
        base.write_bytes(b"2" * 5000)
        with pytest.raises(NotFound, match=f"node 'gpu-7' has another file at '{base}' than this machine"):
            sight.ensure_here()


def test_a_folder_of_the_same_name_is_not_the_one_that_is_written(tmp_path: Path, base: Path) -> None:
    out = tmp_path / ".out.tmp-1"
    out.mkdir()
    with sight_of(out, [base]) as sight:
        (out / sight.mark).unlink()  # as on a disk of its own
        with pytest.raises(NotFound, match=f"node 'gpu-7' does not see '{tmp_path}', where the result is written"):
            sight.ensure_here()


def test_where_nothing_is_written_no_folder_is_looked_at(base: Path) -> None:
    with sight_of(None, [base]) as sight:
        sight.ensure_here()
        assert sight.folder is None


def test_another_lorakit_is_refused(tmp_path: Path, base: Path) -> None:
    with sight_of(tmp_path, [base]) as sight:
        other: Sight = replace(sight, version="9.9")
        with pytest.raises(UsageError, match=r"node 'gpu-7' has lorakit .*, and this is 9.9: install the same there"):
            other.ensure_here()


def test_a_file_that_is_written_meanwhile_is_a_conflict(tmp_path: Path, base: Path) -> None:
    with sight_of(tmp_path, [base]) as sight:
        sight.ensure_here()
        base.write_bytes(b"2" * 5001)
        with pytest.raises(Conflict, match="was written again while it was read"):
            sight.ensure_unchanged()
