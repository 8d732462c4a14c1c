"""What the store can do without: content that no record needs, and what has been in the trash for long enough."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.errors import LorakitError
from lorakit.store.contents import remove_unneeded, unneeded_in
from lorakit.store.database import is_store, open_database
from lorakit.store.trash import GRACE, Stored, Trashed, all_stored, purge, purgeable, trash_folders_in
from lorakit.store.trash_folders import clear_leftovers, size_of


@dataclass(frozen=True, slots=True)
class Garbage:
    """What goes, with the bytes that it frees: things of the trash, and folders that no record needs."""

    home: Path
    trashed: tuple[tuple[Trashed, int], ...]
    folders: tuple[tuple[Path, int], ...]

    @property
    def size(self) -> int:
        return sum(size for _, size in (*self.trashed, *self.folders))

    def as_list(self) -> list[dict[str, Any]]:
        return [
            *({"what": "trash", "name": one.name, "uid": one.uid, "size": size} for one, size in self.trashed),
            *({"what": "unneeded", "name": path.name, "uid": None, "size": size} for path, size in self.folders),
        ]


def find_garbage(home: Path, *, older_than: float = GRACE, now: float | None = None) -> Garbage:
    """What `clear` would delete; changes nothing that is known."""
    now = time.time() if now is None else now
    if not is_store(home):
        return Garbage(home, (), ())
    trashed = purgeable(home, older_than, now)
    with open_database(home) as database:
        records = all_stored(database)
        folders = [(path, size_of(path)) for path in unneeded_in(database, now)]
    going = {one.uid for one in trashed}
    staying = {stored.digest for stored in records if stored.uid not in going}
    return Garbage(home, tuple(_freed(trashed, staying)), tuple(folders))


def clear(garbage: Garbage) -> tuple[Garbage, list[str]]:
    """Delete it for good, unless it was taken back or is needed by now: what of it went, and why the rest did not.

    What is in the way of one is not in the way of the others.
    """
    left: list[str] = []
    trashed = [(one, size) for one, size in garbage.trashed if _is_purged(one, garbage.home, left)]
    for folder in trash_folders_in(garbage.home):
        with _errors_in(left, f"'{folder}' is not cleared"):
            left += clear_leftovers(folder)
    folders = []
    if garbage.folders:
        with _errors_in(left, "what no record needs is not cleared"), open_database(garbage.home, freeing=True) as db:
            folders = [(folder, size) for folder, size in garbage.folders if remove_unneeded(db, folder)]
    return Garbage(garbage.home, tuple(trashed), tuple(folders)), left


def clear_expired(home: Path, now: float | None = None) -> list[str]:
    """Delete for good what can't be taken back any more: what could not be deleted, and why."""
    left: list[str] = []
    with _errors_in(left, "what is in the trash for long is not cleared"):
        for one in purgeable(home, GRACE, time.time() if now is None else now):
            _is_purged(one, home, left)
    return left


def _is_purged(one: Trashed, home: Path, left: list[str]) -> bool:
    before = len(left)
    with _errors_in(left, f"'{one.name}' is not deleted"):
        purge([one], home)
    return len(left) == before


@contextmanager
def _errors_in(left: list[str], what: str) -> Iterator[None]:
    try:
        yield
    except (LorakitError, OSError) as error:
        left.append(f"{what}: {error}")


def _freed(trashed: Sequence[Trashed], staying: set[str]) -> list[tuple[Trashed, int]]:
    """Content that others need frees nothing, and what several have frees its bytes once."""
    counted, found = set(staying), []
    for one in trashed:
        digest = one.held.digest if isinstance(one.held, Stored) else one.uid
        found.append((one, 0 if digest in counted else one.size))
        counted.add(digest)
    return found
