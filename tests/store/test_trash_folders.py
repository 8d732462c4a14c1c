"""What is taken out of a run goes by one rename, and comes back exactly where it was."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.errors import Conflict, LorakitError, NotFound, Refused
from lorakit.store import trash_folders
from lorakit.store.trash_folders import (
    GRACE,
    clear_leftovers,
    purge,
    put_back,
    remove_at_once,
    size_of,
    take_out,
    taken_in,
)
from tests.disks import small_disk_at
from tests.store.interrupted import kills
from tests.store.kept import contents, write_checkpoint

NOW = 1_700_000_000.0


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step in (100, 200):
        write_checkpoint(tmp_path / "sql" / f"checkpoint-{step}", str(step))
    return tmp_path / "sql"


def trash_of(run: Path) -> Path:
    return run / ".lorakit" / "trash"


def test_it_is_out_of_the_run_and_comes_back_as_it_was(run: Path) -> None:
    place = run / "checkpoint-100"
    before, inode = contents(place), place.stat().st_ino
    taken = take_out(place, NOW)
    assert not place.exists()
    assert taken_in(trash_of(run)) == [taken]
    assert (taken.place, taken.journal.name, taken.journal.at) == (place, "checkpoint-100", NOW)
    assert taken.journal.size == sum(len(data) for data in before.values())
    assert put_back(taken) == place
    assert contents(place) == before
    assert place.stat().st_ino == inode, "renamed, not copied"
    assert taken_in(trash_of(run)) == []
    assert not list(trash_of(run).iterdir())


def test_a_single_file_goes_and_comes_too(run: Path) -> None:
    file = run / "last.ckpt"
    file.write_bytes(b"all")
    taken = take_out(file, NOW)
    assert not file.exists()
    put_back(taken)
    assert file.read_bytes() == b"all"


@pytest.mark.parametrize("kind", ["folder", "empty folder", "file", "dangling link"])
@pytest.mark.parametrize("what", ["checkpoint-100", "last.ckpt"])
def test_a_place_that_is_taken_by_now_is_left_alone(run: Path, kind: str, what: str) -> None:
    (run / "last.ckpt").write_bytes(b"all")
    place = run / what
    taken = take_out(place, NOW)
    if kind == "file":
        place.write_text("new")
    elif kind == "dangling link":
        place.symlink_to("nowhere")
    else:
        place.mkdir()
        if kind == "folder":
            (place / "new").write_text("new")
    with pytest.raises(Conflict, match="taken by now"):
        put_back(taken)
    assert taken_in(trash_of(run)) == [taken]
    assert os.path.lexists(place)


def test_where_the_file_system_can_not_promise_a_free_place_it_is_looked_for(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Old:
        def renameat2(self, *_: object) -> int:
            import ctypes
            import errno

            ctypes.set_errno(errno.EINVAL)
            return -1

    monkeypatch.setattr(trash_folders, "_libc", Old())
    taken = take_out(run / "checkpoint-100", NOW)
    (run / "checkpoint-100").mkdir()
    with pytest.raises(Conflict):
        put_back(taken)
    (run / "checkpoint-100").rmdir()
    put_back(taken)
    assert contents(run / "checkpoint-100")


def test_what_is_gone_is_not_found(run: Path) -> None:
    with pytest.raises(NotFound, match="is gone"):
        take_out(run / "checkpoint-7", NOW)
    assert not list(trash_of(run).iterdir())
    taken = take_out(run / "checkpoint-100", NOW)
    purge(taken)
    with pytest.raises(NotFound, match="no more"):
        put_back(taken)
    with pytest.raises(NotFound, match="is gone"):
        remove_at_once(run / "checkpoint-7")


def test_a_run_that_was_moved_has_its_trash_with_it(run: Path) -> None:
    take_out(run / "checkpoint-100", NOW)
    moved = run.rename(run.with_name("moved"))
    (taken,) = taken_in(trash_of(moved))
    assert put_back(taken) == moved / "checkpoint-100"


def test_a_link_in_place_of_the_trash_is_never_followed(run: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (run / ".lorakit").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Refused, match="is a link"):
        take_out(run / "checkpoint-100", NOW)
    assert contents(run / "checkpoint-100")


@given(
    st.dictionaries(
        st.sampled_from(["uid", "name", "size", "at", "more"]),
        st.none()
        | st.integers()
        | st.floats()
        | st.text(max_size=8)
        | st.sampled_from(["..", "a/b", "checkpoint-100"]),
    )
)
def test_a_journal_that_lorakit_did_not_write_leads_nowhere(
    tmp_path_factory: pytest.TempPathFactory, said: dict[str, object]
) -> None:
    run = tmp_path_factory.mktemp("run")
    trash = trash_of(run)
    uid = "a" * 32
    (trash / uid / "checkpoint-100").mkdir(parents=True)
    (trash / f"{uid}.json").write_text(json.dumps({"uid": uid, **said}))
    for taken in taken_in(trash):
        assert taken.place == run / "checkpoint-100"
        assert taken.content == trash / uid / "checkpoint-100"


def test_at_once_leaves_nothing(run: Path) -> None:
    (run / "last.ckpt").write_bytes(b"all")
    for name in ("checkpoint-100", "last.ckpt"):
        remove_at_once(run / name)
    assert os.listdir(run) == ["checkpoint-200"]


def test_a_size_is_that_of_all_files(run: Path) -> None:
    assert size_of(run) == sum(len(data) for data in contents(run).values())
    assert size_of(run / "nowhere") == 0


def test_killed_at_any_line_it_is_in_the_run_or_in_the_trash_and_whole(run: Path) -> None:
    place, trash = run / "checkpoint-100", trash_of(run)
    before = contents(place)
    for _ in kills(lambda: take_out(place, NOW)):
        found = taken_in(trash)
        assert len(found) + place.exists() == 1
        assert contents(found[0].content if found else place) == before
        if found:
            put_back(found[0])
    clear_leftovers(trash)
    (taken,) = taken_in(trash)
    assert sorted(os.listdir(trash)) == [taken.journal.uid, f"{taken.journal.uid}.json"]


def test_coming_back_killed_at_any_line_it_is_there_or_can_come_back_again(run: Path) -> None:
    place, trash = run / "checkpoint-100", trash_of(run)
    before = contents(place)
    take_out(place, NOW)
    for _ in kills(lambda: put_back(taken_in(trash)[0])):
        found = taken_in(trash)
        assert len(found) + place.exists() == 1
        assert contents(found[0].content if found else place) == before
        if not found:
            clear_leftovers(trash)
            take_out(place, NOW)
    assert contents(place) == before


def test_a_purge_killed_at_any_line_offers_nothing_half_deleted(run: Path) -> None:
    place, trash = run / "checkpoint-100", trash_of(run)
    before = contents(place)
    take_out(place, NOW)

    def purged() -> None:
        for taken in taken_in(trash):
            purge(taken)

    for _ in kills(purged):
        for taken in taken_in(trash):
            assert contents(taken.content) == before
        if not taken_in(trash):
            clear_leftovers(trash)
            assert not list(trash.iterdir())
            write_checkpoint(place, "100")
            take_out(place, NOW)
    clear_leftovers(trash)
    assert not list(trash.iterdir())


def test_removed_at_once_and_killed_at_any_line_it_is_whole_or_gone_and_the_rest_can_be_cleared(run: Path) -> None:
    place = run / "checkpoint-100"
    before = contents(place)
    for _ in kills(lambda: remove_at_once(place)):
        assert not place.exists() or contents(place) == before
        clear_leftovers(trash_of(run))
        assert {name for name in os.listdir(run) if name.startswith(".")} == set()
        if not place.exists():
            write_checkpoint(place, "100")


def test_what_can_not_be_deleted_at_once_is_said_with_where_it_is(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(folder: Path) -> None:
        raise PermissionError(1, "Operation not permitted", str(folder))

    monkeypatch.setattr(trash_folders.shutil, "rmtree", fails)
    with pytest.raises(LorakitError, match=r"is removed, but not all .* what is left is '.*\.lorakit-trash-"):
        remove_at_once(run / "checkpoint-100")
    monkeypatch.undo()
    clear_leftovers(trash_of(run))
    assert os.listdir(run) == ["checkpoint-200"]


@pytest.mark.parametrize("harm", ["cut short", "not to be read", "of another", "gone"])
def test_what_a_journal_says_nothing_of_any_more_is_left_and_said(run: Path, harm: str) -> None:
    taken = take_out(run / "checkpoint-100", NOW)
    before, trash = contents(taken.content), trash_of(run)
    journal = trash / f"{taken.journal.uid}.json"
    if harm == "cut short":
        journal.write_bytes(journal.read_bytes()[:20])
    elif harm == "of another":
        journal.write_text(journal.read_text().replace("checkpoint-100", "checkpoint-7"))
    else:
        journal.unlink()
        if harm == "not to be read":
            journal.mkdir()
    (said,) = clear_leftovers(trash)
    assert str(trash / taken.journal.uid) in said
    assert contents(taken.content) == before
    assert len(clear_leftovers(trash, time.time() + GRACE + 1)) == (harm != "gone")
    assert taken.content.exists() == (harm != "gone")


def test_a_link_in_the_trash_is_removed_and_not_what_it_leads_to(run: Path) -> None:
    taken = take_out(run / "checkpoint-100", NOW)
    for name in ("0" * 32, f"{'1' * 32}.gone"):
        (trash_of(run) / name).symlink_to(run / "checkpoint-200")
    assert clear_leftovers(trash_of(run)) == []
    assert contents(run / "checkpoint-200")
    assert sorted(os.listdir(trash_of(run))) == [taken.journal.uid, f"{taken.journal.uid}.json"]


def test_the_way_to_what_is_moved_is_on_the_disk_before_it_is_moved(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    before: list[Path] = []
    sync, rename = trash_folders.sync_folder, trash_folders._rename

    def syncing(folder: Path) -> None:
        synced.append(folder)
        sync(folder)

    def renaming(source: Path, target: Path) -> None:
        before.extend(synced)
        rename(source, target)

    monkeypatch.setattr(trash_folders, "sync_folder", syncing)
    monkeypatch.setattr(trash_folders, "_rename", renaming)
    take_out(run / "checkpoint-100", NOW)
    assert {run, run / ".lorakit", trash_of(run)} <= set(before)


def test_on_a_full_disk_it_stays_where_it_was_and_can_go_at_once(tmp_path: Path) -> None:
    with small_disk_at(tmp_path / "disk", 64) as disk:
        place = write_checkpoint(disk / "sql" / "checkpoint-100")
        before = contents(place)
        with pytest.raises(OSError, match="No space"):
            (disk / "filler").write_bytes(bytes(1 << 20))
        with pytest.raises(LorakitError, match="no space left"):
            take_out(place, NOW)
        assert contents(place) == before
        assert taken_in(trash_of(place.parent)) == []
        remove_at_once(place)
        assert not place.exists()
