"""What was taken out of runs: RUN/.lorakit/trash/<uid>/ holds it, <uid>.json beside that says what it was.

All is done by one rename on the run's own file system. A journal without a folder is of a removal that did not come
about; <uid>.gone is what a purge has begun to delete.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import shutil
import stat
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from lorakit.errors import Conflict, InvalidFile, LorakitError, NotFound, Refused, disk_errors_named
from lorakit.files.folders import clear_abandoned, read_json, sync_folder, write_json

GRACE = 7 * 86_400.0  # seconds that what is in the trash can be taken back for, at least
FOLDER = Path(".lorakit", "trash")
HIDDEN = ".lorakit-trash-"  # begins the name that something has in its run while it is deleted
_UID = re.compile(r"[0-9a-f]{32}")
_NO_REPLACE = 1  # RENAME_NOREPLACE of renameat2(2)
_AT_FDCWD = -100


@dataclass(frozen=True, slots=True)
class Journal:
    """What lies in a trash folder: its own name, bytes, and when it was put there, in seconds since 1970."""

    uid: str
    name: str
    size: int
    at: float


@dataclass(frozen=True, slots=True)
class Taken:
    """A checkpoint that was taken out of a run."""

    trash: Path
    journal: Journal

    @property
    def content(self) -> Path:
        return self.trash / self.journal.uid / self.journal.name

    @property
    def place(self) -> Path:
        """Where it was, and goes back to; a run that was moved has its trash with it."""
        return self.trash.parent.parent / self.journal.name


def take_out(path: Path, now: float) -> Taken:
    """Move a folder or file of a run into the run's trash.

    Raises:
        NotFound: it is gone.
        LorakitError: it can't be moved; then it is where it was.
    """
    trash = path.parent / FOLDER
    taken = Taken(trash, Journal(uuid.uuid4().hex, path.name, size_of(path), now))
    with disk_errors_named(trash):
        trash.mkdir(parents=True, exist_ok=True)
        with _locked(trash):
            journal = trash / f"{taken.journal.uid}.json"
            try:
                _write_journal(journal, taken.journal)
                taken.content.parent.mkdir()
                for folder in (trash, trash.parent, path.parent):
                    sync_folder(folder)  # before, so that no power cut takes the way to what was moved
                _rename(path, taken.content)
            except BaseException as error:
                if not os.path.lexists(taken.content):
                    shutil.rmtree(taken.content.parent, ignore_errors=True)
                    journal.unlink(missing_ok=True)
                if isinstance(error, FileNotFoundError):
                    raise NotFound(f"'{path}' is gone") from None
                raise
            sync_folder(taken.content.parent)
            sync_folder(path.parent)
    return taken


def remove_at_once(path: Path) -> None:
    """Delete a folder or file of a run for good; needs no space on the disk. A crash leaves no half checkpoint.

    What it does leave has a hidden name: `clear_leftovers`, or pruning the run, deletes it.

    Raises:
        NotFound: it is gone.
        LorakitError: it can't be deleted.
    """
    hidden = path.with_name(f"{HIDDEN}{uuid.uuid4().hex[:12]}")
    with disk_errors_named(path), ExitStack() as opened:
        try:
            if not path.is_dir():
                path.unlink()
                return
            _lock(path, opened)
            _rename(path, hidden)
        except FileNotFoundError:
            raise NotFound(f"'{path}' is gone") from None
        sync_folder(path.parent)
        try:
            shutil.rmtree(hidden)
        except OSError as error:
            raise LorakitError(
                f"'{path}' is removed, but not all of its files could be deleted: {error}; what is left is "
                f"'{hidden}', and `lorakit store gc` tries again"
            ) from error


def put_back(taken: Taken) -> Path:
    """Move it to where it was: that place.

    Raises:
        Conflict: something else is there by now.
        NotFound: it is in the trash no more.
    """
    with disk_errors_named(taken.place), _locked(taken.trash):
        try:
            _rename(taken.content, taken.place)
        except FileExistsError:
            raise taken_by_now(taken) from None
        except FileNotFoundError:
            raise NotFound(f"'{taken.place}' is in the trash no more") from None
        sync_folder(taken.place.parent)
        _clear(taken)
    return taken.place


def taken_by_now(taken: Taken) -> Conflict:
    """Why it can't be put back."""
    return Conflict(f"'{taken.place}' is taken by now: move what is there away, or find the other in '{taken.content}'")


def purge(taken: Taken) -> None:
    """Delete it for good; once begun, nothing says that it could be taken back."""
    with disk_errors_named(taken.trash), _locked(taken.trash):
        _clear(taken)


def taken_in(trash: Path) -> list[Taken]:
    """What lies in a trash folder and can be taken back."""
    found = [_taken(trash, file.stem) for file in sorted(trash.glob("*.json"))]
    return [taken for taken in found if taken is not None]


def clear_leftovers(trash: Path, now: float | None = None) -> list[str]:
    """Remove what killed removals and purges left. What may be somebody's only copy stays: that it does, and why.

    Raises:
        Refused: there is a link in the way.
        LorakitError, OSError: something can't be removed.
    """
    clear_abandoned(trash.parent.parent, HIDDEN)
    if not trash.is_dir():
        return []
    left, now = [], time.time() if now is None else now
    with disk_errors_named(trash), _locked(trash):
        for uid in sorted({name.partition(".")[0] for name in os.listdir(trash)}):
            if _UID.fullmatch(uid) and _taken(trash, uid) is None and (said := _clear_leftover(trash, uid, now)):
                left.append(said)
    return left


def _clear_leftover(trash: Path, uid: str, now: float) -> str | None:
    folder, journal = trash / uid, trash / f"{uid}.json"
    (trash / f"{uid}.tmp").unlink(missing_ok=True)
    _delete(trash / f"{uid}.gone")
    if folder.is_symlink():
        folder.unlink()
    if not os.path.lexists(folder) or (folder.is_dir() and not os.listdir(folder)):
        journal.unlink(missing_ok=True)
        _delete(folder)
        return None
    if os.path.lexists(journal):
        return (
            f"'{folder}' stays, as '{journal}' does not say what it was: move it to where you want it, or remove both"
        )
    if now - folder.lstat().st_ctime < GRACE:
        return f"'{folder}' has lost its journal, and goes for good in 7 days: move it out if you want it"
    _delete(folder)
    return None


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files below a folder."""
    try:
        status = path.lstat()
    except OSError:  # it went away
        return 0
    if stat.S_ISDIR(status.st_mode):
        return sum(size_of(Path(folder, name)) for folder, _, names in os.walk(path) for name in names)
    return status.st_size


def _clear(taken: Taken) -> None:
    """Renamed first: what is half deleted is not offered again, and is known for what it is."""
    gone = taken.trash / f"{taken.journal.uid}.gone"
    with suppress(FileNotFoundError):
        (taken.trash / taken.journal.uid).rename(gone)
    (taken.trash / f"{taken.journal.uid}.json").unlink(missing_ok=True)
    sync_folder(taken.trash)
    _delete(gone)


def _delete(place: Path) -> None:
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place)
    else:
        place.unlink(missing_ok=True)


def _taken(trash: Path, uid: str) -> Taken | None:
    journal = _read_journal(trash / f"{uid}.json")
    taken = None if journal is None else Taken(trash, journal)
    return taken if taken is not None and os.path.lexists(taken.content) else None


def _write_journal(file: Path, journal: Journal) -> None:
    beside = file.with_suffix(".tmp")
    try:
        write_json(beside, asdict(journal))
        with beside.open("rb") as written:
            os.fsync(written.fileno())
        beside.rename(file)
    finally:
        beside.unlink(missing_ok=True)


def _read_journal(file: Path) -> Journal | None:
    """None for what no removal wrote: a run's folder is anybody's."""
    try:
        said = read_json(file)
    except InvalidFile:
        return None
    uid, name, size, at = (said.get(key) for key in ("uid", "name", "size", "at"))
    if uid != file.stem or not _UID.fullmatch(file.stem) or not isinstance(name, str) or name in ("", ".", ".."):
        return None
    if "/" in name or "\0" in name or not isinstance(size, int) or not isinstance(at, int | float):
        return None
    return Journal(file.stem, name, size, float(at))


@contextmanager
def _locked(trash: Path) -> Iterator[None]:
    """One at a time. Never through a link: what would go there might be lost."""
    for folder in (trash.parent, trash):
        if folder.is_symlink():
            raise Refused(f"'{folder}' is a link: remove it")
    with ExitStack() as opened:
        try:
            _lock(trash, opened)
        except FileNotFoundError:
            raise NotFound(f"'{trash}' is gone") from None
        yield


def _lock(folder: Path, opened: ExitStack) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    opened.callback(os.close, handle)
    with suppress(OSError):  # a file system without locks
        fcntl.flock(handle, fcntl.LOCK_EX)


def _rename(source: Path, target: Path) -> None:
    """Rename to a name that is free.

    Raises:
        FileExistsError, FileNotFoundError: it is not; or there is no such source.
        LorakitError: they are on two file systems.
    """
    if _libc.renameat2(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), _NO_REPLACE) == 0:
        return
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS):  # a file system that can't promise it
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
        source.rename(target)
        return
    if number in (errno.EXDEV, errno.EBUSY):
        raise LorakitError(f"'{source}' is a file system of its own, and can't be moved: remove what is in it by hand")
    raise OSError(number, os.strerror(number), str(source), None, str(target))


_libc = ctypes.CDLL(None, use_errno=True)
