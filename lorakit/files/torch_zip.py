"""The zip archive that `torch.save` writes, as members and where their bytes stand.

Nothing is extracted: names are only looked up. Members are stored as they are, so a tensor is a byte range of the file.
Layout: PKWARE's APPNOTE 6.3, section 4.3.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

from lorakit.errors import InvalidFile, Refused

FILE = b"PK\x03\x04"
_DIRECTORY, _END, _END_64, _LOCATOR_64 = b"PK\x01\x02", b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07"

_LOCAL_HEADER = struct.Struct("<4sHHHHHIIIHH")
_DIRECTORY_HEADER = struct.Struct("<4sHHHHHHIIIHHHHHII")
_END_HEADER = struct.Struct("<4sHHHHIIH")
_END_64_HEADER = struct.Struct("<4sQHHIIQQQQ")
_LOCATOR_64_HEADER = struct.Struct("<4sIQI")
_ZIP64 = 0x0001
_FULL_32 = 0xFFFFFFFF
_ENCRYPTED = 1
_FARTHEST = 1 << 62  # bytes; as far as the system counts, and a header more

MAX_DIRECTORY = 1 << 27  # bytes; a million tensors take 80 MB


@dataclass(frozen=True, slots=True)
class Member:
    """`header` is where its local header begins, from the beginning of the archive; `size` in bytes."""

    header: int
    size: int
    stored: bool


@dataclass(frozen=True, slots=True)
class TorchZip:
    """An open archive; members by their names without the folder that all of them stand in."""

    name: str
    reader: int
    start: int
    end: int
    members: Mapping[str, Member]

    def place(self, name: str) -> tuple[int, int]:
        """Where a member's bytes begin and end in the file.

        Raises:
            InvalidFile: there is none of that name, or its place can't be.
            Refused: it is packed.
        """
        member = self.members.get(name)
        if member is None:
            raise InvalidFile(f"'{self.name}' lacks {name!r}, which its tensors refer to")
        if not member.stored:
            raise Refused(
                f"'{self.name}' is packed or encrypted, which torch.save never does: load it where you trust it, and "
                f"save it again"
            )
        header = _unpacked(_LOCAL_HEADER, self.reader, self.start + member.header)
        if header is None or header[0] != FILE:
            raise InvalidFile(f"'{self.name}' is damaged: {name!r} is not where its directory says")
        begin = self.start + member.header + _LOCAL_HEADER.size + header[-2] + header[-1]
        if begin + member.size > self.end:
            raise InvalidFile(f"'{self.name}' is damaged: {name!r} reaches beyond the members")
        return begin, begin + member.size


def open_torch_zip(stream: BinaryIO, name: str, start: int, end: int) -> TorchZip:
    """Read the directory of the archive between two places of a file.

    Raises:
        InvalidFile: it is cut short, damaged, or no file of torch.save.
        Refused: a name stands twice, or it is a TorchScript program.
    """
    reader = stream.fileno()
    directory, count, at = _directory(reader, name, start, end)
    members: dict[str, Member] = {}
    folder = None
    for path, member in _members(directory, name):
        first, _, rest = path.partition("/")
        folder = first if folder is None else folder
        if first != folder:
            raise InvalidFile(f"'{name}' is a zip archive, but not one that torch.save wrote: it holds {path!r}")
        if rest in members:
            raise Refused(f"'{name}' holds {path!r} twice, and programs would read different ones: refused")
        members[rest] = member
    if len(members) != count:
        raise InvalidFile(f"'{name}' is damaged: its directory has {len(members)} members, and its end says {count}")
    if "constants.pkl" in members:
        raise Refused(f"'{name}' is a TorchScript program, not a checkpoint: save its state_dict() instead")
    if "data.pkl" not in members:
        raise InvalidFile(f"'{name}' is a zip archive, but not one that torch.save wrote: it has no data.pkl")
    return TorchZip(name, reader, start, at, members)


def has_directory(reader: int, start: int, end: int) -> bool:
    """Whether the archive between two places ends as one that is whole does."""
    return _end(reader, start, end) is not None


def _end(reader: int, start: int, end: int) -> tuple[int, int, int, int] | None:
    """Members, size of the directory, where it begins in the archive, where it has to end in the file."""
    at = end - _END_HEADER.size
    found = _unpacked(_END_HEADER, reader, at) if at >= start else None
    if found is None or found[0] != _END or found[-1]:
        return None
    members, size, offset = found[4:7]
    locator = _unpacked(_LOCATOR_64_HEADER, reader, at - _LOCATOR_64_HEADER.size) if at - start >= 76 else None
    if locator is not None and locator[0] == _LOCATOR_64:
        at = start + locator[2]
        wide = _unpacked(_END_64_HEADER, reader, at) if at + _END_64_HEADER.size <= end else None
        if wide is None or wide[0] != _END_64:
            return None
        members, size, offset = wide[7:10]
    return (members, size, offset, at) if start + offset + size == at else None


def _directory(reader: int, name: str, start: int, end: int) -> tuple[bytes, int, int]:
    """The directory's bytes, how many members it has, and where it begins in the file."""
    found = _end(reader, start, end)
    if found is None:
        raise InvalidFile(f"'{name}' is cut short: the directory that torch.save writes last is not there")
    count, size, offset, _ = found
    if size > MAX_DIRECTORY:
        raise Refused(f"'{name}' has a directory of {size >> 20} MB: it is not read")
    return os.pread(reader, size, start + offset), count, start + offset


def _members(directory: bytes, name: str) -> Iterator[tuple[str, Member]]:
    at = 0
    while at < len(directory):
        try:
            fields = _DIRECTORY_HEADER.unpack_from(directory, at)
        except struct.error:
            raise InvalidFile(f"'{name}' is damaged: its directory ends in the middle of a member") from None
        signature, flags, method = fields[0], fields[3], fields[4]
        packed, size, name_length, extra_length, comment_length = fields[8:13]
        at += _DIRECTORY_HEADER.size
        path = directory[at : at + name_length]
        extra = directory[at + name_length : at + name_length + extra_length]
        at += name_length + extra_length + comment_length
        size, packed, header = _wide(extra, size, packed, fields[16])
        if signature != _DIRECTORY or at > len(directory) or _FULL_32 in (size, packed, header):
            raise InvalidFile(f"'{name}' is damaged: its directory can't be read")
        stored = method == 0 and size == packed and not flags & _ENCRYPTED
        yield path.decode("utf-8", "backslashreplace"), Member(header, size, stored)


def _wide(extra: bytes, *numbers: int) -> list[int]:
    """The numbers, those that are all ones replaced from the zip64 field, in which they stand in this order."""
    wide = list(numbers)
    while len(extra) >= 4:
        identity, length = struct.unpack_from("<HH", extra)
        field, extra = extra[4 : 4 + length], extra[4 + length :]
        if identity != _ZIP64:
            continue
        for place, number in enumerate(wide):
            if number == _FULL_32 and len(field) >= 8:
                wide[place] = int.from_bytes(field[:8], "little")
                field = field[8:]
        break
    return wide


def _unpacked(layout: struct.Struct, reader: int, offset: int) -> tuple[Any, ...] | None:
    raw = os.pread(reader, layout.size, offset) if 0 <= offset < _FARTHEST else b""
    return layout.unpack(raw) if len(raw) == layout.size else None
