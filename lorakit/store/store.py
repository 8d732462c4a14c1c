"""Revisions by digest, and one SQLite file (WAL) with what is known of them.

A store holds the adapters of many bases; all but the files is kept apart by base.
"""

from __future__ import annotations

import json
import sqlite3
import time
import uuid
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lorakit.errors import Incomplete, LorakitError, Refused, disk_errors_named
from lorakit.files.digests import folder_digest
from lorakit.files.folders import sync_tree, temporary_folder
from lorakit.files.provenance import FILE as PROVENANCE
from lorakit.store.catalog import Facts, Finish, Label, Revision, Run, attempt_of, label_of
from lorakit.store.contents import is_needed, placed, remove_unneeded, unneeded_in
from lorakit.store.database import Database, default_home, is_store
from lorakit.store.names import revision_name
from lorakit.store.splits import Split, read_splits, write_split

__all__ = ["Source", "Store", "bases_in", "default_home", "open_store"]

JOURNAL = 1_000  # moves of one alias that are remembered


@dataclass(frozen=True, slots=True)
class Source:
    """Sizes, times and inodes of a folder's files: of all that count, and of the weights and their config alone."""

    signature: str
    weights_signature: str


class Store:
    """One store, as seen by one base. Its methods block: call them off the event loop."""

    def __init__(self, home: Path, base: str, *, or_read: bool = False) -> None:
        self.home = home
        self.base = base
        self._database = Database(home, or_read=or_read)

    @property
    def unwritable(self) -> LorakitError | None:
        """Why nothing can be changed in it; None when it can."""
        return self._database.unwritable

    def close(self) -> None:
        self._database.close()

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
            for name in names:
                (staged / name).chmod(0o444)
            sync_tree(staged)
            with placed(self._database, staged, digest):
                pass
        return digest, target, size

    # what is known

    def bases(self) -> list[str]:
        """Every base that there are revisions for."""
        return [row[0] for row in self._database.rows("SELECT DISTINCT base FROM revisions ORDER BY base")]

    def runs(self) -> dict[str, Run]:
        """All runs of this base whose files are there; what lies in the trash is not."""
        return self._runs("", (self.base,))

    def run(self, name: str) -> Run | None:
        """One of them; None when nothing of it is there."""
        return self._runs(" AND run = ?", (self.base, name)).get(name)

    def _runs(self, which: str, values: tuple[str, ...]) -> dict[str, Run]:
        query, found = self._database.rows, dict[str, Run]()
        for name, pinned in query(f"SELECT run, pinned FROM runs WHERE base = ?{which}", values):
            found[name] = Run(name, pinned=bool(pinned))
        by_id: dict[int, Run] = {}
        there = f"SELECT {_COLUMNS} FROM revisions WHERE base = ?{which} AND trashed IS NULL ORDER BY id"
        for row in query(there, values):
            revision = self._revision(row)
            if revision.folder.is_dir():
                run = found.setdefault(revision.run, Run(revision.run))
                run.revisions[revision.id] = revision
                by_id[revision.id] = run
        finishes = (
            "SELECT revision, attempt FROM finishes WHERE revision IN"
            f" (SELECT id FROM revisions WHERE base = ?{which}) ORDER BY id"
        )
        for revision_id, attempt in query(finishes, values):
            if revision_id in by_id:
                by_id[revision_id].finishes.append(Finish(revision_id, attempt))
        aliases = f"SELECT run, alias, revision FROM aliases WHERE base = ?{which}"
        for name, alias, revision_id in query(aliases, values):
            if revision_id in by_id:
                found[name].aliases[alias] = revision_id
        for (name, alias), split in read_splits(self._database, self.base).items():
            if name in found and (left := split.among(found[name].revisions)) is not None:
                found[name].aliases[alias] = left.main
                found[name].splits |= {} if left.is_plain else {alias: left}
        return {name: run for name, run in found.items() if run.revisions}

    def uid(self, revision: int) -> str:
        """The unique id of a revision."""
        uid: str = self._database.rows("SELECT uid FROM revisions WHERE id = ?", (revision,))[0][0]
        return uid

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
        with self._database.change() as db:
            if not (self.home / "revisions" / digest).is_dir():
                raise Incomplete(f"the files of {digest[:8]} were removed while they were taken in: try again")
            db.execute("INSERT OR IGNORE INTO runs (base, run) VALUES (?, ?)", (self.base, run))
            named_alike = db.execute(
                "SELECT id, digest, facts FROM revisions"
                " WHERE base = ? AND run = ? AND kind = ? AND ifnull(step, -1) = ? AND substr(digest, 1, 8) = ?",
                (self.base, run, kind, -1 if facts.step is None else facts.step, digest[:8]),
            ).fetchone()
            if named_alike and named_alike[1] != digest:
                name = revision_name(run, label_of(kind, facts.step), digest)
                raise Refused(f"its name, {name}, is another's already: their digests begin alike")
            known = named_alike
            if known:
                facts = facts.completed_by(Facts(**json.loads(known[2])))
            values = (json.dumps(asdict(facts)), rank, size, path, repaired)
            if known:
                revision_id = known[0]
                db.execute(
                    "UPDATE revisions SET facts = ?, rank = ?, size = ?, source = ?, repaired = ?, trashed = NULL"
                    " WHERE id = ?",
                    (*values, revision_id),
                )
            else:
                revision_id = db.execute(
                    "INSERT INTO revisions"
                    " (base, run, kind, step, digest, created, uid, facts, rank, size, source, repaired)"
                    " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    (self.base, run, kind, facts.step, digest, time.time(), uuid.uuid4().hex, *values),
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
        of_run = "FROM revisions r JOIN finishes f ON f.revision = r.id WHERE r.base = ? AND r.run = ?"
        (last,) = db.execute(f"SELECT max(f.attempt) {of_run}", (self.base, run)).fetchone()
        (largest,) = db.execute(
            f"SELECT max(ifnull(r.step, 0)) {of_run} AND r.kind = 'step' AND f.attempt = ?", (self.base, run, last)
        ).fetchone()
        return attempt_of(kind, step, last, largest)

    def move_alias(
        self, run: str, alias: str, revision: int, why: str, *, pinned: bool | None = None,
        passed_over: Mapping[int, str] | None = None, split: Split | None = None,
    ) -> None:  # fmt: skip
        """Point an alias at a revision, and write it into the journal. The default alias has the empty name.

        A revision that somebody put into the trash meanwhile is out of it again, and is passed over no more.

        Args:
            split: what the alias means beside the revision, which is its main one; None ends what it meant so before.
            pinned: whether the default alias stays there from now on, rather than following; None leaves that as it is.
            passed_over: revisions that no alias moves to by itself from now on, with the reasons.
        """
        with self._database.change() as db:
            if pinned is not None:
                db.execute("UPDATE runs SET pinned = ? WHERE base = ? AND run = ?", (pinned, self.base, run))
            for one in (passed_over or {}).items():
                db.execute("INSERT OR REPLACE INTO passed_over VALUES (?, ?, ?)", (*one, time.time()))
            for id in (revision, *(split.members if split is not None else ())):
                db.execute("DELETE FROM passed_over WHERE revision = ?", (id,))
            point_alias(db, (self.base, run, alias), revision, why)
            write_split(db, (self.base, run, alias), split)

    def passed_over(self) -> dict[int, str]:
        """What no alias moves to by itself, by id, with the reason."""
        query = "SELECT p.revision, p.reason FROM passed_over p JOIN revisions r ON r.id = p.revision WHERE r.base = ?"
        return dict(self._database.rows(query, (self.base,)))

    def previous(self, run: str, alias: str) -> int | None:
        """The revision that an alias pointed at before the one it points at now, if that is still there."""
        rows = self._database.rows(
            "SELECT m.revision FROM moves m JOIN revisions r ON r.id = m.revision"
            " WHERE m.base = ? AND m.run = ? AND m.alias = ? AND r.trashed IS NULL ORDER BY m.id DESC",
            (self.base, run, alias),
        )
        targets = [row[0] for row in rows]
        return next((target for target in targets if target != targets[0]), None) if targets else None

    def forget(self, run: str) -> list[Path]:
        """Remove a run, its revisions and aliases: the folders that no other run needs, for the caller to delete."""
        with self._database.change() as db:
            digests = [
                row[0]
                for row in db.execute(
                    "SELECT DISTINCT digest FROM revisions WHERE base = ? AND run = ? AND trashed IS NULL",
                    (self.base, run),
                )
            ]
            for table in ("aliases", "splits", "moves", "runs"):
                db.execute(f"DELETE FROM {table} WHERE base = ? AND run = ?", (self.base, run))
            db.execute("DELETE FROM revisions WHERE base = ? AND run = ? AND trashed IS NULL", (self.base, run))
            unneeded = [digest for digest in digests if not is_needed(db, digest)]
        return [self.home / "revisions" / digest for digest in unneeded]

    def remove(self, revisions: Collection[int]) -> tuple[list[int], list[Path]]:
        """Remove revisions that no alias points at: which went, and the folders that nothing else needs, for the caller
        to delete. What their folders were like is remembered, so that they are not taken in again."""
        with self._database.change() as db:
            gone, digests = list[int](), dict[str, None]()
            for id in revisions:
                if any(
                    db.execute(f"SELECT 1 FROM {table} WHERE revision = ?", (id,)).fetchone()
                    for table in ("aliases", "split_revisions")
                ):
                    continue
                for (digest,) in db.execute("SELECT digest FROM revisions WHERE id = ?", (id,)).fetchall():
                    gone.append(id)
                    digests[digest] = None
                db.execute("DELETE FROM revisions WHERE id = ?", (id,))
            unneeded = [digest for digest in digests if not is_needed(db, digest)]
        return gone, [self.home / "revisions" / digest for digest in unneeded]

    def remove_folder(self, folder: Path) -> None:
        """Delete a revision's files, unless a record needs them again by now."""
        remove_unneeded(self._database, folder)

    def remove_unknown(self) -> None:
        """Delete the files that no record needs: what a server that was killed could not delete."""
        if self.unwritable is not None:
            return
        for folder in unneeded_in(self._database):
            self.remove_folder(folder)

    def ensure_reachable(self) -> None:
        """Raises LorakitError where what is taken in has to get elsewhere, too, and can't: here it stays."""

    # what was looked at

    def source(self, run: str, path: str) -> Source | None:
        """What a folder was like when it was last taken in for a run."""
        rows = self._database.rows(
            "SELECT signature, weights_signature FROM sources WHERE base = ? AND run = ? AND path = ?",
            (self.base, run, path),
        )
        return Source(*rows[0]) if rows else None

    def _revision(self, row: Any) -> Revision:
        id, run, kind, digest, facts, rank, size, source, created, repaired = row
        folder = self.home / "revisions" / digest
        return Revision(
            id, run, kind, digest, folder, Facts(**json.loads(facts)), rank, size, source, created, repaired
        )


def point_alias(
    db: sqlite3.Connection, alias: tuple[str, str, str], revision: int, why: str, at: float | None = None
) -> None:
    """Of a base, a run and an alias: where it points from now on, with the journal, of which old lines go; `at` is
    when, in seconds since 1970, if not now."""
    db.execute("UPDATE revisions SET trashed = NULL WHERE id = ?", (revision,))
    db.execute(
        "INSERT INTO aliases (base, run, alias, revision) VALUES (?, ?, ?, ?)"
        " ON CONFLICT (base, run, alias) DO UPDATE SET revision = excluded.revision",
        (*alias, revision),
    )
    last = db.execute(
        "INSERT INTO moves (base, run, alias, revision, at, why) VALUES (?, ?, ?, ?, ?, ?)",
        (*alias, revision, time.time() if at is None else at, why),
    ).lastrowid
    db.execute(
        "DELETE FROM moves WHERE base = ? AND run = ? AND alias = ? AND id < (SELECT id FROM moves WHERE"
        " base = ? AND run = ? AND alias = ? AND id <= ? ORDER BY id DESC LIMIT 1 OFFSET ?)",
        (*alias, *alias, last, JOURNAL - 1),
    )


_COLUMNS = "id, run, kind, digest, facts, rank, size, source, created, repaired"


def bases_in(home: Path) -> list[str]:
    """The bases that a store holds revisions for; none when there is no store."""
    if not is_store(home):
        return []
    with open_store(home, "") as store:
        return store.bases()


@contextmanager
def open_store(home: Path, base: str) -> Iterator[Store]:
    """A store for as long as it is looked at; one that can't be written can be looked at all the same."""
    store = Store(home, base, or_read=True)
    try:
        yield store
    finally:
        store.close()
