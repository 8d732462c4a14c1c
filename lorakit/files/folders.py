"""Folders and files that appear whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lorakit.errors import Conflict, InvalidFile, LorakitError, NotFound, disk_errors_named
from lorakit.files.regular import opened

FileState = tuple[int, int, int]
MAX_JSON = 1 << 28  # bytes; the longest logs and indexes are far below


@contextmanager
def whole_folder(target: Path, *, take_up: Callable[[Path], bool] | None = None) -> Iterator[Path]:
    """A folder beside `target` to write into; synced and renamed to `target` at the end, removed after an error.

    With `take_up`, a folder that a killed writer left and that it says yes to is gone on with, and an error leaves the
    folder for the next.

    Raises:
        Conflict: `target` exists, before anything is written or when the folder is to take its place.
    """
    refuse_existing(target)
    with disk_errors_named(target):
        made = [parent for parent in target.parents if not parent.exists()]
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with temporary_folder(target.parent, f".{target.name}.tmp-", take_up=take_up) as folder:
                yield folder
                sync_tree(folder)
                refuse_existing(target)
                _rename_for_good(folder, target)
        except BaseException:
            _remove_empty(made)
            raise


@contextmanager
def temporary_folder(
    parent: Path, prefix: str, mode: int = 0o777, *, take_up: Callable[[Path], bool] | None = None
) -> Iterator[Path]:
    """A new folder, gone at the end unless it was renamed away.

    It is locked while its maker lives, so what a killed one left behind is known, and cleared by the next; or gone on
    with, where `take_up` says so of it. Then an error leaves it there too.
    """
    taken = _abandoned_folder(parent, prefix, take_up) if take_up else None
    clear_abandoned(parent, prefix)
    folder, lock = taken or locked_folder(parent, prefix, mode)
    keep = False
    try:
        yield folder
    except BaseException:
        keep = take_up is not None and take_up(folder)
        raise
    finally:
        if not keep:  # before the lock is gone: nobody shall take up what is being removed
            shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _rename_for_good(folder: Path, target: Path) -> None:
    try:
        folder.rename(target)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):  # another writer was first, by a moment
            refuse_existing(target)
        raise
    try:
        sync_folder(target.parent)
    except OSError:  # the name may not last: better none, so that the next run finds its place free
        target.rename(folder)
        raise


def _abandoned_folder(parent: Path, prefix: str, wanted: Callable[[Path], bool]) -> tuple[Path, int] | None:
    """A folder that nobody holds locked and that is wanted, locked now."""
    for folder, lock in abandoned_folders(parent, prefix):
        mine = os.fstat(lock).st_uid == os.geteuid()  # in a folder of many, anybody can put one there
        if mine and folder.is_dir() and wanted(folder):
            return folder, lock
        os.close(lock)
    return None


def abandoned_folders(parent: Path, prefix: str) -> Iterator[tuple[Path, int]]:
    """Folders that nobody holds locked, each with the lock that is held on it now: the caller closes it."""
    for folder in sorted(parent.glob(f"{_literal(prefix)}*")):
        try:
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)
            continue
        yield folder, lock


def locked_folder(parent: Path, prefix: str, mode: int = 0o777) -> tuple[Path, int]:
    """A new folder, and the lock that its maker holds on it until that is closed."""
    while True:  # until it is locked before anybody takes it for abandoned
        folder = parent / f"{prefix}{uuid.uuid4().hex[:12]}"
        folder.mkdir(mode)
        try:
            lock = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:
            continue
        except OSError:
            folder.rmdir()
            raise
        fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.is_dir():
            return folder, lock
        os.close(lock)


def _remove_empty(folders: Iterable[Path]) -> None:
    for folder in folders:
        try:
            folder.rmdir()
        except FileNotFoundError:  # it was not made
            continue
        except OSError:  # another writer has something in it
            return


def refuse_existing(target: Path) -> None:
    """Raises Conflict when `target` exists, as anything but an empty folder."""
    try:
        occupied = not target.is_dir() or any(target.iterdir())
    except FileNotFoundError:
        occupied = False
    if (target.exists() or target.is_symlink()) and occupied:
        raise Conflict(f"'{target}' exists already: remove it, or name another place")


def clear_abandoned(parent: Path, prefix: str) -> None:
    """Remove the folders that killed writers left behind: those that nobody holds locked."""
    for folder, lock in abandoned_folders(parent, prefix):
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _literal(name: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def sync_tree(folder: Path) -> None:
    """fsync every file and folder below `folder`, and itself."""
    for path, _, files in os.walk(folder, topdown=False):
        for name in files:
            handle = os.open(os.path.join(path, name), os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        sync_folder(Path(path))


def sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def copy_file(source: Path, target: Path) -> None:
    """Copy the bytes, by the kernel where it can (a reflink where the file system has them).

    Never a hard link: a trainer may write into the inode again.
    """
    with source.open("rb") as reader, target.open("xb") as writer:
        copy_range(reader.fileno(), writer.fileno(), 0, 0, os.fstat(reader.fileno()).st_size)


def copy_range(reader: int, writer: int, source_offset: int, target_offset: int, count: int) -> None:
    """Copy `count` bytes between two open files at the given offsets."""
    done = 0
    while done < count:
        wanted = min(count - done, 1 << 27)
        try:
            copied = os.copy_file_range(reader, writer, wanted, source_offset + done, target_offset + done)
        except OSError as error:
            if error.errno not in _NO_COPY_FILE_RANGE:
                raise
            block = os.pread(reader, min(wanted, 1 << 22), source_offset + done)
            write_all(writer, block, target_offset + done)
            copied = len(block)
        if copied == 0:
            raise InvalidFile(f"a file became shorter while it was copied: {done} of {count} bytes were there")
        done += copied


# EXDEV, EINVAL, ENOSYS, EOPNOTSUPP, EBADF: this pair of file systems has no copy_file_range
_NO_COPY_FILE_RANGE = {18, 22, 38, 95, 9}


def write_all(writer: int, block: bytes | memoryview, offset: int) -> None:
    """pwrite until every byte is written."""
    view = memoryview(block)
    while view:
        written = os.pwrite(writer, view, offset)
        view = view[written:]
        offset += written


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        InvalidFile: the file can't be read or parsed, or holds no object.
    """
    try:
        with opened(file) as stream:
            value = parse_json(stream.read(MAX_JSON + 1))
    except NotFound as error:
        raise InvalidFile(str(error)) from None
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidFile(f"'{file}' can't be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise InvalidFile(f"'{file}' holds no JSON object")
    return value


def parse_json(raw: bytes) -> Any:
    """Raises ValueError, or RecursionError, when it is none, or longer than `MAX_JSON`."""
    if len(raw) > MAX_JSON:
        raise ValueError(f"it is longer than {MAX_JSON} bytes")
    return json.loads(raw)


def write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def file_state(file: Path) -> FileState:
    """Size, time and inode: what tells that a file was written again."""
    try:
        status = file.stat()
    except OSError as error:
        raise LorakitError(f"'{file}' went away while it was read") from error
    return status.st_size, status.st_mtime_ns, status.st_ino


def free_bytes(place: Path) -> int:
    """How much this user may still write where `place` is, or would be."""
    there = next(path for path in (place, *place.absolute().parents) if path.is_dir())
    status = os.statvfs(there)
    return status.f_bavail * status.f_frsize
