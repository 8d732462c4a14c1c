"""A machine's own record of a run, made to agree with the bucket's as far as its files are here."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Collection, Mapping
from dataclasses import asdict
from typing import Any

from lorakit.store.catalog import Facts
from lorakit.store.database import Database
from lorakit.store.remote.state import Finished, Meant, Move, Recorded, RunState, key_of
from lorakit.store.splits import Split, read_splits, write_split
from lorakit.store.store import point_alias

_COLUMNS = "id, kind, step, digest, facts, rank, size, source, created, uid, repaired"


def agree(db: sqlite3.Connection, base: str, run: str, state: RunState, here: Collection[str]) -> None:
    """Within a change of the database: the run as the bucket has it, but for the revisions whose digests are not
    `here`. An alias that needs one of those stays as it was."""
    db.execute("INSERT OR IGNORE INTO runs (base, run) VALUES (?, ?)", (base, run))
    db.execute("UPDATE runs SET pinned = ? WHERE base = ? AND run = ?", (state.pinned, base, run))
    wanted = {key: one for key, one in state.revisions.items() if one.digest in here}
    ids = _revisions(db, base, run, wanted, _still_named(db, base, run, state, wanted))
    _finishes(db, base, run, [(ids[one.key], one.attempt) for one in state.finishes if one.key in ids])
    for alias, meant in state.aliases.items():
        if ids.keys() >= set(meant.members):
            _alias(db, (base, run, alias), meant, ids)
    for (alias,) in db.execute("SELECT alias FROM aliases WHERE base = ? AND run = ?", (base, run)).fetchall():
        if alias not in state.aliases:
            for table in ("aliases", "splits", "moves"):
                db.execute(f"DELETE FROM {table} WHERE base = ? AND run = ? AND alias = ?", (base, run, alias))
    passed = {ids[key]: reason for key, reason in state.passed_over.items() if key in ids}
    for id in set(ids.values()) - passed.keys():
        db.execute("DELETE FROM passed_over WHERE revision = ?", (id,))
    for id, reason in passed.items():
        db.execute("INSERT OR REPLACE INTO passed_over VALUES (?, ?, ?)", (id, reason, time.time()))


def _still_named(db: sqlite3.Connection, base: str, run: str, state: RunState, wanted: Collection[str]) -> set[int]:
    """What is named here by aliases that wait for files, and left the bucket: it answers until those are here."""
    waiting = [alias for alias, meant in state.aliases.items() if not set(meant.members) <= set(wanted)]
    named: set[int] = set()
    for alias in waiting:
        for table in ("aliases", "split_revisions"):
            where = "base = ? AND run = ? AND alias = ?"
            named |= {row[0] for row in db.execute(f"SELECT revision FROM {table} WHERE {where}", (base, run, alias))}
    rows = db.execute(
        "SELECT id, kind, step, digest FROM revisions WHERE base = ? AND run = ? AND trashed IS NULL", (base, run)
    ).fetchall()
    return {row[0] for row in rows if row[0] in named and key_of(*row[1:]) not in state.revisions}


def _revisions(
    db: sqlite3.Connection, base: str, run: str, wanted: Mapping[str, Recorded], spared: Collection[int]
) -> dict[str, int]:
    """The rows as they are wanted, and no others but the `spared` ones: the id of each that is wanted by its key."""
    ids, known = dict[str, int](), dict[str, tuple[Any, ...]]()
    for row in db.execute(f"SELECT {_COLUMNS}, trashed FROM revisions WHERE base = ? AND run = ?", (base, run)):
        key = key_of(row[1], row[2], row[3])
        ids[key], known[key] = row[0], (*row[4:8], row[10], row[11])
    for key in ids.keys() - wanted.keys():
        if (id := ids.pop(key)) not in spared:
            db.execute("DELETE FROM revisions WHERE id = ?", (id,))
    for key, one in wanted.items():
        said = (json.dumps(asdict(one.facts)), one.rank, one.size, one.source, one.repaired)
        if known.get(key) == (*said, None):
            continue
        if key in ids:
            db.execute(
                "UPDATE revisions SET facts = ?, rank = ?, size = ?, source = ?, repaired = ?, trashed = NULL"
                " WHERE id = ?",
                (*said, ids[key]),
            )
            continue
        taken = db.execute("SELECT 1 FROM revisions WHERE uid = ?", (one.uid,)).fetchone()
        new = db.execute(
            "INSERT INTO revisions (facts, rank, size, source, repaired, base, run, kind, step, digest, created, uid)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (*said, base, run, one.kind, one.facts.step, one.digest, one.created, None if taken else one.uid),
        ).lastrowid
        assert new is not None
        ids[key] = new
    return ids


def _finishes(db: sqlite3.Connection, base: str, run: str, wanted: list[tuple[int, int]]) -> None:
    of_run = "revision IN (SELECT id FROM revisions WHERE base = ? AND run = ?)"
    known = db.execute(f"SELECT revision, attempt FROM finishes WHERE {of_run} ORDER BY id", (base, run)).fetchall()
    if known[: len(wanted)] == wanted[: len(known)] and len(known) <= len(wanted):
        wanted = wanted[len(known) :]
    else:
        db.execute(f"DELETE FROM finishes WHERE {of_run}", (base, run))
    for one in wanted:
        db.execute("INSERT INTO finishes (revision, attempt, at) VALUES (?, ?, ?)", (*one, time.time()))


def _alias(db: sqlite3.Connection, alias: tuple[str, str, str], meant: Meant, ids: Mapping[str, int]) -> None:
    """With a journal that ends as the bucket's does, but for moves to what is not here."""
    where = "base = ? AND run = ? AND alias = ?"
    moves = [(ids[move.key], move.at, move.why) for move in meant.moves if move.key in ids]
    lines = db.execute(
        f"SELECT revision, at, id FROM moves WHERE {where} ORDER BY id DESC LIMIT ?", (*alias, 2 * len(moves))
    ).fetchall()[::-1]
    if [line[:2] for line in lines[-len(moves) :]] != [move[:2] for move in moves]:
        known = {move[:2] for move in moves}
        first = next((id for revision, at, id in lines if (revision, at) in known), None)
        if first is not None:  # from there on in the bucket's order: files of an earlier move may have come later
            db.execute(f"DELETE FROM moves WHERE {where} AND id >= ?", (*alias, first))
        for id, at, why in moves:
            point_alias(db, alias, id, why, at)
    db.execute(
        "INSERT INTO aliases (base, run, alias, revision) VALUES (?, ?, ?, ?)"
        " ON CONFLICT (base, run, alias) DO UPDATE SET revision = excluded.revision",
        (*alias, ids[meant.target]),
    )
    shares = {ids[key]: share for key, share in meant.shares.items()}
    split = Split(shares, tuple(ids[key] for key in meant.shadows), meant.seed) if shares else None
    write_split(db, alias, split)


def state_here(database: Database, base: str, run: str) -> RunState:
    """What a machine has of a run itself, as the bucket would have it."""
    rows = database.rows(
        f"SELECT {_COLUMNS} FROM revisions WHERE base = ? AND run = ? AND trashed IS NULL ORDER BY id", (base, run)
    )
    revisions = {row[0]: _recorded(row) for row in rows}
    revisions = {id: one for id, one in revisions.items() if (database.home / "revisions" / one.digest).is_dir()}
    keys = {id: one.key for id, one in revisions.items()}
    of_run = "WHERE revision IN (SELECT id FROM revisions WHERE base = ? AND run = ?)"
    passed = dict(database.rows(f"SELECT revision, reason FROM passed_over {of_run}", (base, run)))
    finishes = database.rows(f"SELECT revision, attempt FROM finishes {of_run} ORDER BY id", (base, run))
    aliases = {
        alias: meant
        for (alias,) in database.rows("SELECT alias FROM aliases WHERE base = ? AND run = ?", (base, run))
        if (meant := _meant(database, (base, run, alias), keys)) is not None
    }
    pinned = database.rows("SELECT pinned FROM runs WHERE base = ? AND run = ?", (base, run))
    return RunState(
        revisions={one.key: one for one in revisions.values()},
        finishes=tuple(Finished(keys[id], attempt) for id, attempt in finishes if id in keys),
        aliases=aliases,
        pinned=bool(pinned and pinned[0][0]),
        passed_over={keys[id]: reason for id, reason in passed.items() if id in keys},
    )


def _recorded(row: Any) -> Recorded:
    _, kind, _, digest, facts, rank, size, source, created, uid, repaired = row
    return Recorded(kind, digest, Facts(**json.loads(facts)), rank, size, source, created, uid, repaired)


def _meant(database: Database, alias: tuple[str, str, str], keys: Mapping[int, str]) -> Meant | None:
    split = read_splits(database, alias[0]).get(alias[1:])
    left = split.among(keys) if split is not None else None
    where = "base = ? AND run = ? AND alias = ?"
    moves = database.rows(f"SELECT revision, why, at FROM moves WHERE {where} ORDER BY id", alias)
    ((now,),) = database.rows(f"SELECT revision FROM aliases WHERE {where}", alias)
    target = left.main if left is not None else now
    if target not in keys:
        return None
    history = [Move(keys[id], why, at) for id, why, at in moves if id in keys]
    if not history or history[-1].key != keys[target]:
        history.append(Move(keys[target], "set", time.time()))
    if left is None or left.is_plain:
        return Meant(tuple(history[-16:]))
    shares = {keys[id]: min(1.0, share) for id, share in left.shares.items()}  # which may have been rounded up
    return Meant(tuple(history[-16:]), shares, tuple(keys[id] for id in left.shadows), left.seed)
