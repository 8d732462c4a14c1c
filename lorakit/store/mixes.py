"""Mixes in the store: revisions of a kind of their own, found by what they are made of, and the names given to some.

They are the revisions of a run `mix`, which no other run can be called; a name is an alias of it.
"""

from __future__ import annotations

import json
import time
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path

from lorakit.errors import Refused, disk_errors_named
from lorakit.files.digests import folder_digest
from lorakit.files.folders import sync_tree
from lorakit.files.provenance import FILE as PROVENANCE
from lorakit.store.catalog import Facts, Revision
from lorakit.store.contents import placed, remove_unneeded
from lorakit.store.database import Database
from lorakit.store.names import revision_name
from lorakit.store.store import point_alias

RUN = "mix"


@dataclass(frozen=True, slots=True)
class Recorded:
    """A mix that is in the store: `recipe` says what it is made of, `error` is ‖Δ - Δ'‖ / ‖Δ‖ of what was cut."""

    recipe: str
    revision: int
    error: float


@dataclass(frozen=True, slots=True)
class Named:
    """A name for a mix as it was written; with `follow` it is made again when what it is made of moves."""

    name: str
    mix: str
    follow: bool


class MixStore:
    """The mixes of one base. Its methods block: call them off the event loop."""

    def __init__(self, home: Path, base: str) -> None:
        self._base = base
        self._database = Database(home, or_read=True)

    def close(self) -> None:
        self._database.close()

    def recorded(self) -> list[Recorded]:
        """Every mix, the oldest first; what lies in the trash is not."""
        query = (
            "SELECT m.recipe, m.revision, m.error FROM mixes m JOIN revisions r ON r.id = m.revision"
            " WHERE m.base = ? AND r.trashed IS NULL ORDER BY r.id"
        )
        return [Recorded(*row) for row in self._database.rows(query, (self._base,))]

    def keep(self, staged: Path, recipe: str, *, text: str, rank: int, error: float) -> Revision:
        """Move a staged adapter into its place, and record what it is made of; `text` says that to a person.

        The same content again is the same revision.

        Raises:
            Refused: another mix has the same first eight digits.
        """
        names = sorted(path.name for path in staged.iterdir())
        digest = folder_digest(staged, [name for name in names if name != PROVENANCE])
        size = sum((staged / name).stat().st_size for name in names)
        folder, created = self._database.home / "revisions" / digest, time.time()
        self._refuse_likeness(digest)
        with disk_errors_named(folder):
            for name in names:
                (staged / name).chmod(0o444)
            sync_tree(staged)
            with placed(self._database, staged, digest) as db:
                known = db.execute(
                    "SELECT id, created FROM revisions WHERE base = ? AND run = ? AND digest = ?",
                    (self._base, RUN, digest),
                ).fetchone()
                if known is None:
                    row = db.execute(
                        "INSERT INTO revisions (base, run, kind, digest, created, uid, facts, rank, size, source)"
                        " VALUES (?, ?, 'mix', ?, ?, ?, ?, ?, ?, ?)",
                        (self._base, RUN, digest, created, uuid.uuid4().hex, json.dumps(asdict(Facts())), rank, size,
                         text),
                    ).lastrowid  # fmt: skip
                else:
                    row, created = known
                    db.execute("UPDATE revisions SET trashed = NULL WHERE id = ?", (row,))
                db.execute("INSERT OR REPLACE INTO mixes VALUES (?, ?, ?, ?)", (self._base, recipe, row, error))
        assert row is not None
        return Revision(row, RUN, "mix", digest, folder, Facts(), rank, size, text, created)

    def _refuse_likeness(self, digest: str) -> None:
        query = "SELECT digest FROM revisions WHERE base = ? AND run = ? AND substr(digest, 1, 8) = ?"
        if any(found != digest for (found,) in self._database.rows(query, (self._base, RUN, digest[:8]))):
            name = revision_name(RUN, "", digest)
            raise Refused(f"its name, {name}, is another mix's already: their digests begin alike")

    def forget(self, revision: Revision) -> None:
        """Remove the record of a mix, unless it has a name; its files go by `remove_folder`, when no engine
        reads them any more."""
        with self._database.change() as db:
            named = "SELECT 1 FROM aliases WHERE revision = revisions.id"
            db.execute(
                f"DELETE FROM revisions WHERE id = ? AND trashed IS NULL AND NOT EXISTS ({named})", (revision.id,)
            )

    def remove_folder(self, folder: Path) -> None:
        """Delete a mix's files, unless a record needs them again by now."""
        remove_unneeded(self._database, folder)

    def is_there(self, revision: Revision) -> bool:
        """Whether its record and its files are still there: other processes remove them, too."""
        rows = self._database.rows("SELECT 1 FROM revisions WHERE id = ? AND trashed IS NULL", (revision.id,))
        return bool(rows) and revision.folder.is_dir()

    # names

    def names(self) -> list[Named]:
        rows = self._database.rows(
            "SELECT name, mix, follow FROM mix_names WHERE base = ? ORDER BY name", (self._base,)
        )
        return [Named(name, mix, bool(follow)) for name, mix, follow in rows]

    def name(self, named: Named, revision: int, why: str) -> None:
        """Give a mix a name, in the place of what had it; a revision in the trash is out of it again."""
        with self._database.change() as db:
            point_alias(db, (self._base, RUN, named.name), revision, why)
            db.execute(
                "INSERT OR REPLACE INTO mix_names (base, name, mix, follow) VALUES (?, ?, ?, ?)",
                (self._base, named.name, named.mix, named.follow),
            )

    def unname(self, name: str) -> None:
        """Forget a name; the mix stays until another needs its place."""
        with self._database.change() as db:
            db.execute("DELETE FROM mix_names WHERE base = ? AND name = ?", (self._base, name))
            for table in ("aliases", "moves"):
                db.execute(f"DELETE FROM {table} WHERE base = ? AND run = ? AND alias = ?", (self._base, RUN, name))
