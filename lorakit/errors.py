"""Every error that lorakit raises on purpose, with the exit code of the command line.

LorakitError (1)
├── UsageError (2)             the arguments contradict each other
├── NotFound (3)               no such base, adapter, run, revision
├── Refused (4)                found, but it may not be used as it is
│   ├── InvalidFile            truncated, unparsable, lies about its size
│   ├── Incomplete             still being written
│   ├── UnsupportedAdapter     a kind of adapter that this operation can't do exactly
│   ├── UnplacedTensors        adapter tensors that no weight of the base takes
│   └── WrongBase              made for another base: shapes differ
├── Conflict (5)               the target exists, the port is taken, the name is in use
├── OutOfSpace (1)             the disk is full
└── EngineFailed (1)           vLLM is missing, or did not start

A message says what was found, where, and what to do.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class LorakitError(Exception):
    """Base of all. `code` is the exit code of a command that ends with it."""

    code = 1


class UsageError(LorakitError):
    """The arguments contradict each other."""

    code = 2


class NotFound(LorakitError):
    """There is no such base, adapter, run or revision."""

    code = 3


class Refused(LorakitError):
    """Found, but it may not be used as it is. `cause` says so in a word, of a few, for those who count."""

    code = 4
    cause = "refused"

    def __init__(self, message: str = "", *, cause: str | None = None) -> None:
        super().__init__(message)
        self.cause = cause or self.cause


class InvalidFile(Refused):
    """A file is truncated, can't be parsed, or lies about its size."""

    cause = "invalid_file"


class Incomplete(Refused):
    """A checkpoint is still being written."""

    cause = "incomplete"


class UnsupportedAdapter(Refused):
    """The adapter is of a kind that this operation can't do exactly."""

    cause = "features"


class UnplacedTensors(Refused):
    """Adapter tensors that no weight of the base takes."""

    cause = "tensors"


class WrongBase(Refused):
    """The adapter was made for another base: shapes differ."""

    cause = "base"


class Conflict(LorakitError):
    """The target exists, the port is taken, or the name is in use."""

    code = 5


class OutOfSpace(LorakitError):
    """The disk is full."""


class EngineFailed(LorakitError):
    """vLLM is missing, or did not start."""


@contextmanager
def disk_errors_named(target: Path) -> Iterator[None]:
    """Turn the operating system's word on a failed write into ours."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutOfSpace(
                f"no space left while writing '{target}': nothing was kept of it; free some space or name another --out"
            ) from error
        if error.errno == errno.EROFS:
            raise LorakitError(f"can't write '{target}': the file system is read-only") from error
        if error.errno in (errno.EACCES, errno.EPERM):
            raise LorakitError(f"can't write '{target}': permission denied") from error
        if error.errno in (errno.ENOTDIR, errno.EEXIST, errno.ENOENT) and error.filename is not None:
            raise LorakitError(
                f"can't write '{target}': '{error.filename}' ({os.strerror(error.errno).lower()}); name another --out"
            ) from error
        raise
