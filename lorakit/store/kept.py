"""Whole checkpoints in the store, of any writer, optimizer and all, as they were written.

The revisions beside them are adapters that a server made sure of, for one base.
"""

from __future__ import annotations

import json
import sqlite3
import time
import uuid
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from lorakit.errors import Incomplete, Refused, disk_errors_named
from lorakit.files.folders import sync_tree, temporary_folder
from lorakit.store.catalog import Facts, Finish, Label, Revision, Run, attempt_of, label_of
from lorakit.store.contents import copy_checkpoint, placed
from lorakit.store.database import is_store, open_database
from lorakit.store.names import check_name, revision_name, split_model

Kind = Literal["adapter", "regular"]


@dataclass(frozen=True, slots=True)
class Described:
    """What a checkpoint is, as far as its files say; None is not known. `final` is a run's last save, in its root."""

    kind: Kind
    writer: str
    step: int | None = None
    facts: Facts = field(default_factory=Facts)
    base: str | None = None
    rank: int | None = None
    final: bool = False

    @property
    def place(self) -> Label:
        if self.final:
            return "final"
        return "plain" if self.step is None else "step"


@dataclass(frozen=True, slots=True)
class Kept:
    """An immutable copy of a checkpoint: `id` is its name, `run@step-500-3fa9c1d2`; `label` is `step-500`, `final` or
    empty; a single file lies in `folder` under its own name; `size` is in bytes, `created` seconds since 1970.
    """

    id: str
    uid: str
    run: str
    label: str
    step: int | None
    digest: str
    folder: Path
    kind: Kind
    writer: str
    facts: Facts
    base: str | None
    rank: int | None
    size: int
    source: str
    created: float


def keep_checkpoint(
    home: Path, source: Path, described: Described, *, run: str, unchanged: Callable[[], bool],
    without: Collection[str] = (), origin: Path | None = None,
) -> Kept:  # fmt: skip
    """Copy a folder or a single file into the store, whole or not at all.

    The same content again, under the same run and step, is the same kept checkpoint, with what is known of it now; out
    of the trash, if it was there.

    Args:
        unchanged: asked after the copy: whether the source is still what was looked at.
        without: names directly in the source that are not part of it, such as the checkpoints in a run's root.
        origin: where the source came from, if that is to be remembered instead.

    Raises:
        NotFound: there is no such source.
        Refused: the run can't be named so; or the source holds a link out of it, or what is neither file nor folder; or
            its path, step or rank can't be written down.
        Incomplete: it was written to, or taken away, meanwhile.
        OutOfSpace, LorakitError: the store can't be written; nothing is changed there.
    """
    check_name(run)
    said = str((origin or source).absolute())
    _refuse_unwritable(described, said)
    with (
        open_database(home) as database,
        disk_errors_named(home / "tmp"),
        temporary_folder(home / "tmp", "keep-") as staged,
    ):
        digest, size = copy_checkpoint(source, staged, without=without)
        if not unchanged():
            raise Incomplete(f"'{source}' was written to while it was copied: try again")
        sync_tree(staged)
        with placed(database, staged, digest) as db:
            row = _recorded(db, described, run=run, digest=digest, size=size, source=said)
    return _kept(row, home)


def kept_in(home: Path) -> list[Kept]:
    """All that are kept, and not in the trash, oldest first."""
    return [kept for kept, _ in _kept_with_attempts(home, "trashed IS NULL")]


def find_kept(reference: str, home: Path) -> Kept | None:
    """What a name means: `run@step-500-3fa9c1d2`, `run@step-500`, `run@3fa9`, `run@latest`, `run@best`, `run@final`,
    `run` (its latest), or a uid. None when it means nothing here.
    """
    by_uid = _kept_with_attempts(home, "trashed IS NULL AND uid = ?", reference)
    if by_uid:
        return by_uid[0][0]
    name, selector = split_model(reference)
    of_run = _kept_with_attempts(home, "trashed IS NULL AND run = ?", name)
    known = _as_run(name, of_run).select(selector or "latest")
    by_id = {id: kept for id, (kept, _) in enumerate(of_run)}
    return None if known is None else by_id[known.id]


# rows

COLUMNS = "uid, run, label, step, digest, kind, writer, facts, base, rank, size, source, created"


def _refuse_unwritable(described: Described, source: str) -> None:
    try:
        source.encode()
    except UnicodeEncodeError:
        raise Refused(f"the path {source!a} holds what no name may: rename it") from None
    for name, value in (("step", described.step), ("rank", described.rank)):
        if value is not None and not 0 <= value < 1 << 63:
            raise Refused(f"'{source}' says that its {name} is {value}, which can't be: keep it without, or mend it")


def _recorded(
    db: sqlite3.Connection, described: Described, *, run: str, digest: str, size: int, source: str
) -> tuple[Any, ...]:
    """The row of a kept checkpoint, new or known before."""
    label, step = described.place, described.step
    known = db.execute(
        "SELECT id, digest, facts FROM kept WHERE run = ? AND label = ? AND ifnull(step, -1) = ?"
        " AND substr(digest, 1, 8) = ?",
        (run, label, -1 if step is None else step, digest[:8]),
    ).fetchone()
    facts = replace(described.facts, step=step)
    if known is None:
        values = (uuid.uuid4().hex, run, label, step, _attempt(db, run, label, step), digest, time.time())
        row = db.execute(
            "INSERT INTO kept (uid, run, label, step, attempt, digest, created, kind, writer, facts, base, rank, size,"
            " source) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (*values, *_said(described, facts), size, source),
        ).lastrowid
    elif known[1] != digest:
        name = revision_name(run, label_of(label, step), digest)
        raise Refused(f"its name, {name}, is another's already: their digests begin alike")
    else:
        row = known[0]
        facts = facts.completed_by(Facts(**json.loads(known[2])))
        db.execute(
            "UPDATE kept SET kind = ?, writer = ?, facts = ?, base = ifnull(?, base), rank = ifnull(?, rank),"
            " source = ?, trashed = NULL WHERE id = ?",
            (*_said(described, facts), source, row),
        )
    found: tuple[Any, ...] = db.execute(f"SELECT {COLUMNS} FROM kept WHERE id = ?", (row,)).fetchone()
    return found


def _said(described: Described, facts: Facts) -> tuple[Any, ...]:
    return described.kind, described.writer, json.dumps(asdict(facts)), described.base, described.rank


def _attempt(db: sqlite3.Connection, run: str, label: Label, step: int | None) -> int:
    (last,) = db.execute("SELECT max(attempt) FROM kept WHERE run = ?", (run,)).fetchone()
    (largest,) = db.execute(
        "SELECT max(step) FROM kept WHERE run = ? AND attempt = ? AND label = 'step'", (run, last)
    ).fetchone()
    return attempt_of(label, step, last, largest)


def _kept_with_attempts(home: Path, where: str, *values: str) -> list[tuple[Kept, int]]:
    if not is_store(home):
        return []
    with open_database(home) as database:
        rows = database.rows(f"SELECT {COLUMNS}, attempt FROM kept WHERE {where} ORDER BY id", values)
    found = [(_kept(row[:-1], home), row[-1]) for row in rows]
    return [(kept, attempt) for kept, attempt in found if kept.folder.is_dir()]


def _kept(row: tuple[Any, ...], home: Path) -> Kept:
    uid, run, place, step, digest, kind, writer, facts, base, rank, size, source, created = row
    label = label_of(place, step)
    return Kept(
        revision_name(run, label, digest), uid, run, label, step, digest, home / "revisions" / digest, kind, writer,
        Facts(**json.loads(facts)), base, rank, size, source, created,
    )  # fmt: skip


def _as_run(name: str, found: list[tuple[Kept, int]]) -> Run:
    """The same as revisions, which know what a selector means; numbered as they stand."""
    revisions: Mapping[int, Revision] = {
        id: Revision(id, name, _place(kept), kept.digest, kept.folder, kept.facts, 0, kept.size, kept.source, 0.0)
        for id, (kept, _) in enumerate(found)
    }
    return Run(name, dict(revisions), [Finish(id, attempt) for id, (_, attempt) in enumerate(found)])


def _place(kept: Kept) -> Label:
    return "final" if kept.label == "final" else "step" if kept.label else "plain"
