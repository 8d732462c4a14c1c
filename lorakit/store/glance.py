"""A store at a glance: read as it stands, without making it, bringing it up to date, or waiting for anybody.

For what only wants to know, and would rather know less than leave a trace: completion in a shell, and `lorakit doctor`.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from lorakit.store.catalog import label_of
from lorakit.store.database import FILE
from lorakit.store.names import revision_name, split_model

MOST = 5000  # records that are looked at, the newest first
WAIT = 0.1  # seconds for another process's change to end


@contextmanager
def reading(home: Path) -> Iterator[sqlite3.Connection]:
    """Raises sqlite3.Error when there is none, or it can't be read."""
    try:
        apart = (home / f"{FILE}-wal").stat().st_size
    except OSError:
        apart = 0
    # without a file of changes beside it nobody writes, and SQLite need make none
    where = f"{(home / FILE).absolute().as_uri()}?mode=ro{'' if apart else '&immutable=1'}"
    with closing(sqlite3.connect(where, uri=True, timeout=WAIT)) as connection:
        yield connection


def schema_of(home: Path) -> int:
    """The version of a store's schema. Raises sqlite3.Error as `reading`."""
    with reading(home) as store:
        return int(store.execute("PRAGMA user_version").fetchone()[0])


def records_in(home: Path) -> int:
    """How many checkpoints and revisions it has. Raises sqlite3.Error as `reading`."""
    with reading(home) as store:
        tables = [
            name for (name,) in store.execute("SELECT name FROM sqlite_master WHERE name IN ('revisions', 'kept')")
        ]
        return sum(store.execute(f"SELECT count(*) FROM {name}").fetchone()[0] for name in tables)


def keys_in(home: Path) -> list[tuple[str, str]]:
    """Ids and names of the keys that hold. Nothing where it can't be read."""
    try:
        with reading(home) as store:
            return store.execute("SELECT id, name FROM keys WHERE revoked IS NULL ORDER BY created DESC").fetchall()
    except sqlite3.Error:
        return []


def selectors_in(home: Path, *, trashed: bool = False) -> dict[str, list[str]]:
    """By run, what may stand behind its @: aliases, then what names one revision, the newest first. Of the trash, those
    that name one alone. Nothing where it can't be read."""
    which = f"trashed IS {'NOT ' if trashed else ''}NULL"
    records = (
        f"SELECT run, kind, step, digest, created FROM revisions WHERE {which} AND kind != 'mix'"
        f" UNION SELECT run, label, step, digest, created FROM kept WHERE {which} ORDER BY created DESC LIMIT ?"
    )
    found: dict[str, list[str]] = {}
    try:
        with reading(home) as store:
            rows = store.execute(records, (MOST,)).fetchall()
            aliases = store.execute("SELECT run, alias FROM aliases WHERE alias != '' AND run != 'mix'").fetchall()
    except sqlite3.Error:
        return found
    for run, kind, step, digest, _ in rows:
        name = revision_name(run, label_of(kind, step), digest)
        found.setdefault(run, [] if trashed else ["latest", "best"]).append(str(split_model(name)[1]))
    if not trashed:
        for run, alias in dict.fromkeys(aliases):
            if run in found:
                found[run].insert(0, alias)
    return {run: list(dict.fromkeys(selectors)) for run, selectors in found.items()}
