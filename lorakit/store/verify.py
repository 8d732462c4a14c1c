"""Is the store what its records say: every content folder's bytes, names and modes against its digest."""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lorakit.errors import InvalidFile
from lorakit.store.contents import is_intact, modes_in, unknown_in
from lorakit.store.database import FILE, Database, is_store, open_database
from lorakit.store.trash import Stored, all_stored

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Wrong:
    """What is not as it should be, and what to do."""

    what: str
    reason: str
    cure: str

    def __str__(self) -> str:
        return f"{self.what}: {self.reason}; {self.cure}"


@dataclass(frozen=True, slots=True)
class Verified:
    """How many contents were read, and their bytes; `unneeded` are folders that no record needs, for `gc`."""

    home: Path
    contents: int
    size: int
    wrong: tuple[Wrong, ...]
    unneeded: tuple[Path, ...]

    def as_dict(self) -> dict[str, Any]:
        return {
            "home": str(self.home),
            "contents": self.contents,
            "bytes": self.size,
            "wrong": [asdict(one) for one in self.wrong],
            "unneeded": [str(path) for path in self.unneeded],
        }


def verify_store(home: Path, progress: Progress | None = None) -> Verified:
    """Read all that the store keeps, and say what is wrong; changes nothing. `progress` gets bytes done and in all."""
    if not is_store(home):
        lost = [_of_nobody(folder) for folder in sorted(home.glob("revisions/*"))]
        return Verified(home, 0, 0, tuple(lost), ())
    try:
        with open_database(home) as database:
            return _verified(database, progress)
    except InvalidFile as error:
        return Verified(home, 0, 0, (_of_database(home, str(error.__cause__)),), ())


def _verified(database: Database, progress: Progress | None) -> Verified:
    home, wrong = database.home, [_of_database(database.home, said) for said in database.check()]
    by_digest: dict[str, list[Stored]] = {}
    for stored in all_stored(database):
        by_digest.setdefault(stored.digest, []).append(stored)
    total = sum(records[0].size for records in by_digest.values())
    done = 0
    for digest, records in by_digest.items():
        folder = home / "revisions" / digest
        if list(_wrong_in(folder, records)) and digest in _needed(database):
            wrong += _wrong_in(
                folder, records
            )  # once more: it may have been removed, and kept again, while it was read
        done += records[0].size
        if progress:
            progress(done, total)
    unneeded, before = unknown_in(database)
    wrong += [_of_nobody(folder) for folder in before]
    return Verified(home, len(by_digest), total, tuple(wrong), tuple(unneeded))


def _needed(database: Database) -> set[str]:
    return {stored.digest for stored in all_stored(database)}


def _wrong_in(folder: Path, records: list[Stored]) -> Iterator[Wrong]:
    names = " and ".join(sorted({record.name for record in records}))
    again = " and ".join(f"`lorakit rm {record.uid} --purge --force`" for record in records)
    if not folder.is_dir():
        yield Wrong(names, f"its files are not in '{folder}'", f"take it in again, or forget it: {again}")
        return
    try:
        modes = dict(modes_in(folder))
        intact = is_intact(folder)
    except OSError as error:
        yield Wrong(names, f"'{folder}' can't be read: {error}", "see to the disk and the modes of its files")
        return
    if odd := next((path for path, mode in modes.items() if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))), None):
        yield Wrong(names, f"'{odd}' is neither a file nor a folder", f"do not use it: {again}, and take it in again")
        return
    if loose := next((path for path, mode in modes.items() if mode & 0o222), None):
        yield Wrong(names, f"'{loose}' can be written to", f"make it read-only: chmod -R a-w '{folder}'")
    if not intact:
        yield Wrong(
            names, f"what is in '{folder}' is not what was kept", f"do not use it: {again}, and take it in again"
        )


def _of_nobody(folder: Path) -> Wrong:
    return Wrong(
        str(folder),
        "no database knows it: the one that did was lost",
        f"put a backup of '{FILE}' in its place; or move it out, and take in again what you want of it",
    )


def _of_database(home: Path, said: str) -> Wrong:
    return Wrong(str(home), f"its database is damaged: {said}", "put a backup of it in its place")
