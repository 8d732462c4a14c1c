"""Files that anybody may have put there, opened for reading."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from lorakit.errors import InvalidFile, NotFound


@contextmanager
def opened(file: Path) -> Iterator[BinaryIO]:
    """A stream of bytes. A pipe is refused, not waited for.

    Raises:
        NotFound: there is no such file.
        InvalidFile: it is no regular file, or may not be read.
    """
    try:
        stream = open(file, "rb", opener=at_once)  # noqa: SIM115
    except FileNotFoundError:
        raise NotFound(f"there is no file '{file}'") from None
    except IsADirectoryError:
        raise InvalidFile(f"'{file}' is a folder, not a file") from None
    except PermissionError:
        raise InvalidFile(denied(file)) from None
    except (OSError, ValueError) as error:
        raise InvalidFile(f"'{file}' can't be opened: {getattr(error, 'strerror', None) or error}") from None
    with stream:
        if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
            raise InvalidFile(f"'{file}' is a pipe or a device, not a file")
        yield stream


def denied(path: str | Path) -> str:
    """What to say where a file or folder may not be read."""
    return f"'{path}' can't be read: permission denied; chmod it, or run as its owner"


def at_once(path: str, flags: int) -> int:
    """For `open`: a pipe is not waited for."""
    return os.open(path, flags | os.O_NONBLOCK)
