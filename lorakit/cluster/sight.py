"""What every node has to see: the files that are read, and the folder that is written, under the same paths."""

from __future__ import annotations

import os
import socket
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from lorakit import __version__
from lorakit.errors import Conflict, NotFound, UsageError
from lorakit.files.digests import sampled_digest
from lorakit.files.folders import FileState, file_state

SHARED = "--ray needs a file system that all machines share, mounted under the same path on each of them"


@dataclass(frozen=True, slots=True)
class Sight:
    """`files`: what is read, each with its sampled digest. `mark` is a file in `folder`, where results are written, if
    they are.
    """

    folder: Path | None
    mark: str
    files: tuple[tuple[Path, str], ...]
    version: str = __version__

    @property
    def place(self) -> Path | None:
        """Of the mark."""
        return None if self.folder is None else self.folder / self.mark

    def ensure_here(self) -> None:
        """On a node: raises where it does not see what the others see.

        Raises:
            NotFound: a file or the folder is not there, or another one is; names the node and the path.
            UsageError: another lorakit is installed there, or the folder can't be written.
        """
        _states(self)

    def ensure_unchanged(self) -> None:
        """On a node that saw it: raises Conflict when a file was written again since then."""
        for (file, _), state in zip(self.files, _states(self), strict=True):
            if file_state(file) != state:
                raise Conflict(f"'{file}' was written again while it was read: start anew")


@contextmanager
def sight_of(folder: Path | None, files: Iterable[Path]) -> Iterator[Sight]:
    """What the nodes have to see, as it is seen here; `folder` holds the mark meanwhile."""
    name = f".ray-{uuid.uuid4().hex}"
    known = tuple((file.absolute(), sampled_digest(file)) for file in dict.fromkeys(files))
    if folder is None:
        yield Sight(None, name, known)
        return
    mark = folder.absolute() / name
    mark.touch(exist_ok=False)
    try:
        yield Sight(mark.parent, name, known)
    finally:
        mark.unlink(missing_ok=True)


def ensure_seen(files: Iterable[Path]) -> None:
    """On a node: raises NotFound for a file that is not there."""
    for file in files:
        if not file.is_file():
            raise NotFound(f"{_node()} does not see '{file}': {SHARED}")


@lru_cache(maxsize=4)
def _states(sight: Sight) -> tuple[FileState, ...]:
    """Looked at once by each process."""
    node = _node()
    if sight.version != __version__:
        raise UsageError(f"{node} has lorakit {__version__}, and this is {sight.version}: install the same there")
    if sight.folder is not None:
        if not (sight.folder / sight.mark).is_file():
            raise NotFound(f"{node} does not see '{sight.folder.parent}', where the result is written: {SHARED}")
        if not os.access(sight.folder, os.W_OK | os.X_OK):
            raise UsageError(f"{node} may not write into '{sight.folder.parent}': let the user of its Ray do so")
    found = []
    for file, digest in sight.files:
        try:
            state = file_state(file) if file.is_file() else None
            same = state is not None and sampled_digest(file) == digest
        except OSError as error:
            raise NotFound(f"{node} can't read '{file}' ({error.strerror}): {SHARED}") from None
        if state is None:
            ensure_seen([file])
        if state is None or not same:
            raise NotFound(f"{node} has another file at '{file}' than this machine: {SHARED}")
        found.append(state)
    return tuple(found)


def _node() -> str:
    return f"node '{socket.gethostname()}'"
