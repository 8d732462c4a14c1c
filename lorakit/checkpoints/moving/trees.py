"""The files of a checkpoint on this machine: listed without leaving it, and copied as they were found."""

from __future__ import annotations

import hashlib
import os
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NoReturn

from lorakit.checkpoints.finished import CHECKPOINT, QUIET, Look
from lorakit.errors import Incomplete, InvalidFile, NotFound, OutOfSpace, Refused, disk_errors_named
from lorakit.files.archive_members import safe_parts
from lorakit.files.archives import Limits
from lorakit.files.digests import file_digest
from lorakit.files.folders import FileState, copy_range, free_bytes

_OWN = ".lorakit"  # begins the names of what lorakit itself puts into runs
_PIECE = 1 << 27

Progress = Callable[[int, int | None], None]


@dataclass(frozen=True, slots=True)
class LocalFile:
    """One file: its name below the checkpoint, and where its bytes are, past all links."""

    name: str
    path: Path
    size: int
    state: FileState

    def ensure_unchanged(self) -> None:
        """Raises Incomplete when it was written again, or is gone."""
        try:
            same = _state(os.stat(self.path, follow_symlinks=False)) == self.state
        except OSError:
            same = False
        if not same:
            raise Incomplete(f"'{self.path}' was written to while it was copied: try again")

    def opened(self) -> int:
        """Raises Incomplete when it is gone, Refused when it may not be read."""
        try:
            return os.open(self.path, _READ)
        except FileNotFoundError:
            raise Incomplete(f"'{self.path}' was taken away while it was copied: try again") from None
        except OSError as error:
            _refuse_unreadable(error)

    def blocks(self, size: int = 1 << 20) -> Iterator[bytes]:
        """Its bytes. Raises Incomplete as `ensure_unchanged`, at the end."""
        with open(self.opened(), "rb") as stream:
            while block := stream.read(size):
                yield block
        self.ensure_unchanged()


_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC


def files_of(source: Path) -> list[LocalFile]:
    """The files of a folder, or the one file, in the order of their names.

    Not those of other checkpoints in it, if it is a run's own folder. A link counts as the file that it leads to, if
    that is a part of the checkpoint too, or of the same repository in the hub's cache.

    Raises:
        NotFound: there is nothing of that name, or no file in it.
        Refused: a link leads elsewhere, something is neither file nor folder, a folder may not be read, or a name is
            not plain.
    """
    if source.is_file():
        return [_file(source, source.name, source.resolve().parent)]
    if not source.is_dir():
        raise NotFound(f"there is no folder or file '{source}'")
    inside = _repository(source.resolve())
    found = []
    for folder, folders, names in os.walk(source, onerror=_refuse_unreadable):
        at = Path(folder)
        folders[:] = sorted(
            name for name in folders
            if not (name.startswith(_OWN) or (at == source and CHECKPOINT.fullmatch(name)))
        )  # fmt: skip
        for name in (*folders, *names):
            if (at / name).is_symlink() and (at / name).is_dir():
                raise Refused(f"'{at / name}' is a link to a folder: put the folder itself in its place")
        found += [
            _file(at / name, (at / name).relative_to(source).as_posix(), inside)
            for name in sorted(names)
            if not name.startswith(_OWN)
        ]
    if not found:
        raise NotFound(f"there is no file in '{source}'")
    return sorted(found, key=lambda file: file.name)


def _refuse_unreadable(error: OSError) -> NoReturn:
    """A folder that is left out would not be missed by anybody."""
    reason = os.strerror(error.errno or 0).lower()
    raise Refused(f"'{error.filename}' can't be read ({reason}): change its mode") from None


def _repository(folder: Path) -> Path:
    """The folder itself; of a snapshot in the hub's cache the repository, where the bytes are."""
    above = (folder, *folder.parents)
    return next((path for path in above if path.name.startswith("models--") and (path / "snapshots").is_dir()), folder)


def _file(path: Path, name: str, inside: Path) -> LocalFile:
    safe_parts(name, Limits())
    try:
        real = path.resolve(strict=True)
    except (OSError, RuntimeError):
        raise Refused(f"'{path}' is a link that leads nowhere: remove it") from None
    if not real.is_relative_to(inside):
        raise Refused(f"'{path}' is a link out of the checkpoint: put the file itself in its place")
    status = os.stat(real, follow_symlinks=False)
    if not stat.S_ISREG(status.st_mode):
        raise Refused(f"'{path}' is neither a file nor a folder: move it out of the checkpoint")
    return LocalFile(name, real, status.st_size, _state(status))


def _state(status: os.stat_result) -> FileState:
    return status.st_size, status.st_mtime_ns, status.st_ino


def copy_files(
    files: Iterable[LocalFile], folder: Path, *, progress: Progress | None = None, with_digests: bool = False
) -> dict[str, str]:
    """Copy into a folder, with the times of the originals: which came last tells whether a writer was done.

    The digests by name, of what stands in the copy, where they are wanted.

    Raises:
        Incomplete: one was written to meanwhile.
    """
    wanted = list(files)
    total, done, digests = sum(file.size for file in wanted), 0, {}
    for file in wanted:
        target = folder / file.name
        with disk_errors_named(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            _copy(file, target, progress and partial(_ahead, progress, done, total))
        file.ensure_unchanged()
        done += file.size
        if with_digests:
            digests[file.name] = file_digest(target)
    return digests


def _ahead(progress: Progress, before: int, total: int, done: int) -> None:
    progress(before + done, total)


def _copy(file: LocalFile, target: Path, progress: Callable[[int], None] | None) -> None:
    reader = file.opened()
    try:
        with target.open("xb") as writer:
            for start in range(0, file.size, _PIECE):
                count = min(_PIECE, file.size - start)
                copy_range(reader, writer.fileno(), start, start, count)
                if progress is not None:
                    progress(start + count)
    except InvalidFile:
        raise Incomplete(f"'{file.path}' was written to while it was copied: try again") from None
    finally:
        os.close(reader)
    os.utime(target, ns=(file.state[1], file.state[1]))


def ensure_finished(look: Look, shown: str, *, unfinished: bool = False) -> Look:
    """Raises Incomplete when it is not finished, and has to be."""
    if look.state == "incomplete" and not unfinished:
        raise Incomplete(f"'{shown}' is not finished: {look.reason}; wait, or take it as it is with --unfinished")
    return look


def ensure_space(needed: int, folder: Path) -> None:
    """Raises OutOfSpace when a folder has no room for so many bytes."""
    free = free_bytes(folder)
    if needed > free:
        raise OutOfSpace(
            f"it needs {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free: free some space or name another --out"
        )


@contextmanager
def steady(look: Callable[[], Look], shown: str, *, unfinished: bool = False) -> Iterator[Look]:
    """What is copied within is of one finished checkpoint; or of whatever is there, with `unfinished`.

    Where no last file of its writer says that it is done, it has to stay as it is for a while: that is waited for here.

    Raises:
        Incomplete: it is not finished, or was written to meanwhile.
    """
    before = ensure_finished(look(), shown, unfinished=unfinished)
    began = time.monotonic()
    yield before
    if unfinished:
        return
    if before.state == "whole":
        time.sleep(max(0.0, QUIET - (time.monotonic() - began)))
    after = look()
    if (after.state, after.signature) != (before.state, before.signature):
        raise Incomplete(f"'{shown}' was written to while it was copied: try again")


class Hashing:
    """Blocks, with the SHA-256 of those that went by."""

    def __init__(self, blocks: Iterable[bytes]) -> None:
        self._blocks = blocks
        self._digest = hashlib.sha256()

    def __iter__(self) -> Iterator[bytes]:
        for block in self._blocks:
            self._digest.update(block)
            yield block

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


def told(blocks: Iterable[bytes], progress: Progress | None, done: int, total: int) -> Iterator[bytes]:
    """Blocks, with the progress told of what went by, `done` bytes before them."""
    for block in blocks:
        done += len(block)
        if progress is not None:
            progress(done, total)
        yield block
