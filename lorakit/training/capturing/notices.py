"""What the kernel tells of a folder: how often each name in it appeared, or was written to its end, though it be gone
again, or be written over, before anybody looks.

inotify, where there is one; else nothing is told, and who asks has to look by itself.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections import Counter
from pathlib import Path

_CREATED, _MOVED_TO, _WRITTEN, _GONE, _ONLY_FOLDERS = 0x100, 0x80, 0x8, 0x8000, 0x01000000
_IS_FOLDER, _OVERFLOWED, _REMOVED = 0x40000000, 0x4000, 0x200
_EVENT = struct.Struct("iIII")


class Notices:
    """`file` is readable when there is something new; None where the kernel tells nothing. `overflowed`: it had more to
    tell than it remembers.
    """

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self.overflowed = False
        self._watched: dict[int, Path] = {}
        self._renamed: set[Path] = set()  # maybe still open, so that they will be said to be written, too
        try:
            made = self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        except AttributeError:
            made = -1
        self.file: int | None = made if made >= 0 else None

    def watch(self, folder: Path) -> None:
        """From now on tell what appears in it, and which file was written to its end; the same again is nothing new."""
        if self.file is None:
            return
        # Without what is removed, two folders of one name, one after the other, would be told of once.
        mask = _CREATED | _MOVED_TO | _WRITTEN | _REMOVED | _ONLY_FOLDERS
        number = self._libc.inotify_add_watch(self.file, os.fsencode(folder), mask)
        if number >= 0:
            self._watched[number] = folder
        elif ctypes.get_errno() == errno.ENOSPC:  # no more watches for this user: looking now and then has to do
            self.close()

    def written(self) -> Counter[Path]:
        """How often each came about since the last call, be it there or not: a file when it was written to its end or
        renamed so, a folder when it was made or renamed so."""
        found: Counter[Path] = Counter()
        while self.file is not None:
            try:
                block = os.read(self.file, 1 << 16)
            except BlockingIOError:
                break
            self._count(block, found)
        return found

    def close(self) -> None:
        if self.file is not None:
            os.close(self.file)
            self.file = None

    def _count(self, block: bytes, found: Counter[Path]) -> None:
        offset = 0
        while offset < len(block):
            number, mask, _, length = _EVENT.unpack_from(block, offset)
            name = block[offset + _EVENT.size : offset + _EVENT.size + length].rstrip(b"\0")
            offset += _EVENT.size + length
            if mask & _OVERFLOWED:
                self.overflowed = True
            elif mask & _GONE:
                self._watched.pop(number, None)
            elif name and number in self._watched and not mask & _REMOVED:
                path = self._watched[number] / os.fsdecode(name)
                if mask & _MOVED_TO:
                    self._renamed.add(path)
                elif path in self._renamed or not mask & (_WRITTEN | _IS_FOLDER):
                    self._renamed.discard(path)
                    continue
                found[path] += 1
