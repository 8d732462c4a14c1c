"""One file that many processes open and change, of this version or an older one."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from lorakit.errors import LorakitError, OutOfSpace
from lorakit.store.contents import unknown_in
from lorakit.store.database import Database, open_database
from lorakit.store.kept import kept_in
from lorakit.store.store import open_store
from lorakit.store.trash import find_stored, purge, trash_stored
from lorakit.store.verify import verify_store
from tests.disks import small_disk_at
from tests.store.kept import kept, write_checkpoint

# What the first version of lorakit wrote, word for word.
FIRST = """
CREATE TABLE revisions (
    id INTEGER PRIMARY KEY AUTOINCREMENT, base TEXT NOT NULL, run TEXT NOT NULL, kind TEXT NOT NULL, step INTEGER,
    digest TEXT NOT NULL, facts TEXT NOT NULL, rank INTEGER NOT NULL, size INTEGER NOT NULL, source TEXT NOT NULL,
    created REAL NOT NULL, repaired TEXT
);
CREATE UNIQUE INDEX one_content ON revisions (base, run, kind, ifnull(step, -1), digest);
CREATE TABLE finishes (
    id INTEGER PRIMARY KEY AUTOINCREMENT, revision INTEGER NOT NULL REFERENCES revisions (id) ON DELETE CASCADE,
    attempt INTEGER NOT NULL, at REAL NOT NULL
);
CREATE TABLE runs (
    base TEXT NOT NULL, run TEXT NOT NULL, pinned INTEGER NOT NULL DEFAULT 0, PRIMARY KEY (base, run)
);
CREATE TABLE aliases (
    base TEXT NOT NULL, run TEXT NOT NULL, alias TEXT NOT NULL,
    revision INTEGER NOT NULL REFERENCES revisions (id) ON DELETE CASCADE, PRIMARY KEY (base, run, alias)
);
CREATE TABLE moves (
    id INTEGER PRIMARY KEY AUTOINCREMENT, base TEXT NOT NULL, run TEXT NOT NULL, alias TEXT NOT NULL,
    revision INTEGER NOT NULL, at REAL NOT NULL, why TEXT NOT NULL
);
CREATE TABLE sources (
    base TEXT NOT NULL, run TEXT NOT NULL, path TEXT NOT NULL, signature TEXT NOT NULL,
    weights_signature TEXT NOT NULL, PRIMARY KEY (base, run, path)
);
"""
DIGESTS = ["a" * 64, "b" * 64]


@pytest.fixture
def old(tmp_path: Path) -> Path:
    home = tmp_path / "home"
    home.mkdir()
    db = sqlite3.connect(home / "store.sqlite3")
    db.executescript(f"PRAGMA journal_mode = WAL; {FIRST} PRAGMA user_version = 1;")
    db.execute("INSERT INTO runs VALUES ('llama', 'sql', 1)")
    for number, digest in enumerate(DIGESTS, 1):
        (home / "revisions" / digest).mkdir(parents=True)
        db.execute(
            "INSERT INTO revisions VALUES (?, 'llama', 'sql', 'step', ?, ?, '{}', 8, 3, '/runs', 1.5, NULL)",
            (number, number * 100, digest),
        )
        db.execute("INSERT INTO finishes (revision, attempt, at) VALUES (?, 1, 2.5)", (number,))
    db.execute("INSERT INTO aliases VALUES ('llama', 'sql', 'prod', 1)")
    db.commit()
    db.close()
    return home


def test_a_store_of_the_first_version_is_opened_with_all_that_it_knows(old: Path, tmp_path: Path) -> None:
    with open_store(old, "llama") as store:
        run = store.runs()["sql"]
    assert [revision.digest for revision in run.revisions.values()] == DIGESTS
    assert run.aliases == {"prod": 1}
    assert run.pinned
    assert [finish.attempt for finish in run.finishes] == [1, 1]
    stored = find_stored(f"sql@{DIGESTS[1]}", old)
    assert len(stored.uid) == 32
    assert kept(old, tmp_path / "source") in kept_in(old)


def test_what_a_process_of_the_first_version_still_adds_gets_a_unique_id(old: Path) -> None:
    with open_database(old) as database, sqlite3.connect(old / "store.sqlite3") as first:
        for digest in ("c" * 64, "d" * 64):
            first.execute(
                "INSERT INTO revisions (base, run, kind, step, digest, created, facts, rank, size, source, repaired)"
                " VALUES ('llama', 'sql', 'step', 300, ?, 1.5, '{}', 8, 3, '/runs', NULL)",
                (digest,),
            )
        first.commit()
        assert database.rows("SELECT count(DISTINCT uid), count(*) FROM revisions") == [(4, 4)]
    first.close()
    (old / "revisions" / ("c" * 64)).mkdir()
    assert len(find_stored(f"sql@{'c' * 64}", old).uid) == 32


def test_content_of_an_old_store_that_no_record_names_is_of_that_store(old: Path) -> None:
    (old / "revisions" / ("e" * 64)).mkdir()
    with open_database(old) as database:
        assert [[path.name for path in paths] for paths in unknown_in(database)] == [["e" * 64], []]


def test_every_revision_of_an_old_store_gets_a_unique_id_once(old: Path) -> None:
    def uids() -> list[str]:
        with open_database(old) as database:
            return [uid for (uid,) in database.rows("SELECT uid FROM revisions")]

    first = uids()
    assert len(set(first)) == 2
    assert uids() == first


def test_an_update_that_fails_leaves_the_old_store_as_it_was(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lorakit.store import database as module

    monkeypatch.setattr(module, "_VERSIONS", (*module._VERSIONS, "CREATE TABLE x (y); CREATE TABLE x (y);"))
    with pytest.raises(LorakitError, match="can't be used"):
        Database(old)
    db = sqlite3.connect(old / "store.sqlite3")
    assert db.execute("PRAGMA user_version").fetchone() == (1,)
    assert not db.execute("SELECT 1 FROM sqlite_schema WHERE name IN ('x', 'kept')").fetchall()
    db.close()
    monkeypatch.undo()
    Database(old).close()


def test_processes_that_make_the_same_new_store_at_once_all_succeed(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from lorakit.store.database import Database\n" \
        "input(); [Database(Path(sys.argv[1]) / str(n)).close() for n in range(20)]"  # fmt: skip
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(4)
    ]
    for process in started:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    ended = [process.communicate(timeout=60)[1] for process in started]
    assert ended == [""] * 4


def test_a_store_without_room_for_a_change_says_so_and_keeps_what_was_there(tmp_path: Path) -> None:
    with open_database(tmp_path) as database:
        pages = database.rows("PRAGMA page_count")[0][0]
        database.rows(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(OutOfSpace, match=r"database or disk is full.*lorakit store gc"), database.change() as db:
            db.executemany("INSERT INTO trash_folders VALUES (?)", ((f"/runs/{n}",) for n in range(10_000)))
        assert database.rows("SELECT count(*) FROM trash_folders") == [(0,)]
        assert database.check() == []


def fill(disk: Path) -> None:
    with (disk / "filler").open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))


@pytest.mark.parametrize("beside", [False, True])
def test_a_full_disk_can_be_read_and_what_frees_some_of_it_finds_room(tmp_path: Path, beside: bool) -> None:
    """Also beside another process, which has the same database open."""
    with small_disk_at(tmp_path / "disk", 2048) as disk:
        home = disk / "home"
        big = write_checkpoint(tmp_path / "big", files={"a": b"x" * 600_000})
        one, two = kept(home, big, run="one"), kept(home, tmp_path / "small", run="two")
        server = Database(home) if beside else None
        fill(disk)
        assert kept_in(home) == [one, two]
        assert verify_store(home).wrong == ()
        with pytest.raises(OutOfSpace, match=r"no space left for the store.*lorakit store gc"):
            trash_stored(find_stored(two.uid, home), home)
        if not beside:
            with pytest.raises(OutOfSpace, match="no space left for the store"):
                Database(home)
        purge([trash_stored(find_stored(one.uid, home), home, at_once=True)], home)
        assert kept_in(home) == [two]
        assert not one.folder.exists()
        if server:
            server.close()


@pytest.mark.parametrize("wal", [False, True])
def test_a_store_on_a_read_only_file_system_can_be_read_if_all_of_it_is_in_its_file(tmp_path: Path, wal: bool) -> None:
    with small_disk_at(tmp_path / "disk", 2048) as disk:
        home = disk / "home"
        one = kept(home, tmp_path / "one")
        if wal:
            (home / "store.sqlite3-wal").write_bytes(b"what a killed process left")
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        if wal:
            with pytest.raises(LorakitError, match="file system is read-only"):
                kept_in(home)
            return
        assert kept_in(home) == [one]
        assert find_stored("sql@latest", home).uid == one.uid
        assert verify_store(home).wrong == ()
        with pytest.raises(LorakitError, match="file system is read-only"):
            trash_stored(find_stored(one.uid, home), home)
        with pytest.raises(LorakitError, match="read-only"):
            kept(home, tmp_path / "two", "two")
        with pytest.raises(LorakitError, match="read-only"):
            Database(home)
