"""A tar archive, read as it arrives: ustar, GNU and pax headers, files and folders only.

Not Python's `tarfile`: what it does with hostile headers differs between Python's versions (CVE-2025-4517 gets around
its data filter, CVE-2025-8194 never ends), and it takes headers of any size into memory.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from lorakit.errors import InvalidFile, Refused
from lorakit.files.archive_bytes import Bytes
from lorakit.files.archive_members import Members, shown

RECORD = 512
_EMPTY = bytes(RECORD)
_MAX_EXTENSION = 1 << 20  # bytes of a pax header or a GNU long name
_MAX_USTAR_SIZE = 8**11 - 1

_FILE, _OLD_FILE, _FOLDER = b"0", b"\0", b"5"
_PAX, _PAX_GLOBAL, _GNU_NAME = b"x", b"g", b"L"
_REFUSED_TYPES = {
    b"1": "is a hard link",
    b"2": "is a symbolic link",
    b"3": "is a character device",
    b"4": "is a block device",
    b"6": "is a fifo",
    b"S": "is a sparse file",
    b"K": "is a link",
    b"M": "is a part of a file that begins in another archive",
}


@dataclass(frozen=True, slots=True)
class _Header:
    """One header record. `name` is raw, `size` what follows it in bytes, `written` in seconds since 1970."""

    kind: bytes
    name: bytes
    size: int
    written: float | None


@dataclass(slots=True)
class _Extensions:
    """What the headers before a member say of it."""

    name: bytes | None = None
    pax: dict[bytes, bytes] = field(default_factory=dict)


def is_tar_header(record: bytes) -> bool:
    """Whether the record's checksum is right, as in every tar header since the seventh edition of Unix."""
    try:
        return len(record) == RECORD and _number(record[148:156]) == _checksum(record)
    except ValueError:
        return False


def extract_tar(archive: Bytes, members: Members) -> None:
    """Write the archive's files and folders.

    Behind the two empty records that end it, only zeros may follow: another archive there is seen by some programs and
    not by others.

    Raises:
        InvalidFile: a header is damaged or contradicts itself, the archive is truncated, or something follows its end.
        Refused: a member is neither a file nor a folder, or has a name or a size that is not allowed.
    """
    extensions = _Extensions()
    while (record := archive.exactly(RECORD, "the archive")) != _EMPTY:
        header = _header(record)
        members.announce()
        if header.kind in (_PAX, _PAX_GLOBAL, _GNU_NAME):
            _extend(extensions, header, archive)
            continue
        _extract_member(header, extensions, archive, members)
        extensions = _Extensions()
    if extensions != _Extensions():
        raise InvalidFile("the archive ends behind a header that belongs to a member: it is damaged")
    if archive.exactly(RECORD, "the archive") != _EMPTY:
        raise InvalidFile("the archive goes on behind an empty record: it is damaged")
    while padding := archive.some(1 << 16):
        if padding.strip(b"\0"):
            raise InvalidFile("something stands behind the end of the archive: refused")


def _extract_member(header: _Header, extensions: _Extensions, archive: Bytes, members: Members) -> None:
    name = _name(header, extensions)
    if header.kind not in (_FILE, _OLD_FILE, _FOLDER):
        reason = _REFUSED_TYPES.get(header.kind, f"is of the unknown type {header.kind!r}")
        raise Refused(
            f"the archive's member {shown(name)} {reason}: only files and folders are taken; make the archive with "
            f"tar --dereference, without --sparse"
        )
    if b"linkpath" in extensions.pax:
        raise Refused(f"the archive's member {shown(name)} has the target of a link, and is none: refused")
    size = _size(header, extensions, name)
    if header.kind == _FOLDER:
        if size:
            raise InvalidFile(f"the archive's member {shown(name)} is a folder of {size} bytes: it is damaged")
        members.folder(name)
        return
    members.file(name, archive.blocks(size, shown(name)), size, _written(header, extensions))
    archive.exactly(-size % RECORD, shown(name))


def _header(record: bytes) -> _Header:
    if not is_tar_header(record):
        raise InvalidFile("the archive has no tar header where one has to be: it is damaged, fetch it again")
    name = _text(record[:100])
    if record[257:263] == b"ustar\0" and (prefix := _text(record[345:500])):
        name = prefix + b"/" + name
    try:
        size = _number(record[124:136])
    except ValueError:
        raise InvalidFile(f"the archive's member {shown(name)} has no size that can be read: it is damaged") from None
    try:
        written = _number(record[136:148])
    except ValueError:
        written = None
    return _Header(record[156:157], name, size, written)


def _name(header: _Header, extensions: _Extensions) -> str:
    names = [name for name in (extensions.name, extensions.pax.get(b"path")) if name is not None]
    if len(names) > 1:
        raise Refused(f"the archive's member {shown(header.name)} has several long names: refused")
    raw = names[0] if names else header.name
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise Refused(f"the archive's member {shown(raw)} has a name that is not UTF-8: refused") from None


def _size(header: _Header, extensions: _Extensions, name: str) -> int:
    """A pax size counts where the header has no room for it; elsewhere programs differ in which of two they believe."""
    raw = extensions.pax.get(b"size")
    if raw is None:
        return header.size
    if not raw.isdigit() or len(raw) > 19:
        raise InvalidFile(f"the archive's member {shown(name)} has no size that can be read: it is damaged")
    if int(raw) != header.size and int(raw) <= _MAX_USTAR_SIZE:
        raise Refused(f"the archive's member {shown(name)} has two sizes, {header.size} and {int(raw)}: refused")
    return int(raw)


def _written(header: _Header, extensions: _Extensions) -> float | None:
    """The time of a member; where it can't be read, none."""
    raw = extensions.pax.get(b"mtime")
    if raw is None:
        return header.written
    return float(raw) if re.fullmatch(rb"\d{1,15}(\.\d{0,15})?", raw) else None


def _extend(extensions: _Extensions, header: _Header, archive: Bytes) -> None:
    if header.size > _MAX_EXTENSION:
        raise Refused(
            f"the archive has a header of {header.size} bytes, more than the {_MAX_EXTENSION} that are allowed"
        )
    content = archive.exactly(header.size, "a header")
    archive.exactly(-header.size % RECORD, "a header")
    if header.kind == _GNU_NAME:
        if extensions.name is not None:
            raise Refused("a member of the archive has several long names: refused")
        extensions.name = content.removesuffix(b"\0")
        return
    pax = _pax(content)
    if strange := sorted(key for key in pax if key.startswith(b"GNU.sparse.") or key == b"SCHILY.realsize"):
        raise Refused(f"the archive has sparse files ({shown(strange[0])}): make it with tar without --sparse")
    if header.kind == _PAX_GLOBAL:
        if b"path" in pax or b"size" in pax or b"linkpath" in pax:
            raise Refused("the archive has one name or size for all its members: refused")
        return
    if extensions.pax:
        raise Refused("a member of the archive has several pax headers: refused")
    extensions.pax = pax


def _pax(content: bytes) -> dict[bytes, bytes]:
    """The records `length key=value\\n` of a pax header (POSIX.1-2001, pax, "Extended Header")."""
    records: dict[bytes, bytes] = {}
    start = 0
    while start < len(content):
        digits, _, _ = content[start : start + 8].partition(b" ")
        end = start + int(digits) if digits.isdigit() else start
        key, found, value = content[start + len(digits) + 1 : end - 1].partition(b"=")
        if end > len(content) or content[end - 1 : end] != b"\n" or not found or not key or key in records:
            raise InvalidFile("the archive has a pax header that can't be read: it is damaged")
        records[key] = value
        start = end
    return records


def _number(raw: bytes) -> int:
    """Octal digits, or base 256 where the first bit is set, as GNU tar writes what octal has no room for.

    Raises:
        ValueError: it is neither, or below zero.
    """
    if raw[0] == 0x80:
        return int.from_bytes(raw[1:])
    digits = raw.strip(b" \0")
    if digits.strip(b"01234567"):
        raise ValueError
    return int(digits or b"0", 8)


def _checksum(record: bytes) -> int:
    return sum(record[:148]) + sum(record[156:]) + 8 * ord(" ")


def _text(raw: bytes) -> bytes:
    return raw.partition(b"\0")[0]
