"""The store is looked through byte by byte, and what is wrong is said with what to do."""

from __future__ import annotations

import sqlite3
import time
from pathlib import Path

import pytest

from lorakit.store.garbage import find_garbage
from lorakit.store.kept import Kept, kept_in
from lorakit.store.store import Store
from lorakit.store.trash import find_stored, purge, trash_stored, trashed_in
from lorakit.store.verify import verify_store
from tests.store.kept import kept, write_checkpoint
from tests.store.test_store import add, after_loss


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def one(home: Path, tmp_path: Path) -> Kept:
    return kept(home, tmp_path / "one")


def reasons(home: Path) -> list[str]:
    return [wrong.reason for wrong in verify_store(home).wrong]


def test_a_store_as_it_should_be_is_read_wholly(home: Path, one: Kept) -> None:
    store = Store(home, "llama")
    revision = add(store)
    store.close()
    said: list[tuple[int, int]] = []
    verified = verify_store(home, lambda done, total: said.append((done, total)))
    assert (verified.contents, verified.size) == (2, one.size + revision.size)
    assert (verified.wrong, verified.unneeded) == ((), ())
    assert said[-1] == (verified.size, verified.size)


def test_where_there_is_no_store_nothing_is_wrong_and_none_is_made(home: Path) -> None:
    assert verify_store(home).contents == 0
    assert not home.exists()


@pytest.mark.parametrize("harm", ["flip", "shorten", "add", "remove", "rename"])
def test_any_change_of_what_was_kept_is_found(home: Path, one: Kept, harm: str) -> None:
    file = one.folder / "optimizer.pt"
    one.folder.chmod(0o755)
    file.chmod(0o644)
    if harm == "flip":
        data = bytearray(file.read_bytes())
        data[3] ^= 1
        file.write_bytes(data)
    elif harm == "shorten":
        file.write_bytes(file.read_bytes()[:-1])
    elif harm == "add":
        (one.folder / "more").write_text("")
        (one.folder / "more").chmod(0o444)
    elif harm == "remove":
        file.unlink()
    else:
        file.rename(one.folder / "other.pt")
    for path in one.folder.iterdir():
        path.chmod(0o555 if path.is_dir() else 0o444)
    one.folder.chmod(0o555)
    (wrong,) = verify_store(home).wrong
    assert wrong.what == one.id
    assert "is not what was kept" in wrong.reason
    assert f"lorakit rm {one.uid}" in wrong.cure


def test_its_own_lorakit_json_counts_for_a_kept_one_and_a_revision_may_have_any(home: Path, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "merged", files={"model.safetensors": b"w", "lorakit.json": b"{}"})
    one = kept(home, source)
    store = Store(home, "llama")
    revision = add(store)
    store.close()
    for folder in (one.folder, revision.folder):
        folder.chmod(0o755)
        (folder / "lorakit.json").chmod(0o644)
        (folder / "lorakit.json").write_text("other")
        (folder / "lorakit.json").chmod(0o444)
        folder.chmod(0o555)
    assert [wrong.what for wrong in verify_store(home).wrong] == [one.id]


def test_a_record_without_its_files_is_said_and_what_it_says_to_do_helps(home: Path, one: Kept, tmp_path: Path) -> None:
    one.folder.chmod(0o755)
    one.folder.rename(tmp_path / "elsewhere")
    (wrong,) = verify_store(home).wrong
    assert "its files are not in" in wrong.reason
    assert f"lorakit rm {one.uid} --purge" in wrong.cure
    trash_stored(find_stored(one.uid, home), home)
    assert reasons(home), "in the trash it is still without"
    purge(trashed_in(home), home)
    assert reasons(home) == []


def test_taken_in_again_it_has_its_files(home: Path, one: Kept, tmp_path: Path) -> None:
    one.folder.chmod(0o755)
    one.folder.rename(tmp_path / "elsewhere")
    assert kept(home, tmp_path / "one") == one
    assert reasons(home) == []


@pytest.mark.parametrize("name", [".", "optimizer.pt", "global_step5"])
def test_what_can_be_written_to_is_said(home: Path, one: Kept, name: str) -> None:
    (one.folder / name).chmod(0o755)
    (reason,) = reasons(home)
    assert "can be written to" in reason


def test_a_link_in_the_store_is_said_and_not_followed(home: Path, one: Kept, tmp_path: Path) -> None:
    one.folder.chmod(0o755)
    (one.folder / "link").symlink_to(tmp_path)
    one.folder.chmod(0o555)
    (reason,) = reasons(home)
    assert "neither a file nor a folder" in reason


def test_folders_that_no_record_needs_are_named_and_not_wrong(home: Path, one: Kept) -> None:
    (home / "revisions" / ("f" * 64)).mkdir()
    verified = verify_store(home)
    assert verified.wrong == ()
    assert [path.name for path in verified.unneeded] == ["f" * 64]


def test_what_is_removed_while_it_is_read_is_not_wrong(home: Path, one: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    from lorakit.store import contents as module

    digest = module.folder_digest

    def removing(folder: Path, names: list[str]) -> str:
        if kept_in(home):
            purge([trash_stored(find_stored(one.uid, home), home)], home)
        return digest(folder, names)

    monkeypatch.setattr(module, "folder_digest", removing)
    assert reasons(home) == []
    assert kept_in(home) == []


def test_folders_without_a_database_are_wrong(home: Path, one: Kept) -> None:
    for file in home.glob("store.sqlite3*"):
        file.unlink()
    (wrong,) = verify_store(home).wrong
    assert wrong.what == str(one.folder)
    assert "lost" in wrong.reason
    assert "backup" in wrong.cure


def test_folders_from_before_a_database_that_was_made_anew_are_wrong_and_no_garbage(home: Path, one: Kept) -> None:
    for file in home.glob("store.sqlite3*"):
        file.unlink()
    after_loss(home)
    verified = verify_store(home)
    assert [wrong.what for wrong in verified.wrong] == [str(one.folder)]
    assert verified.unneeded == ()
    assert find_garbage(home, now=time.time() + 1e9).folders == ()


def test_a_file_that_is_no_database_is_wrong(home: Path, one: Kept) -> None:
    (home / "store.sqlite3").write_bytes(b"garbage" * 1000)
    (reason,) = reasons(home)
    assert "not a database" in reason


def test_a_damaged_database_is_said(home: Path, one: Kept) -> None:
    with sqlite3.connect(home / "store.sqlite3") as db:
        db.execute("PRAGMA writable_schema = ON")
        db.execute("DELETE FROM sqlite_schema WHERE name = 'kept_by_digest'")
        db.execute("PRAGMA writable_schema = RESET")
    db.close()
    assert kept_in(home) == [one]
    assert any("database is damaged" in reason for reason in reasons(home))
