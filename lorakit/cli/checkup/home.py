"""The store's place: can it be written, does the file system keep its word, and what is in it."""

from __future__ import annotations

import errno
import fcntl
import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from lorakit.cli.checkup.finding import Finding
from lorakit.cli.tables import size_in_words
from lorakit.files.folders import free_bytes, sync_folder, temporary_folder

LITTLE, NONE = 5 << 30, 1 << 30  # bytes: a warning, a problem
SLOW = 0.5  # seconds for a few kilobytes to reach the disk
OVER_NETWORK = frozenset({"nfs", "nfs4", "cifs", "smb3", "9p", "ceph", "lustre", "gpfs", "beegfs", "afs"})
FORGETS = frozenset({"tmpfs", "ramfs", "overlay"})
_FICLONE = 0x40049409  # linux/fs.h
_BLOCK = b"\0" * (1 << 16)
PREFIX = ".lorakit-doctor-"


@dataclass(frozen=True, slots=True)
class Trial:
    """What was tried on a file system: what did not work, in words; whether files can share their blocks until one is
    written; seconds that a sync took."""

    failures: tuple[str, ...]
    reflinks: bool
    sync: float


def home(place: Path, *, said: bool) -> Iterator[Finding]:
    """`said`: $LORAKIT_HOME names it. Nothing is left behind."""
    there = next(path for path in (place, *place.parents) if path.is_dir())
    writable = os.access(there, os.W_OK | os.X_OK)
    kind = file_system_of(there, Path("/proc/self/mountinfo").read_text())
    yield of_home(place, said=said, exists=there == place, writable=writable, free=free_bytes(there), kind=kind)
    if writable:
        yield of_trial(try_out(place / "tmp" if (place / "tmp").is_dir() else there))
    if there == place:
        yield contents_of(place)


def of_home(place: Path, *, said: bool, exists: bool, writable: bool, free: int, kind: str) -> Finding:
    """`free` in bytes; `kind` is the file system's."""
    what = f"{place} ({'$LORAKIT_HOME' if said else 'the default'}), {size_in_words(free)} free, {kind}"
    what += "" if exists else "; not there yet"
    move = "set LORAKIT_HOME to a folder on another disk"
    if not writable:
        return Finding("store", "problem", what, "this user may not write there", "set LORAKIT_HOME to another folder")
    if free < NONE:
        return Finding("store", "problem", what, "there is no room for an adapter", f"lorakit store gc, or {move}")
    if kind in OVER_NETWORK:
        why = "SQLite's log needs memory that all who use the store share: one machine at a time"
        return Finding("store", "warning", what, why, move)
    if kind in FORGETS:
        why = (
            "what is in it goes with the machine, or the container" if kind == "overlay" else "it is gone at a restart"
        )
        return Finding(
            "store", "warning", what, why, "in a container: mount a volume there" if kind == "overlay" else move
        )
    if free < LITTLE:
        return Finding("store", "warning", what, "there is little room", f"lorakit store gc, or {move}")
    return Finding("store", "ok", what)


def of_trial(trial: Trial) -> Finding:
    works = "files are synced, renamed, locked, and SQLite's log works"
    copies = "copies share their blocks" if trial.reflinks else "a copy takes its full size"
    if trial.failures:
        why = "the store needs that to survive a crash, and to be used by several programs"
        return Finding("disk", "problem", "; ".join(trial.failures), why, "set LORAKIT_HOME to a local disk")
    if trial.sync > SLOW:
        why = f"64 kB take {trial.sync:.1f} s to reach the disk: each new revision waits for that"
        return Finding("disk", "warning", f"{works}; {copies}", why, "set LORAKIT_HOME to a faster disk")
    return Finding("disk", "ok", f"{works}; {copies}")


def of_contents(version: int, newest: int, records: int, size: int) -> Finding:
    """`version` of the schema that is there, and the `newest` that this lorakit knows; `size` in bytes."""
    what = f"{records} checkpoint{'s' * (records != 1)}, {size_in_words(size)}, schema {version}"
    if version > newest:
        why = f"a newer lorakit wrote it; this one knows schema {newest}"
        return Finding("contents", "problem", what, why, "upgrade lorakit, or set LORAKIT_HOME to another folder")
    upgraded = f"; brought up to schema {newest} when it is next used" if version < newest else ""
    return Finding("contents", "ok", what + upgraded)


# looking it up


def file_system_of(place: Path, mounts: str) -> str:
    """The kind of the file system that a folder is on, by /proc/self/mountinfo."""
    found, depth = "unknown", -1
    for line in mounts.splitlines():
        words = line.split()
        if "-" not in words:
            continue
        point = Path(words[4].encode().decode("unicode_escape"))
        if place.resolve().is_relative_to(point) and len(point.parts) >= depth:
            found, depth = words[words.index("-") + 1], len(point.parts)
    return found


def try_out(place: Path) -> Trial:
    """Write, sync, rename, lock and clone in a folder of its own, which is gone at the end."""
    failures, reflinks, took = list[str](), False, 0.0
    try:
        with temporary_folder(place, PREFIX) as folder:
            took = _sync_and_rename(folder)
            reflinks = _clones(folder)
            failures += [said for said in (_lock(folder), _wal(folder)) if said]
    except OSError as error:
        failures.append(f"a file can't be written there: {os.strerror(error.errno or errno.EIO)}")
    return Trial(tuple(failures), reflinks, took)


def _sync_and_rename(folder: Path) -> float:
    with (folder / "written").open("xb") as file:
        file.write(_BLOCK)
        file.flush()
        begun = time.perf_counter()
        os.fsync(file.fileno())
        took = time.perf_counter() - begun
    (folder / "written").rename(folder / "renamed")
    sync_folder(folder)
    return took


def _clones(folder: Path) -> bool:
    with (folder / "renamed").open("rb") as source, (folder / "clone").open("xb") as target:
        try:
            fcntl.ioctl(target, _FICLONE, source.fileno())
        except OSError:
            return False
    return True


def _lock(folder: Path) -> str | None:
    with (folder / "renamed").open("rb") as one, (folder / "renamed").open("rb") as other:
        try:
            fcntl.flock(one, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return f"files can't be locked: {error.strerror}"
        try:
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return None
    return "two can lock one file"


def _wal(folder: Path) -> str | None:
    try:
        with closing(sqlite3.connect(folder / "tried.sqlite3", isolation_level=None)) as one:
            (mode,) = one.execute("PRAGMA journal_mode = WAL").fetchone()
            if mode != "wal":
                return f"SQLite can't keep a log there (it says '{mode}')"
            one.execute("CREATE TABLE tried (word TEXT)")
            with closing(sqlite3.connect(folder / "tried.sqlite3", isolation_level=None)) as other:
                other.execute("INSERT INTO tried VALUES ('seen')")
            if one.execute("SELECT word FROM tried").fetchall() != [("seen",)]:
                return "what one connection to SQLite writes, another does not see"
    except sqlite3.Error as error:
        return f"SQLite can't be used there: {error}"
    return None


def contents_of(place: Path) -> Finding:
    from lorakit.store.database import FILE, NEWEST
    from lorakit.store.glance import records_in, schema_of

    if not (place / FILE).is_file():
        return Finding("contents", "ok", "nothing yet")
    try:
        return of_contents(schema_of(place), NEWEST, records_in(place), _size(place / "revisions"))
    except sqlite3.Error as error:
        why, cure = f"its database can't be read: {error}", "lorakit store verify"
        return Finding("contents", "problem", str(place / FILE), why, cure)


def _size(folder: Path) -> int:
    """Bytes of the files in it."""
    return sum(os.lstat(os.path.join(parent, name)).st_size for parent, _, names in os.walk(folder) for name in names)
