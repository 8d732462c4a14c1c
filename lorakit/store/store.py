"""Revisions by digest, and one SQLite file (WAL) with what is known of them.

A store holds the adapters of many bases; all but the files is kept apart by base.
"""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lorakit.errors import Incomplete, LorakitError, Refused, disk_errors_named
from lorakit.files.digests import folder_digest
from lorakit.files.folders import clear_abandoned, sync_folder, sync_tree, temporary_folder
from lorakit.files.provenance import FILE as PROVENANCE
from lorakit.store.catalog import Facts, Finish, Label, Revision, Run, attempt_of
from lorakit.store.names import revision_name

_SCHEMA = """
CREATE TABLE IF NOT EXISTS revisions (
    id INTEGER PRIMARY KEY AUTOINCREMENT, base TEXT NOT NULL, run TEXT NOT NULL, kind TEXT NOT NULL, step INTEGER,
    digest TEXT NOT NULL, facts TEXT NOT NULL, rank INTEGER NOT NULL, size INTEGER NOT NULL, source TEXT NOT NULL,
    created REAL NOT NULL, repaired TEXT
);
CREATE UNIQUE INDEX IF NOT EXISTS one_content ON revisions (base, run, kind, ifnull(step, -1), digest);
CREATE TABLE IF NOT EXISTS finishes (
    id INTEGER PRIMARY KEY AUTOINCREMENT, revision INTEGER NOT NULL REFERENCES revisions (id) ON DELETE CASCADE,
    attempt INTEGER NOT NULL, at REAL NOT NULL
);
CREATE TABLE IF NOT EXISTS runs (
    base TEXT NOT NULL, run TEXT NOT NULL, pinned INTEGER NOT NULL DEFAULT 0, PRIMARY KEY (base, run)
);
CREATE TABLE IF NOT EXISTS aliases (
    base TEXT NOT NULL, run TEXT NOT NULL, alias TEXT NOT NULL,
    revision INTEGER NOT NULL REFERENCES revisions (id) ON DELETE CASCADE, PRIMARY KEY (base, run, alias)
);
CREATE TABLE IF NOT EXISTS moves (
    id INTEGER PRIMARY KEY AUTOINCREMENT, base TEXT NOT NULL, run TEXT NOT NULL, alias TEXT NOT NULL,
    revision INTEGER NOT NULL, at REAL NOT NULL, why TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS sources (
    base TEXT NOT NULL, run TEXT NOT NULL, path TEXT NOT NULL, signature TEXT NOT NULL,
    weights_signature TEXT NOT NULL, PRIMARY KEY (base, run, path)
);
"""
_VERSION = 1


@dataclass(frozen=True, slots=True)
class Source:
    """Sizes, times and inodes of a folder's files: of all that count, and of the weights and their config alone."""

    signature: str
    weights_signature: str


def default_home() -> Path:
    """`$LORAKIT_HOME`, or `lorakit` in `$XDG_DATA_HOME`."""
    if home := os.environ.get("LORAKIT_HOME"):
        return Path(home).absolute()
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "lorakit"


class Store:
    """One store, as seen by one base. Its methods block: call them off the event loop."""

    def __init__(self, home: Path, base: str) -> None:
        self.home = home
        self.base = base
        with disk_errors_named(home):
            for folder in (home / "revisions", home / "tmp"):
                folder.mkdir(parents=True, exist_ok=True)
        clear_abandoned(home / "tmp", "")
        self._lock = threading.RLock()
        try:
            self._db = sqlite3.connect(
                home / "store.sqlite3", timeout=30, check_same_thread=False, isolation_level=None
            )
        except sqlite3.Error as error:
            raise LorakitError(f"the store '{home}' can't be opened: {error}; set LORAKIT_HOME to another") from error
        try:
            self._prepare()
        except BaseException as error:
            self._db.close()
            if isinstance(error, sqlite3.Error):
                raise LorakitError(f"the store '{home}' can't be used: {error}; set LORAKIT_HOME to another") from error
            raise

    def _prepare(self) -> None:
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA foreign_keys = ON")
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        if version > _VERSION:
            raise LorakitError(
                f"the store '{self.home}' was written by a newer lorakit (schema {version}): upgrade, "
                f"or set LORAKIT_HOME to another folder"
            )
        self._db.executescript(f"{_SCHEMA} PRAGMA user_version = {_VERSION};")

    def close(self) -> None:
        with self._lock:
            self._db.close()

    @contextmanager
    def _change(self) -> Iterator[sqlite3.Connection]:
        """One transaction, also against other processes on the same store.

        Raises:
            LorakitError: SQLite can't do it, and nothing is changed.
        """
        with self._lock:
            try:
                self._db.execute("BEGIN IMMEDIATE")
                try:
                    yield self._db
                    self._db.execute("COMMIT")
                except BaseException:
                    if self._db.in_transaction:
                        self._db.execute("ROLLBACK")
                    raise
            except sqlite3.Error as error:
                raise LorakitError(f"the store '{self.home}' can't be written: {error}") from error

    # files

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """A folder to prepare a revision in; gone at the end unless `keep` took it."""
        with disk_errors_named(self.home / "tmp"), temporary_folder(self.home / "tmp", "stage-") as folder:
            yield folder

    def keep(self, staged: Path) -> tuple[str, Path, int]:
        """Move a staged folder into its place, read-only: digest, folder and size in bytes.

        The same content again is the same folder, wherever it came from: what `lorakit.json` says of that is no part
        of the digest.
        """
        names = sorted(path.name for path in staged.iterdir())
        digest = folder_digest(staged, [name for name in names if name != PROVENANCE])
        size = sum((staged / name).stat().st_size for name in names)
        target = self.home / "revisions" / digest
        with disk_errors_named(target):
            if not target.is_dir():
                for name in names:
                    (staged / name).chmod(0o444)
                sync_tree(staged)
                try:
                    staged.rename(target)
                    target.chmod(0o555)
                except OSError:
                    if not target.is_dir():  # another process was first
                        raise
                sync_folder(target.parent)
        return digest, target, size

    # what is known

    def bases(self) -> list[str]:
        """Every base that there are revisions for."""
        with self._lock:
            return [row[0] for row in self._db.execute("SELECT DISTINCT base FROM revisions ORDER BY base")]

    def runs(self) -> dict[str, Run]:
        """All runs of this base whose files are there."""
        with self._lock:
            found: dict[str, Run] = {}
            for row in self._db.execute("SELECT run, pinned FROM runs WHERE base = ?", (self.base,)):
                found[row[0]] = Run(row[0], pinned=bool(row[1]))
            by_id: dict[int, Run] = {}
            for row in self._db.execute(f"SELECT {_COLUMNS} FROM revisions WHERE base = ? ORDER BY id", (self.base,)):
                revision = self._revision(row)
                if revision.folder.is_dir():
                    run = found.setdefault(revision.run, Run(revision.run))
                    run.revisions[revision.id] = revision
                    by_id[revision.id] = run
            for revision_id, attempt in self._db.execute("SELECT revision, attempt FROM finishes ORDER BY id"):
                if revision_id in by_id:
                    by_id[revision_id].finishes.append(Finish(revision_id, attempt))
            rows = self._db.execute("SELECT run, alias, revision FROM aliases WHERE base = ?", (self.base,))
            for name, alias, revision_id in rows:
                if revision_id in by_id:
                    found[name].aliases[alias] = revision_id
            return {name: run for name, run in found.items() if run.revisions}

    def add(
        self, run: str, kind: Label, digest: str, facts: Facts, *, rank: int, size: int, path: str, source: Source,
        repaired: str | None, finished: bool, late: bool = False,
    ) -> tuple[Revision, Finish | None]:  # fmt: skip
        """Record a revision; `finished` when it finished now, rather than being looked at again; `late` when it was
        there before anything else finished, so that it begins no new attempt. `source` is what the folder `path`
        was like, so that it is not taken in again as it is.

        Raises:
            Refused: another content of the same step has the same first eight digits.
            Incomplete: its files were removed between `keep` and now, by someone who forgot the same content.
        """
        with self._change() as db:
            if not (self.home / "revisions" / digest).is_dir():
                raise Incomplete(f"the files of {digest[:8]} were removed while they were taken in: try again")
            db.execute("INSERT OR IGNORE INTO runs (base, run) VALUES (?, ?)", (self.base, run))
            named_alike = db.execute(
                "SELECT id, digest, facts FROM revisions"
                " WHERE base = ? AND run = ? AND kind = ? AND ifnull(step, -1) = ? AND substr(digest, 1, 8) = ?",
                (self.base, run, kind, -1 if facts.step is None else facts.step, digest[:8]),
            ).fetchone()
            if named_alike and named_alike[1] != digest:
                raise Refused(
                    f"its name, {revision_name(run, kind, digest)}, is another's already: their digests begin alike"
                )
            known = named_alike
            if known:
                facts = facts.completed_by(Facts(**json.loads(known[2])))
            values = (json.dumps(asdict(facts)), rank, size, path, repaired)
            if known:
                revision_id = known[0]
                db.execute(
                    "UPDATE revisions SET facts = ?, rank = ?, size = ?, source = ?, repaired = ? WHERE id = ?",
                    (*values, revision_id),
                )
            else:
                revision_id = db.execute(
                    "INSERT INTO revisions"
                    " (base, run, kind, step, digest, created, facts, rank, size, source, repaired)"
                    " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    (self.base, run, kind, facts.step, digest, time.time(), *values),
                ).lastrowid
            db.execute(
                "INSERT OR REPLACE INTO sources (base, run, path, signature, weights_signature) VALUES (?, ?, ?, ?, ?)",
                (self.base, run, path, source.signature, source.weights_signature),
            )
            finish = None
            if finished or not known:
                attempt = self._attempt(db, run, kind, None if late else facts.step)
                db.execute(
                    "INSERT INTO finishes (revision, attempt, at) VALUES (?, ?, ?)",
                    (revision_id, attempt, time.time()),
                )
                finish = Finish(revision_id, attempt)
            row = db.execute(f"SELECT {_COLUMNS} FROM revisions WHERE id = ?", (revision_id,)).fetchone()
        return self._revision(row), finish

    def _attempt(self, db: sqlite3.Connection, run: str, kind: Label, step: int | None) -> int:
        rows = db.execute(
            "SELECT r.id, f.attempt, r.kind, r.step FROM finishes f JOIN revisions r ON r.id = f.revision"
            " WHERE r.base = ? AND r.run = ? ORDER BY f.id",
            (self.base, run),
        ).fetchall()
        revisions = {
            id: Revision(id, run, kind_, "", Path(), Facts(step=step_), 0, 0, "", 0.0) for id, _, kind_, step_ in rows
        }
        return attempt_of(kind, step, [Finish(id, attempt) for id, attempt, _, _ in rows], revisions)

    def move_alias(self, run: str, alias: str, revision: int, why: str) -> None:
        """Point an alias at a revision, and write it into the journal. The default alias has the empty name."""
        with self._change() as db:
            db.execute(
                "INSERT INTO aliases (base, run, alias, revision) VALUES (?, ?, ?, ?)"
                " ON CONFLICT (base, run, alias) DO UPDATE SET revision = excluded.revision",
                (self.base, run, alias, revision),
            )
            db.execute(
                "INSERT INTO moves (base, run, alias, revision, at, why) VALUES (?, ?, ?, ?, ?, ?)",
                (self.base, run, alias, revision, time.time(), why),
            )

    def previous(self, run: str, alias: str) -> int | None:
        """The revision that an alias pointed at before the one it points at now, if that is still there."""
        with self._lock:
            rows = self._db.execute(
                "SELECT m.revision FROM moves m JOIN revisions r ON r.id = m.revision"
                " WHERE m.base = ? AND m.run = ? AND m.alias = ? ORDER BY m.id DESC",
                (self.base, run, alias),
            ).fetchall()
        targets = [row[0] for row in rows]
        return next((target for target in targets if target != targets[0]), None) if targets else None

    def pin(self, run: str, pinned: bool) -> None:
        """Whether the default alias stays where it is, rather than following."""
        with self._change() as db:
            db.execute("UPDATE runs SET pinned = ? WHERE base = ? AND run = ?", (pinned, self.base, run))

    def forget(self, run: str) -> list[Path]:
        """Remove a run, its revisions and aliases: the folders that no other run needs, for the caller to delete."""
        with self._change() as db:
            digests = [
                row[0]
                for row in db.execute(
                    "SELECT DISTINCT digest FROM revisions WHERE base = ? AND run = ?", (self.base, run)
                )
            ]
            for table in ("aliases", "moves", "revisions", "runs"):
                db.execute(f"DELETE FROM {table} WHERE base = ? AND run = ?", (self.base, run))
            kept = {row[0] for row in db.execute("SELECT DISTINCT digest FROM revisions")}
        return [self.home / "revisions" / digest for digest in digests if digest not in kept]

    def remove_folder(self, folder: Path) -> None:
        """Delete a revision's files, unless a record needs them again by now."""
        with self._change() as db:
            if db.execute("SELECT 1 FROM revisions WHERE digest = ?", (folder.name,)).fetchone():
                return
            trash = self.home / "tmp" / f"gone-{uuid.uuid4().hex}"
            try:
                folder.chmod(0o755)
                folder.rename(trash)
            except FileNotFoundError:
                return
        shutil.rmtree(trash, ignore_errors=True)

    def remove_unknown(self) -> None:
        """Delete the files of revisions that no record needs: what a server that was killed could not delete."""
        for folder in (self.home / "revisions").iterdir():
            self.remove_folder(folder)

    # what was looked at

    def source(self, run: str, path: str) -> Source | None:
        """What a folder was like when it was last taken in for a run."""
        with self._lock:
            row = self._db.execute(
                "SELECT signature, weights_signature FROM sources WHERE base = ? AND run = ? AND path = ?",
                (self.base, run, path),
            ).fetchone()
        return Source(*row) if row else None

    def _revision(self, row: Any) -> Revision:
        id, run, kind, digest, facts, rank, size, source, created, repaired = row
        folder = self.home / "revisions" / digest
        return Revision(
            id, run, kind, digest, folder, Facts(**json.loads(facts)), rank, size, source, created, repaired
        )


_COLUMNS = "id, run, kind, digest, facts, rank, size, source, created, repaired"


def bases_in(home: Path) -> list[str]:
    """The bases that a store holds revisions for; none when there is no store."""
    if not (home / "store.sqlite3").is_file():
        return []
    with open_store(home, "") as store:
        return store.bases()


@contextmanager
def open_store(home: Path, base: str) -> Iterator[Store]:
    """A store for as long as it is looked at."""
    store = Store(home, base)
    try:
        yield store
    finally:
        store.close()
