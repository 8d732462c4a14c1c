"""A zip archive, read as it arrives: file by file from the local headers, then held against the central directory.

The directory stands at the end of a zip, and it is what most programs believe. A file here begins where the one before
it ends, and the directory has to say of each the same place, name, sizes and CRC: so files can't overlap, nothing hides
between them, and no program sees others than were written. Layout: PKWARE's APPNOTE 6.3, section 4.3.
"""

from __future__ import annotations

import stat
import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

from lorakit.errors import InvalidFile, Refused
from lorakit.files.archive_bytes import BLOCK, RAW_DEFLATE, Bytes, Inflation
from lorakit.files.archive_members import Members, shown

FILE, _DIRECTORY, _END = b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06"
_DESCRIPTOR, _END_64, _LOCATOR_64 = b"PK\x07\x08", b"PK\x06\x06", b"PK\x06\x07"

_LOCAL_HEADER = struct.Struct("<HHHHHIIIHH")  # all without their first four bytes
_DIRECTORY_HEADER = struct.Struct("<HHHHHHIIIHHHHHII")
_END_HEADER = struct.Struct("<HHHHIIH")
_END_64_HEADER = struct.Struct("<QHHIIQQQQ")
_LOCATOR_64_HEADER = struct.Struct("<IQI")
_NARROW_DESCRIPTOR, _WIDE_DESCRIPTOR = struct.Struct("<III"), struct.Struct("<IQQ")

_STORED, _DEFLATED = 0, 8
_HAS_DESCRIPTOR, _UTF8 = 1 << 3, 1 << 11
_KNOWN_FLAGS = _HAS_DESCRIPTOR | _UTF8 | 1 << 1 | 1 << 2  # the two last say how hard the compressor tried
_ZIP64, _TIMESTAMP, _OTHER_NAME = 0x0001, 0x5455, 0x7075
_FULL_32, _FULL_16 = 0xFFFFFFFF, 0xFFFF


@dataclass(frozen=True, slots=True)
class _Entry:
    """A member as its local header and its bytes have it; `packed` and `size` in bytes."""

    name: bytes
    flags: int
    method: int
    crc: int
    packed: int
    size: int


class _Checked:
    """Blocks, with the CRC-32 of those that went by."""

    def __init__(self, blocks: Iterable[bytes]) -> None:
        self._blocks = blocks
        self.crc = 0

    def __iter__(self) -> Iterator[bytes]:
        for block in self._blocks:
            self.crc = zlib.crc32(block, self.crc)
            yield block


def extract_zip(archive: Bytes, members: Members, inflation: Inflation) -> None:
    """Write the archive's files and folders; a link is a plain file till the directory at the end tells.

    Raises:
        InvalidFile: it is damaged or truncated, its two lists of members differ, or something follows its end.
        Refused: a member is neither a file nor a folder, is encrypted or packed in an unknown way, or has a name or a
            size that is not allowed.
    """
    entries: dict[int, _Entry] = {}
    while (signature := archive.exactly(4, "the archive")) == FILE:
        members.announce()
        start = archive.position - 4
        entries[start] = _extract_entry(archive, members, inflation)
    directory = archive.position - 4
    listed = len(entries)
    while signature == _DIRECTORY:
        _check_listed(archive, entries)
        signature = archive.exactly(4, "the archive's directory")
    if entries and signature in (_END, _END_64):
        missing = next(iter(entries.values()))
        raise InvalidFile(f"the archive's member {shown(missing.name)} is not in its directory: refused")
    _check_end(archive, signature, listed, directory)


def _extract_entry(archive: Bytes, members: Members, inflation: Inflation) -> _Entry:
    _, flags, method, clock, day, crc, packed, size, name_length, extra_length = _taken(archive, _LOCAL_HEADER)
    raw = archive.exactly(name_length, "a name")
    extra = _extra_fields(archive.exactly(extra_length, "a header"), raw)
    name = _name(raw, flags, extra)
    if flags & ~_KNOWN_FLAGS:
        raise Refused(
            f"the archive's member {shown(name)} is encrypted or of an unknown kind (flags {flags:#x}): refused"
        )
    if method not in (_STORED, _DEFLATED):
        raise Refused(
            f"the archive's member {shown(name)} is packed by method {method}: only stored and deflated ones are taken"
        )
    if _ZIP64 in extra:
        size, packed = _wide(extra[_ZIP64], name, size, packed)
    later = bool(flags & _HAS_DESCRIPTOR)
    started = archive.position
    if method == _DEFLATED:
        content = _Checked(inflation.inflated(RAW_DEFLATE, shown(name)))
    elif later and not packed:
        content = _Checked(_up_to_descriptor(archive, shown(name), wide=_ZIP64 in extra))
    else:
        content = _Checked(archive.blocks(packed, shown(name)))
    known = None if later and not size else size
    written = _written(members, name, content, known, _time(clock, day, extra))
    found = _Entry(raw, flags, method, content.crc, archive.position - started, written)
    said = (crc, packed, written if known is None else known)
    if later:
        if said[0] not in (0, found.crc) or said[1] not in (0, found.packed):
            raise InvalidFile(f"the archive's member {shown(name)} is not what its header says: it is damaged")
        said = _descriptor(archive, wide=_ZIP64 in extra or max(found.packed, found.size) > _FULL_32)
    if said != (found.crc, found.packed, found.size):
        raise InvalidFile(f"the archive's member {shown(name)} is not what its header says: it is damaged")
    return found


def _written(members: Members, name: str, content: _Checked, size: int | None, moment: float | None) -> int:
    if not name.endswith("/"):
        return members.file(name, content, size, moment)
    if size or any(content):
        raise InvalidFile(f"the archive's member {shown(name)} is a folder with bytes of its own: refused")
    members.folder(name)
    return 0


def _time(clock: int, day: int, extra: dict[int, bytes]) -> float | None:
    """In seconds since 1970: of the extended time stamp, else of the two words that know no time zone (as if UTC)."""
    stamp = extra.get(_TIMESTAMP, b"")
    if len(stamp) >= 5 and stamp[0] & 1:
        return int.from_bytes(stamp[1:5], "little")
    try:
        said = datetime(
            1980 + (day >> 9), day >> 5 & 15, day & 31, clock >> 11, clock >> 5 & 63, (clock & 31) * 2, tzinfo=UTC
        )
    except ValueError:
        return None
    return said.timestamp()


def _descriptor(archive: Bytes, *, wide: bool) -> tuple[int, int, int]:
    """CRC, packed size and size, as they stand behind a member whose header did not know them yet."""
    if archive.exactly(4, "the archive") != _DESCRIPTOR:
        raise InvalidFile("a member of the archive has no sizes behind it: it is damaged")
    crc, packed, size = _taken(archive, _WIDE_DESCRIPTOR if wide else _NARROW_DESCRIPTOR)
    return crc, packed, size


def _up_to_descriptor(archive: Bytes, what: str, *, wide: bool) -> Iterator[bytes]:
    """A stored file whose size stands behind it: it ends where a descriptor has the CRC and the length of what went by.

    A file may hold such a thing by intent; then what follows is no member, or is none that the directory names.
    """
    crc = size = 0
    longest = 4 + _WIDE_DESCRIPTOR.size
    while len(archive.peek(longest)) == longest:
        block = archive.some(BLOCK)
        at = block.find(_DESCRIPTOR)
        while 0 <= at <= len(block) - longest:
            layout = _WIDE_DESCRIPTOR if wide or size + at > _FULL_32 else _NARROW_DESCRIPTOR
            said = layout.unpack_from(block, at + 4)
            if said[1:] == (size + at, size + at) and said[0] == zlib.crc32(block[:at], crc):
                archive.put_back(len(block) - at)
                yield block[:at]
                return
            at = block.find(_DESCRIPTOR, at + 1)
        archive.put_back(longest - 1)  # a descriptor may have begun in these
        block = block[: 1 - longest]
        crc, size = zlib.crc32(block, crc), size + len(block)
        yield block
    raise InvalidFile(f"the archive ends inside {what}: it is truncated, fetch it again")


def _check_listed(archive: Bytes, entries: dict[int, _Entry]) -> None:
    """Take one member of the directory out of `entries`, where it has to be as it is here."""
    (
        _,
        _,
        flags,
        method,
        _,
        _,
        crc,
        packed,
        size,
        name_length,
        extra_length,
        comment_length,
        _,
        _,
        attributes,
        start,
    ) = _taken(archive, _DIRECTORY_HEADER)
    raw = archive.exactly(name_length, "the archive's directory")
    extra = _extra_fields(archive.exactly(extra_length, "the archive's directory"), raw)
    archive.exactly(comment_length, "the archive's directory")
    name = _name(raw, flags, extra)
    if _ZIP64 in extra:
        size, packed, start = _wide(extra[_ZIP64], name, size, packed, start)
    entry = entries.pop(start, None)
    if entry is None:
        raise InvalidFile(f"the archive's directory names {shown(name)} where no member begins, or twice: refused")
    same_name = entry.name == raw and entry.flags & _UTF8 == flags & _UTF8
    if not same_name or (entry.method, entry.crc, entry.packed, entry.size) != (method, crc, packed, size):
        raise InvalidFile(
            f"the archive's directory says other things of {shown(name)} than stand at its place, {shown(entry.name)}: "
            f"refused"
        )
    kind = stat.S_IFMT(attributes >> 16)
    if kind not in (0, stat.S_IFDIR if name.endswith("/") else stat.S_IFREG):
        reason = "is a symbolic link" if kind == stat.S_IFLNK else f"is of the kind {kind:#o}"
        raise Refused(f"the archive's member {shown(name)} {reason}: only files and folders are taken")


def _check_end(archive: Bytes, signature: bytes, listed: int, directory: int) -> None:
    """The records behind the directory, which say how many members it has and where it stands."""
    truth = (0, 0, listed, listed, archive.position - 4 - directory, directory)
    full = (_FULL_16, _FULL_16, _FULL_16, _FULL_16, _FULL_32, _FULL_32)
    wide = signature == _END_64
    if wide:
        end = archive.position - 4
        length, _, _, *said = _taken(archive, _END_64_HEADER)
        archive.exactly(_rest(length), "the archive's end")
        located = archive.exactly(4, "the archive's end"), *_taken(archive, _LOCATOR_64_HEADER)
        if tuple(said) != truth or located != (_LOCATOR_64, 0, end, 1):
            raise InvalidFile("the archive's end says other things than the archive holds: it is damaged")
        signature = archive.exactly(4, "the archive's end")
    if signature != _END:
        raise InvalidFile("the archive has something else where a member or its end has to be: it is damaged")
    *short, comment_length = _taken(archive, _END_HEADER)
    if any(one != true and not (wide and one == most) for one, true, most in zip(short, truth, full, strict=True)):
        raise InvalidFile("the archive's end says other things than the archive holds: it is damaged")
    archive.exactly(comment_length, "the archive's comment")
    if not archive.at_end():
        raise InvalidFile("something stands behind the end of the archive: refused")


def _rest(length: int) -> int:
    """What follows the known part of the long end record, whose length counts from behind itself."""
    rest = length - (_END_64_HEADER.size - 8)
    if not 0 <= rest <= _FULL_16:
        raise InvalidFile("the archive's end has no length that can be: it is damaged")
    return rest


def _taken(archive: Bytes, layout: struct.Struct) -> tuple[int, ...]:
    return layout.unpack(archive.exactly(layout.size, "a header"))


def _extra_fields(extra: bytes, name: bytes) -> dict[int, bytes]:
    """The blocks `id, length, content` behind a name; up to three bytes may be left, which some writers align with."""
    fields: dict[int, bytes] = {}
    while len(extra) >= 4:
        identity, length = struct.unpack_from("<HH", extra)
        if length > len(extra) - 4 or (identity == _ZIP64 and identity in fields):
            raise InvalidFile(f"the archive's member {shown(name)} has extra fields that can't be read: it is damaged")
        fields[identity] = extra[4 : 4 + length]
        extra = extra[4 + length :]
    return fields


def _wide(field: bytes, name: str, *numbers: int) -> tuple[int, ...]:
    """The numbers, those that are all ones replaced from the zip64 field, in which they stand in this order."""
    wide = list(numbers)
    for place, number in enumerate(numbers):
        if number == _FULL_32:
            if len(field) < 8:
                raise InvalidFile(f"the archive's member {shown(name)} has no size that can be read: it is damaged")
            wide[place] = int.from_bytes(field[:8], "little")
            field = field[8:]
    return tuple(wide)


def _name(raw: bytes, flags: int, extra: dict[int, bytes]) -> str:
    """Raises Refused where programs would read different names."""
    if extra.get(_OTHER_NAME, bytes(5) + raw)[5:] != raw or not (raw.isascii() or flags & _UTF8):
        raise Refused(
            f"the archive's member {shown(raw)} has a second name, or one that is not marked as UTF-8: refused; zip it "
            f"with plain names"
        )
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise Refused(f"the archive's member {shown(raw)} has a name that is not UTF-8: refused") from None
