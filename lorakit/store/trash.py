"""What was removed and can be taken back for a while: records of the store, and checkpoints of runs.

A record in the trash is marked so and is found no more; its files stay where they are until it is purged.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lorakit.errors import Conflict, LorakitError, NotFound, Refused, UsageError
from lorakit.store import trash_folders
from lorakit.store.catalog import Label, label_of
from lorakit.store.contents import is_needed, remove_unneeded
from lorakit.store.database import Database, is_store, open_database
from lorakit.store.kept import find_kept
from lorakit.store.names import revision_name, split_model
from lorakit.store.serving import in_use, serving_now
from lorakit.store.store import bases_in, open_store
from lorakit.store.trash_folders import Taken

GRACE = trash_folders.GRACE

Table = Literal["kept", "revisions"]


@dataclass(frozen=True, slots=True)
class Stored:
    """A record of the store that can be removed: a kept checkpoint, or a server's revision for a base."""

    table: Table
    row: int
    uid: str
    name: str
    digest: str
    size: int
    base: str | None
    trashed: float | None = None


@dataclass(frozen=True, slots=True)
class Trashed:
    """What lies in the trash: `name` is an id of the store, or the path that it had; `at` in seconds since 1970."""

    uid: str
    name: str
    size: int
    at: float
    held: Stored | Taken

    @property
    def until(self) -> float:
        return self.at + GRACE

    def as_dict(self) -> dict[str, Any]:
        where = "run" if isinstance(self.held, Taken) else "store"
        return {"uid": self.uid, "name": self.name, "in": where, "size": self.size, "at": self.at, "until": self.until}


def find_stored(reference: str, home: Path) -> Stored:
    """The one record that an id, a uid, or a name such as `sql@latest` means.

    Raises:
        NotFound: there is none.
        UsageError: it means several; names them. A run's name alone means all of it, so no single one.
    """
    found = meant_by(reference, home)
    if len(found) > 1:
        raise _several(reference, found)
    if "@" not in reference and reference != found[0].uid:
        raise UsageError(
            f"'{reference}' is a run of the store: name one of its checkpoints; its latest is {found[0].name}"
        )
    return found[0]


def folder_of(reference: str, home: Path) -> Path:
    """Where the files are of what an id, a uid, or a name such as `sql@best` or `sql` means.

    Raises:
        NotFound: there is none.
        UsageError: it means several that differ; names them.
    """
    found = meant_by(reference, home)
    if len({one.digest for one in found}) > 1:
        raise _several(reference, found)
    return home / "revisions" / found[0].digest


def meant_by(reference: str, home: Path) -> list[Stored]:
    """The records that a name means: for several bases, or as a revision and as a kept checkpoint, more than one.

    Raises:
        NotFound: there is none.
    """
    found: dict[str, Stored] = {}
    if is_store(home):
        with open_database(home) as database:
            found = {one.uid: one for uid in _uids(reference, home) for one in _records(database, "uid = ?", uid)}
    if not found:
        raise NotFound(f"the store has no '{reference}', and there is no such path: `lorakit ls --store` lists it")
    return list(found.values())


def trash_stored(
    stored: Stored, home: Path, *, force: bool = False, at_once: bool = False, now: float | None = None
) -> Trashed:
    """Put a record into the trash; `at_once` when it is to be purged from there next.

    Raises:
        Conflict: a running server may be asked for it; or an alias points at it, unless `force`.
        NotFound: it is in the store no more.
    """
    refuse_held(stored, home, force=force, at_once=at_once)
    now = time.time() if now is None else now
    with open_database(home, freeing=at_once) as database, database.change() as db:
        if not force:
            _refuse_aliased(stored, db.execute(_ALIASES, (stored.row,)).fetchall())
        where = "WHERE id = ? AND trashed IS NULL"
        if db.execute(f"UPDATE {stored.table} SET trashed = ? {where}", (now, stored.row)).rowcount == 0:
            raise NotFound(f"'{stored.name}' is in the store no more")
    return Trashed(stored.uid, stored.name, stored.size, now, stored)


def refuse_held(stored: Stored, home: Path, *, force: bool = False, at_once: bool = False) -> None:
    """Raises Conflict when `trash_stored` would."""
    if stored.table == "kept":
        return
    if user := in_use(home).get((stored.base or "", stored.row)):
        raise Conflict(f"'{stored.name}' is in use: {user}; point that at another first, or stop the server")
    if not force:
        with open_database(home) as database:
            _refuse_aliased(stored, database.rows(_ALIASES, (stored.row,)))
    if at_once:
        _refuse_read(stored, home, "leave out --purge, and it goes into the trash")


def trash_path(path: Path, home: Path, *, now: float | None = None) -> Trashed:
    """Put a checkpoint of a run into the run's own trash; the store remembers where that is.

    Raises:
        Refused: its path can't be written down.
        NotFound, LorakitError: as `take_out`.
    """
    path = spelled(path)
    refuse_unprintable(path)
    _remember(path.parent / trash_folders.FOLDER, home)
    return _as_trashed(trash_folders.take_out(path, time.time() if now is None else now))


def remove_path(path: Path, home: Path) -> None:
    """Delete a checkpoint of a run for good.

    Raises:
        NotFound, LorakitError: as `remove_at_once`.
    """
    with suppress(LorakitError):  # for gc, should this be killed; what is deleted now needs no store
        _remember(path.parent / trash_folders.FOLDER, home)
    trash_folders.remove_at_once(path)


def spelled(path: Path) -> Path:
    """A path as it is known by, whatever links lead to it: a link itself stays one."""
    if path.name in ("", ".."):
        return Path(os.path.realpath(path))
    return Path(os.path.realpath(path.parent), path.name)


def refuse_unprintable(path: Path) -> None:
    """Raises Refused when a path can't be written down."""
    if not str(path).isprintable():
        raise Refused(f"the path {str(path)!a} holds what no name may: rename it")


def all_stored(database: Database) -> list[Stored]:
    """Every record, in the trash or not."""
    return _records(database, "1", trashed=True)


def trashed_in(home: Path) -> list[Trashed]:
    """All that can be taken back, what was removed first foremost."""
    if not is_store(home):
        return []
    with open_database(home) as database:
        stored = _records(database, "trashed IS NOT NULL", trashed=True)
    found = [Trashed(one.uid, one.name, one.size, one.trashed or 0.0, one) for one in stored]
    found += [one for folder in trash_folders_in(home) for one in _lying_in(folder)]
    return sorted(found, key=lambda one: one.at)


def find_trashed(reference: str, home: Path) -> Trashed:
    """What in the trash a uid, four letters of it at least, an id, or the path that it had means.

    Raises:
        NotFound: nothing.
        UsageError: several; names them.
    """
    path, begins = spelled(Path(reference)), len(reference) >= 4
    there = {one.uid: one for one in (*trashed_in(home), *_lying_in(path.parent / trash_folders.FOLDER))}
    found = [
        one
        for one in there.values()
        if one.name in (reference, str(path)) or (begins and one.uid.startswith(reference))
    ]
    if not found:
        raise NotFound(f"'{reference}' is not in the trash: `lorakit undelete` lists what is")
    if len(found) > 1:
        raise _several(reference, found)
    return found[0]


def refuse_lost(wanted: Sequence[Trashed], home: Path) -> None:
    """Raises what `undelete` would raise for the first of these that can't be taken back."""
    places = set[Path]()
    for one in wanted:
        if isinstance(one.held, Taken):
            if one.held.place in places or os.path.lexists(one.held.place):
                raise trash_folders.taken_by_now(one.held)
            places.add(one.held.place)
        else:
            _refuse_without_files(one.name, one.held, home)


def undelete(trashed: Trashed, home: Path) -> None:
    """Put it back exactly where it was.

    Raises:
        Conflict: its place is taken by now.
        NotFound: it is in the trash no more.
        Refused: its files are gone.
    """
    if isinstance(trashed.held, Taken):
        trash_folders.put_back(trashed.held)
        return
    with open_database(home) as database, database.change() as db:
        table = trashed.held.table
        _refuse_without_files(trashed.name, trashed.held, home)
        where = "WHERE id = ? AND trashed IS NOT NULL"
        if db.execute(f"UPDATE {table} SET trashed = NULL {where}", (trashed.held.row,)).rowcount == 0:
            raise NotFound(f"'{trashed.name}' is in the trash no more")


def purgeable(home: Path, older_than: float, now: float) -> list[Trashed]:
    """What has been in the trash for so many seconds; not what a running server may still have to read."""
    served = {server.base for server in serving_now(home)}
    return [
        one
        for one in trashed_in(home)
        if now - one.at >= older_than
        and not (isinstance(one.held, Stored) and one.held.table == "revisions" and one.held.base in served)
    ]


def trash_folders_in(home: Path) -> list[Path]:
    """The trash folders of all runs that something was ever removed from."""
    if not is_store(home):
        return []
    with open_database(home) as database:
        return [Path(row[0]) for row in database.rows("SELECT folder FROM trash_folders ORDER BY folder")]


def purge(gone: Sequence[Trashed], home: Path) -> None:
    """Delete for good what is still in the trash of these.

    Raises:
        Conflict: a running server may still have to read one.
        LorakitError: one can't be deleted.
    """
    for taken in [one.held for one in gone if isinstance(one.held, Taken)]:
        trash_folders.purge(taken)
    stored = [(one.held, one.at) for one in gone if isinstance(one.held, Stored)]
    if not stored:
        return
    for one, _ in stored:
        _refuse_read(one, home, "it stays in the trash until then")
    with open_database(home, freeing=True) as database:
        with database.change() as db:
            for one, at in stored:  # not what was taken back, and removed again, meanwhile
                db.execute(f"DELETE FROM {one.table} WHERE id = ? AND trashed = ?", (one.row, at))
            unneeded = [one.digest for one, _ in stored if not is_needed(db, one.digest)]
        for digest in unneeded:
            remove_unneeded(database, home / "revisions" / digest)


_ALIASES = (
    "SELECT alias FROM aliases WHERE revision = ?1 UNION SELECT alias FROM split_revisions WHERE revision = ?1"
    " ORDER BY alias"
)


def _refuse_aliased(stored: Stored, rows: Sequence[tuple[str]]) -> None:
    run, _ = split_model(stored.name)
    names = [f"'{run}@{alias}'" if alias else f"'{run}'" for (alias,) in rows]
    if stored.table == "revisions" and names:
        raise Conflict(
            f"the alias {' and '.join(names)} points at '{stored.name}': point it at another (lorakit alias), "
            f"or remove it all the same with --force"
        )


def _refuse_read(stored: Stored, home: Path, cure: str) -> None:
    """A server reads a revision again when its engine has none of it any more."""
    for server in serving_now(home):
        if stored.table == "revisions" and stored.base == server.base:
            raise Conflict(f"{server} may still have to read '{stored.name}': stop it first; {cure}")


def _refuse_without_files(name: str, stored: Stored, home: Path) -> None:
    if not (home / "revisions" / stored.digest).is_dir():
        raise Refused(f"the files of '{name}' are gone from '{home}': it can't be taken back")


def _remember(trash: Path, home: Path) -> None:
    with open_database(home) as database, database.change() as db:
        db.execute("INSERT OR IGNORE INTO trash_folders VALUES (?)", (str(trash),))


def _lying_in(trash: Path) -> list[Trashed]:
    return [_as_trashed(taken) for taken in trash_folders.taken_in(trash)]


def _several(reference: str, found: Sequence[Stored | Trashed]) -> UsageError:
    which = ", ".join(f"{one.uid} ({one.name})" for one in found)
    return UsageError(f"'{reference}' means several: name one by its uid: {which}")


def _uids(reference: str, home: Path) -> list[str]:
    """Of all records that a name means, for every base."""
    kept = find_kept(reference, home)
    uids = [reference] + ([kept.uid] if kept else [])
    name, selector = split_model(reference)
    for base in bases_in(home):
        with open_store(home, base) as store:
            run = store.runs().get(name)
            revision = (run.select(selector) or run.select(selector or "latest")) if run else None
            uids += [store.uid(revision.id)] if revision else []
    return uids


def _records(database: Database, where: str, *values: str, trashed: bool = False) -> list[Stored]:
    there = "" if trashed else "AND trashed IS NULL"
    kept = database.rows(
        "SELECT 'kept', id, uid, run, label, step, digest, size, base, trashed FROM kept"
        f" WHERE {where} {there} ORDER BY id",
        values,
    )
    revisions = database.rows(
        "SELECT 'revisions', id, uid, run, kind, step, digest, size, base, trashed FROM revisions"
        f" WHERE {where} {there} ORDER BY id",
        values,
    )
    return [_record(*row) for row in (*kept, *revisions)]


def _record(
    table: Table, row: int, uid: str, run: str, label: Label, step: int | None, digest: str, size: int,
    base: str | None, trashed: float | None,
) -> Stored:  # fmt: skip
    name = revision_name(run, label_of(label, step), digest)
    return Stored(table, row, uid, name, digest, size, base, trashed)


def _as_trashed(taken: Taken) -> Trashed:
    return Trashed(taken.journal.uid, str(taken.place), taken.journal.size, taken.journal.at, taken)
