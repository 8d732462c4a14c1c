"""The folders `revisions/<sha256>/`: copied into, put in their place, and taken away when no record needs them."""

from __future__ import annotations

import errno
import os
import shutil
import sqlite3
import stat
import time
import uuid
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from lorakit.errors import Incomplete, InvalidFile, NotFound, Refused, disk_errors_named
from lorakit.files.digests import folder_digest
from lorakit.files.folders import copy_file, copy_range, sync_folder
from lorakit.files.provenance import FILE as PROVENANCE
from lorakit.store.database import Database

YOUNG = 3_600.0  # seconds in which content may be about to be recorded by who put it there
LEFT_OUT = ".lorakit"  # begins the names of what lorakit itself puts into runs: requests, receipts, trash

Inode = tuple[int, int]
Identity = tuple[int, int, int]  # as no other folder has it, be its inode the same


def copy_checkpoint(source: Path, staged: Path, *, without: Collection[str] = ()) -> tuple[str, int]:
    """Copy a folder or a single file, as it was written, into the folder `staged`: its digest, and its size in bytes.

    A link to a file within the source becomes a copy of that file. The digest is of the copy's names and bytes.

    Args:
        without: names directly in the source that are not part of it.

    Raises:
        NotFound: there is no such folder or file.
        Refused: it is empty, or holds a link that leads elsewhere or what is neither file nor folder; names that.
        Incomplete: it was written to, or taken away, meanwhile.
    """
    try:
        mode = source.lstat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise NotFound(f"there is no checkpoint '{source}'") from None
    size = _copy_folder(source, staged, without) if stat.S_ISDIR(mode) else _copy_alone(source, staged)
    names = files_in(staged)
    if not names:
        raise Refused(f"'{source}' holds no files")
    return folder_digest(staged, names), size


def files_in(folder: Path) -> list[str]:
    """The names of all files below a folder, relative to it."""
    return [os.path.relpath(os.path.join(path, name), folder) for path, _, names in os.walk(folder) for name in names]


def modes_in(folder: Path) -> Iterator[tuple[str, int]]:
    """A folder and all that is in it, links not followed, each with its kind and permissions."""
    yield str(folder), folder.lstat().st_mode
    for path, folders, files in os.walk(folder):
        for name in (*folders, *files):
            place = os.path.join(path, name)
            yield place, os.lstat(place).st_mode


def is_intact(folder: Path) -> bool:
    """Whether a content folder has the digest that is its name.

    What a server took in has a `lorakit.json` beside it, of which the digest knows nothing.

    Raises:
        OSError: it can't be read.
    """
    if not all(stat.S_ISDIR(mode) or stat.S_ISREG(mode) for _, mode in modes_in(folder)):
        return False
    whole = files_in(folder)
    served = [name for name in whole if name != PROVENANCE]
    ways = [whole] if len(served) == len(whole) else [served, whole]
    return any(folder_digest(folder, names) == folder.name for names in ways)


@contextmanager
def placed(database: Database, staged: Path, digest: str) -> Iterator[sqlite3.Connection]:
    """A change of the database within which a copy that is on the disk has got to its place, read-only: until it ends,
    nobody takes it away. What is there already stays, if it is still what its digest says; else it makes way.
    """
    folder = database.home / "revisions" / digest
    damaged = _damaged(folder)
    gone = None
    with database.change() as db:
        if damaged is not None and damaged == _identity(folder):  # and no other has put an intact one there meanwhile
            gone = _out_of_the_way(folder, database.home)
        if not folder.is_dir():
            staged.rename(folder)
        _make_read_only(folder)  # also what one that was killed here could not
        yield db
    _delete(gone)


def is_needed(db: sqlite3.Connection, digest: str) -> bool:
    """Whether a record has this content, be it in the trash."""
    return any(
        db.execute(f"SELECT 1 FROM {table} WHERE digest = ? LIMIT 1", (digest,)).fetchone()
        for table in ("revisions", "kept")
    )


def unknown_in(database: Database) -> tuple[list[Path], list[Path]]:
    """The folders that no record names: those that came since the database was made, and those from before it.

    The latter another database knew, which was lost; they are nobody's garbage.
    """
    names = {name for (name,) in database.rows("SELECT digest FROM revisions UNION SELECT digest FROM kept")}
    made = database.rows("SELECT at FROM made")[0][0]
    since, before = list[Path](), list[Path]()
    for folder in sorted((database.home / "revisions").iterdir()):
        if folder.name not in names and (changed := _changed(folder)) is not None:
            (since if changed >= made else before).append(folder)
    return since, before


def unneeded_in(database: Database, now: float | None = None) -> list[Path]:
    """The folders that no record names, nor can be about to."""
    now = time.time() if now is None else now
    aged = [(folder, _changed(folder)) for folder in unknown_in(database)[0]]
    return [folder for folder, changed in aged if changed is not None and now - changed >= YOUNG]


def remove_unneeded(database: Database, folder: Path) -> bool:
    """Delete a content folder, unless a record needs it by now: whether it is gone."""
    with database.change() as db, disk_errors_named(folder):
        if is_needed(db, folder.name):
            return False
        gone = _out_of_the_way(folder, database.home)
    _delete(gone)
    return gone is not None


def _damaged(folder: Path) -> Identity | None:
    """What is there and is not what its digest says, or can't be read."""
    found = _identity(folder)
    try:
        return None if found is None or is_intact(folder) else found
    except OSError:
        return found


def _identity(folder: Path) -> Identity | None:
    try:
        status = folder.lstat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino, status.st_mtime_ns


def _make_read_only(folder: Path) -> None:
    for path, _, _ in os.walk(folder, topdown=False):
        if os.stat(path).st_mode & 0o222:  # else it may be another user's
            os.chmod(path, 0o555)
        sync_folder(Path(path))
    sync_folder(folder.parent)


def _out_of_the_way(folder: Path, home: Path) -> Path | None:
    """Where it is now, to be deleted: after a crash by whoever opens the store next. None when it was gone."""
    gone = home / "tmp" / f"gone-{uuid.uuid4().hex}"
    try:
        if not folder.is_symlink():
            for path, _, _ in os.walk(folder):  # before: read-only, only root could move it, or clear it away later
                os.chmod(path, 0o755)
        folder.rename(gone)
    except FileNotFoundError:
        return None
    return gone


def _delete(gone: Path | None) -> None:
    if gone is None:
        return
    if gone.is_dir() and not gone.is_symlink():
        shutil.rmtree(gone, ignore_errors=True)
    else:
        gone.unlink(missing_ok=True)


def _changed(path: Path) -> float | None:
    """In seconds since 1970; None when it went away."""
    try:
        return path.lstat().st_ctime
    except FileNotFoundError:
        return None


# copying


def _copy_folder(source: Path, staged: Path, without: Collection[str]) -> int:
    size, copied, links = 0, dict[Inode, Path](), list[Path]()
    with _source_errors_named(source):
        for inner, handle, status in _entries(source, without):
            target = staged / inner
            if stat.S_ISDIR(status.st_mode):
                target.mkdir()
            elif stat.S_ISLNK(status.st_mode):
                links.append(inner)
            else:
                _refuse_odd_kind(status, source / inner)
                size += _copy_file(inner.name, handle, target, source / inner)
                copied[status.st_dev, status.st_ino] = target
        for link in links:
            size += _copy_link(source / link, staged / link, copied)
    return size


def _entries(source: Path, without: Collection[str]) -> Iterator[tuple[Path, int, os.stat_result]]:
    """Names relative to the source, each with the open folder that it stands in; never through a link."""
    for path, folders, files, handle in os.fwalk(source, onerror=_raise, follow_symlinks=False):
        inner = Path(os.path.relpath(path, source))
        absent = without if inner == Path() else ()
        folders[:] = [name for name in folders if not (name.startswith(LEFT_OUT) or name in absent)]
        for name in (*folders, *files):
            if not (name.startswith(LEFT_OUT) or name in absent):
                _refuse_odd_name(source / inner / name)
                yield inner / name, handle, os.stat(name, dir_fd=handle, follow_symlinks=False)


def _copy_alone(source: Path, staged: Path) -> int:
    _refuse_odd_name(source)
    with _source_errors_named(source):
        if source.is_symlink():
            raise Refused(f"'{source}' is a link: name what it leads to")
        _refuse_odd_kind(source.lstat(), source)
        return _copy_file(str(source), None, staged / source.name, source)


def _copy_file(name: str, folder: int | None, target: Path, said: Path) -> int:
    """Its size in bytes. The copy has the time of its source: which file came last tells whether a writer was done."""
    reader = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    try:
        before = os.fstat(reader)
        _refuse_odd_kind(before, said)
        with disk_errors_named(target), target.open("xb") as writer:
            try:
                copy_range(reader, writer.fileno(), 0, 0, before.st_size)
            except InvalidFile:
                raise Incomplete(f"'{said}' became shorter while it was copied: try again") from None
            os.fchmod(writer.fileno(), 0o444)
            os.utime(writer.fileno(), ns=(before.st_atime_ns, before.st_mtime_ns))
        after = os.fstat(reader)
    finally:
        os.close(reader)
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise Incomplete(f"'{said}' was written to while it was copied: try again")
    return before.st_size


def _copy_link(link: Path, target: Path, copied: Mapping[Inode, Path]) -> int:
    """As Lightning's `last.ckpt`: one more name for a file that was copied already."""
    try:
        status = link.stat()
    except OSError:
        raise Refused(f"'{link}' is a link that leads nowhere: remove it") from None
    original = copied.get((status.st_dev, status.st_ino))
    if original is None:
        raise Refused(f"'{link}' is a link out of the checkpoint: put the file itself in its place")
    with disk_errors_named(target):
        copy_file(original, target)
        target.chmod(0o444)
        os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))
    return status.st_size


def _refuse_odd_kind(status: os.stat_result, path: Path) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise Refused(f"'{path}' is neither a file nor a folder, and can't be kept: move it out of the checkpoint")


def _refuse_odd_name(path: Path) -> None:
    """A digest is taken of a list with one name a line."""
    if not path.name.isprintable():
        raise Refused(f"the name of {str(path)!a} holds what no name may: rename it")


@contextmanager
def _source_errors_named(source: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ESTALE, errno.ENOTDIR, errno.ELOOP):
            raise Incomplete(f"'{source}' was taken away or changed while it was copied: try again") from error
        if error.errno in (errno.EACCES, errno.EPERM):
            raise Refused(
                f"'{error.filename}' in '{source}' may not be read: run both as one user, or change its mode"
            ) from error
        raise


def _raise(error: OSError) -> None:
    raise error
