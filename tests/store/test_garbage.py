"""What the store can do without goes, and says how many bytes that frees."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest

from lorakit.store.contents import YOUNG
from lorakit.store.garbage import clear, clear_expired, find_garbage
from lorakit.store.kept import Kept, kept_in
from lorakit.store.trash import GRACE, find_stored, trash_path, trash_stored, trashed_in, undelete
from lorakit.store.verify import verify_store
from tests.store.interrupted import kills
from tests.store.kept import kept, write_checkpoint


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def one(home: Path, tmp_path: Path) -> Kept:
    return kept(home, tmp_path / "one", "one", run="chat")


def remove(one: Kept, home: Path, now: float) -> None:
    trash_stored(find_stored(one.id, home), home, now=now)


def unneeded(home: Path, name: str = "f" * 64, size: int = 1000) -> Path:
    folder = home / "revisions" / name
    folder.mkdir(parents=True)
    (folder / "weights").write_bytes(bytes(size))
    return folder


def test_where_there_is_no_store_there_is_none_and_none_is_made(home: Path) -> None:
    garbage = find_garbage(home)
    clear(garbage)
    assert (garbage.size, garbage.as_list()) == (0, [])
    assert not home.exists()


def test_what_no_record_needs_goes_when_nobody_can_be_about_to_record_it(home: Path, one: Kept) -> None:
    folder = unneeded(home)
    now = time.time()
    assert find_garbage(home, now=now).folders == ()
    garbage = find_garbage(home, now=now + YOUNG + 1)
    assert garbage.as_list() == [{"what": "unneeded", "name": folder.name, "uid": None, "size": 1000}]
    clear(garbage)
    assert not folder.exists()
    assert kept_in(home) == [one]


def test_what_was_needed_again_before_it_was_cleared_stays(home: Path, one: Kept, tmp_path: Path) -> None:
    remove(one, home, now=0.0)
    garbage = find_garbage(home)
    undelete(trashed_in(home)[0], home)
    clear(garbage)
    assert kept_in(home) == [one]
    assert verify_store(home).wrong == ()


def test_what_was_in_the_trash_for_long_goes_and_the_rest_stays(home: Path, one: Kept, tmp_path: Path) -> None:
    now = 1_700_000_000.0
    remove(one, home, now)
    place = write_checkpoint(tmp_path / "sql" / "checkpoint-100")
    trash_path(place, home, now=now + 60)
    assert find_garbage(home, now=now + GRACE - 1).trashed == ()
    garbage = find_garbage(home, now=now + GRACE)
    assert [(row["what"], row["name"], row["size"]) for row in garbage.as_list()] == [("trash", one.id, one.size)]
    clear(garbage)
    assert [lying.name for lying in trashed_in(home)] == [str(place)]
    clear_expired(home, now + 60 + GRACE)
    assert trashed_in(home) == []
    assert not list((tmp_path / "sql" / ".lorakit" / "trash").iterdir())


def test_bytes_that_others_need_are_not_freed_and_shared_ones_are_freed_once(
    home: Path, one: Kept, tmp_path: Path
) -> None:
    again, third = (kept(home, tmp_path / "one", run=run) for run in ("sql", "math"))
    remove(one, home, 0.0)
    remove(again, home, 1.0)
    assert find_garbage(home).size == 0
    remove(third, home, 2.0)
    garbage = find_garbage(home)
    assert garbage.size == one.size
    clear(garbage)
    assert not one.folder.exists()


def test_what_killed_removals_left_in_runs_goes(home: Path, tmp_path: Path) -> None:
    place = write_checkpoint(tmp_path / "sql" / "checkpoint-100")
    trash_path(place, home)
    trash = tmp_path / "sql" / ".lorakit" / "trash"
    (trash / ("a" * 32)).mkdir()
    (trash / f"{'b' * 32}.json").write_text("{}")
    (trash / "notes.txt").write_text("not lorakit's")
    clear(find_garbage(home))
    (lying,) = trashed_in(home)
    assert sorted(os.listdir(trash)) == sorted(["notes.txt", lying.uid, f"{lying.uid}.json"])


def test_what_is_in_the_way_of_one_is_not_in_the_way_of_the_others(home: Path, one: Kept, tmp_path: Path) -> None:
    runs = [tmp_path / name for name in ("old", "sql")]
    for run in runs:
        trash_path(write_checkpoint(run / "checkpoint-100"), home, now=0.0)
    (runs[0] / ".lorakit").rename(tmp_path / "elsewhere")
    (runs[0] / ".lorakit").symlink_to(tmp_path / "elsewhere")
    remove(one, home, now=0.0)
    gone, left = clear(find_garbage(home))
    assert {lying.name for lying, _ in gone.trashed} == {one.id, str(runs[1] / "checkpoint-100")}
    assert all("is a link: remove it" in said for said in left)
    assert [lying.name for lying in trashed_in(home)] == [str(runs[0] / "checkpoint-100")]
    (said,) = clear_expired(home)
    assert said.startswith(f"'{runs[0] / 'checkpoint-100'}' is not deleted: ")


def test_what_can_not_be_deleted_is_not_said_to_be_freed(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(folder: Path) -> None:
        raise PermissionError(1, "Operation not permitted", str(folder))

    trash_path(write_checkpoint(tmp_path / "sql" / "checkpoint-100"), home, now=0.0)
    monkeypatch.setattr("lorakit.store.trash_folders.shutil.rmtree", fails)
    gone, left = clear(find_garbage(home))
    assert (gone.size, len(left)) == (0, 2)
    assert trashed_in(home) == [], "half of it may be gone"
    monkeypatch.undo()
    assert clear(find_garbage(home))[1] == []
    assert not list((tmp_path / "sql" / ".lorakit" / "trash").iterdir())


def test_what_goes_while_it_is_looked_for_is_no_error(home: Path, one: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, lstat = unneeded(home), Path.lstat

    def removing(self: Path) -> os.stat_result:
        if self == folder and os.path.lexists(folder):
            shutil.rmtree(folder)
        return lstat(self)

    monkeypatch.setattr(Path, "lstat", removing)
    assert find_garbage(home, now=time.time() + YOUNG + 1).folders == ()


def test_killed_at_any_line_all_that_is_known_is_whole_and_the_next_one_clears_the_rest(
    home: Path, one: Kept, tmp_path: Path
) -> None:
    def clear_all() -> None:
        clear(find_garbage(home, older_than=0.0, now=time.time() + YOUNG + 1))

    for _ in kills(clear_all, every=7):
        assert verify_store(home).wrong == ()
        if not trashed_in(home) and kept_in(home) == []:
            remove(kept(home, tmp_path / "one", run="chat"), home, 0.0)
        for lying in trashed_in(home)[1:]:
            undelete(lying, home)
        if not trashed_in(home):
            remove(kept_in(home)[0], home, 0.0)
    clear_all()
    assert not list((home / "revisions").iterdir())
    assert not list((home / "tmp").iterdir())
