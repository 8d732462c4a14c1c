"""Folders appear whole or not at all, and copies are the bytes."""

from __future__ import annotations

import errno
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lorakit.errors import Conflict, InvalidFile, LorakitError, OutOfSpace
from lorakit.files import folders
from lorakit.files.folders import (
    clear_abandoned,
    copy_file,
    copy_range,
    file_state,
    free_bytes,
    read_json,
    refuse_existing,
    temporary_folder,
    whole_folder,
    write_json,
)


def test_a_folder_appears_with_all_that_was_written(tmp_path: Path) -> None:
    target = tmp_path / "new" / "place"
    with whole_folder(target) as beside:
        (beside / "a").write_text("1")
        assert not target.exists()
    assert (target / "a").read_text() == "1"
    assert os.listdir(target.parent) == ["place"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    def fail(folder: Path) -> None:
        (folder / "a").write_text("1")
        raise error

    for target in (tmp_path / "place", tmp_path / "new" / "parents" / "place"):
        with pytest.raises(error), whole_folder(target) as beside:
            fail(beside)
        assert os.listdir(tmp_path) == []


def test_a_target_that_exists_is_kept(tmp_path: Path) -> None:
    (tmp_path / "place").mkdir()
    (tmp_path / "place" / "precious").write_text("1")
    with pytest.raises(Conflict, match="exists already"), whole_folder(tmp_path / "place"):
        pass
    assert (tmp_path / "place" / "precious").read_text() == "1"


def test_a_target_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    with pytest.raises(Conflict), whole_folder(tmp_path / "place"):
        (tmp_path / "place").write_text("1")
    assert os.listdir(tmp_path) == ["place"]


def test_an_empty_folder_is_no_obstacle_and_a_dangling_link_is(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refuse_existing(tmp_path / "empty")
    refuse_existing(tmp_path / "nothing")
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("link", "file"):
        (tmp_path / "file").touch()
        with pytest.raises(Conflict):
            refuse_existing(tmp_path / name)


def test_what_a_living_writer_holds_is_not_cleared(tmp_path: Path) -> None:
    (tmp_path / ".place.tmp-dead").mkdir()
    (tmp_path / ".place[1].tmp-other").mkdir()
    with whole_folder(tmp_path / "place") as beside:
        clear_abandoned(tmp_path, ".place.tmp-")
        assert sorted(os.listdir(tmp_path)) == sorted([beside.name, ".place[1].tmp-other"])


@pytest.mark.parametrize(
    ("number", "expected"),
    [(errno.ENOSPC, OutOfSpace), (errno.EDQUOT, OutOfSpace), (errno.EROFS, LorakitError), (errno.EACCES, LorakitError)],
)
def test_a_write_that_fails_says_what_and_where(tmp_path: Path, number: int, expected: type[Exception]) -> None:
    with pytest.raises(expected, match=f"{tmp_path / 'place'}"), whole_folder(tmp_path / "place"):
        raise OSError(number, os.strerror(number))


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("size", [0, 1, 5_000_000])
def test_a_copy_is_the_bytes_and_no_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel: bool, size: int
) -> None:
    if not kernel:

        def refuse(*_: object) -> int:
            raise OSError(errno.EXDEV, "other file system")

        monkeypatch.setattr(os, "copy_file_range", refuse)
    (tmp_path / "a").write_bytes(os.urandom(size))
    copy_file(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == (tmp_path / "a").read_bytes()
    assert (tmp_path / "b").stat().st_ino != (tmp_path / "a").stat().st_ino


def test_a_range_goes_to_its_place(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"0123456789")
    (tmp_path / "b").write_bytes(b"..........")
    with (tmp_path / "a").open("rb") as source, (tmp_path / "b").open("r+b") as target:
        copy_range(source.fileno(), target.fileno(), 2, 5, 3)
        with pytest.raises(InvalidFile, match="became shorter"):
            copy_range(source.fileno(), target.fileno(), 8, 0, 3)
    assert (tmp_path / "b").read_bytes()[5:8] == b"234"


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, block, offset: whole(file, bytes(block)[:3], offset))
    with (tmp_path / "a").open("wb") as stream:
        folders.write_all(stream.fileno(), b"0123456789", 0)
    assert (tmp_path / "a").read_bytes() == b"0123456789"


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '"a"', "[" * 100_000])
def test_json_that_is_no_object_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(InvalidFile, match=r"a\.json"):
        read_json(tmp_path / "a.json")


def test_json_is_read_as_it_was_written(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"grün": [1, None]})
    assert read_json(tmp_path / "a.json") == {"grün": [1, None]}


def test_free_space_is_asked_where_a_folder_would_be(tmp_path: Path) -> None:
    assert free_bytes(tmp_path / "not" / "yet") == pytest.approx(free_bytes(tmp_path), rel=0.01)


def test_a_file_that_went_away_has_no_state(tmp_path: Path) -> None:
    with pytest.raises(LorakitError, match="went away"):
        file_state(tmp_path / "gone")


def test_what_a_killed_maker_left_is_cleared_and_what_a_living_one_uses_is_not(tmp_path: Path) -> None:
    (tmp_path / "mine-dead").mkdir()
    (tmp_path / "theirs").mkdir()
    with temporary_folder(tmp_path, "mine-") as first, temporary_folder(tmp_path, "mine-", 0o700) as second:
        assert sorted(tmp_path.iterdir()) == sorted([first, second, tmp_path / "theirs"])
        assert stat.S_IMODE(second.stat().st_mode) == 0o700
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_many_makers_at_once_never_take_each_other_for_dead(tmp_path: Path) -> None:
    def make(_: int) -> None:
        for _ in range(50):
            with temporary_folder(tmp_path, "stage-") as folder:
                (folder / "file").write_text("mine")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(make, range(8)))
    assert list(tmp_path.iterdir()) == []
