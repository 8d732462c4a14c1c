"""Members of an archive, checked by name and written below one folder, never elsewhere.

Names are taken for hostile. Every folder on the way is opened from its parent without following links, and every file
is made new: whatever a name says, and whatever stands in the folder, no byte goes anywhere else.
"""

from __future__ import annotations

import os
import re
import time
import unicodedata
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from lorakit.errors import InvalidFile, Refused, disk_errors_named
from lorakit.files.archive_bytes import Limits
from lorakit.files.folders import write_all

_EARLIEST = 315532800  # 1980-01-01: what is older stands for no time
_PART_BYTES = 255  # NAME_MAX of every common file system
_UNSEEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # control and format characters, surrogates, line separators
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class Members:
    """The files and folders that an archive puts below `into`."""

    def __init__(self, into: Path, limits: Limits) -> None:
        self._into = into
        self._limits = limits
        self._claimed: dict[tuple[str, ...], tuple[tuple[str, ...], bool]] = {}  # folded: as written, and if a folder
        self._headers = 0
        self.files: list[str] = []
        self.bytes = 0

    def announce(self) -> None:
        """Count a header, of whatever kind.

        Raises:
            Refused: the archive has more than it may.
        """
        self._headers += 1
        self._refuse_too_many(self._headers)

    def folder(self, name: str) -> None:
        """Make a folder; the same one twice is one.

        Raises:
            Refused: its name is not a plain one, or is a file's as well.
        """
        parts = safe_parts(name.removesuffix("/"), self._limits)
        self._claim(parts, name, folder=True)
        with disk_errors_named(self._into):
            os.close(self._opened(parts))

    def file(self, name: str, blocks: Iterable[bytes], size: int | None = None, written: float | None = None) -> int:
        """Write a file and give back its bytes. `size` is what the archive says of it, None where it says so later.

        `written`, in seconds since 1970, becomes its time where it can be true: which file came last tells whether a
        writer was done.

        Raises:
            Refused: its name is not a plain one, or was there before; or the files grow larger than they may.
            InvalidFile: it is not of the size that the archive says.
        """
        parts = safe_parts(name, self._limits)
        if not parts:
            raise Refused(f"the archive's member {shown(name)} has no name: refused")
        self._claim(parts, name, folder=False)
        self._allow(name, size or 0)
        with disk_errors_named(self._into):
            folder = self._opened(parts[:-1])
            try:
                writer = os.open(parts[-1], _NEW_FILE, 0o666, dir_fd=folder)
            finally:
                os.close(folder)
        try:
            count = self._written(writer, name, blocks, size)
            if written is not None and written >= _EARLIEST:
                moment = int(min(written, time.time()) * 1e9)
                os.utime(writer, ns=(moment, moment))
        finally:
            os.close(writer)
        self.files.append("/".join(parts))
        self.bytes += count
        return count

    def _written(self, writer: int, name: str, blocks: Iterable[bytes], size: int | None) -> int:
        written = 0
        for block in blocks:
            if size is not None and written + len(block) > size:
                raise InvalidFile(f"the archive's member {shown(name)} is longer than the {size} bytes that it says")
            self._allow(name, written + len(block))
            with disk_errors_named(self._into):
                write_all(writer, block, written)
            written += len(block)
        if size is not None and written != size:
            raise InvalidFile(f"the archive's member {shown(name)} has {written} bytes, and says {size}")
        return written

    def _allow(self, name: str, more: int) -> None:
        if self.bytes + more > self._limits.max_bytes:
            raise Refused(
                f"with {shown(name)} the archive's files are larger than the {self._limits.max_bytes} bytes that are "
                f"allowed: raise the limit if it is to be trusted"
            )

    def _claim(self, parts: tuple[str, ...], name: str, *, folder: bool) -> None:
        for count in range(1, len(parts) + 1):
            now = (parts[:count], folder or count < len(parts))
            before = self._claimed.setdefault(_folded(parts[:count]), now)
            if before is not now and (before != now or (not folder and count == len(parts))):
                raise Refused(
                    f"the archive's member {shown(name)} can't stand beside {shown('/'.join(before[0]))}, which came "
                    f"before it: on some disk the two are one name; ask for an archive that holds every file once"
                )
        self._refuse_too_many(len(self._claimed))

    def _refuse_too_many(self, count: int) -> None:
        if count > self._limits.max_files:
            raise Refused(
                f"the archive holds more than the {self._limits.max_files} files and folders that are allowed: raise "
                f"the limit if it is to be trusted"
            )

    def _opened(self, parts: tuple[str, ...]) -> int:
        """The folder, made where it is missing, open."""
        folder = os.open(self._into, _FOLDER & ~os.O_NOFOLLOW)
        for part in parts:
            parent = folder
            try:
                with suppress(FileExistsError):  # made for another member; or else no folder, as the next line says
                    os.mkdir(part, dir_fd=parent)
                folder = os.open(part, _FOLDER, dir_fd=parent)
            finally:
                os.close(parent)
        return folder


def safe_parts(name: str, limits: Limits) -> tuple[str, ...]:
    """The parts of a member's name below the folder; a leading `./` is none, so `./` itself has no parts.

    Raises:
        Refused: the name is absolute, leads upwards, has a drive letter, a backslash, an empty part or a character
            that can't be seen, or is too long or too deep; as it is written, or as Unicode's NFKC reads it.
    """
    plain = name
    while plain.startswith("./"):
        plain = plain[2:]
    if plain in ("", "."):
        return ()
    for form in (plain, unicodedata.normalize("NFKC", plain)):
        if reason := _reason_against(form):
            raise Refused(f"the archive's member {shown(name)} {reason}: refused; ask for an archive with plain names")
    parts = tuple(plain.split("/"))
    if len(os.fsencode(plain)) > limits.max_name or any(len(os.fsencode(part)) > _PART_BYTES for part in parts):
        raise Refused(
            f"the archive's member {shown(name)} has too long a name: at most {limits.max_name} bytes, "
            f"{_PART_BYTES} a part"
        )
    if len(parts) > limits.max_depth:
        raise Refused(f"the archive's member {shown(name)} lies deeper than {limits.max_depth} folders")
    return parts


def _reason_against(name: str) -> str:
    parts = name.split("/")
    if name.startswith("/"):
        return "has an absolute name"
    if ".." in parts:
        return "leads out of the folder"
    if re.match("[A-Za-z]:", name):
        return "names a drive"
    if "\\" in name:
        return "has a backslash in its name"
    if any(unicodedata.category(letter) in _UNSEEN for letter in name):
        return "has a character in its name that can't be seen"
    if any(part in ("", ".") for part in parts):
        return "has an empty part in its name"
    return ""


def shown(name: str | bytes) -> str:
    """A name as a message may hold it: quoted, escaped, and not too long."""
    return repr(name) if len(name) <= 100 else f"{name[:100]!r}…"


def _folded(parts: tuple[str, ...]) -> tuple[str, ...]:
    """The same for names that a disk which ignores case or normalises Unicode takes for one (NFKC_Casefold)."""
    return tuple(_casefolded(_casefolded(part)) for part in parts)


def _casefolded(part: str) -> str:
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", part).casefold())
