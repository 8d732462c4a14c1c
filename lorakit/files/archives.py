"""Archives unpacked as they arrive, in one pass and without a second copy; hostile until shown otherwise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lorakit.errors import InvalidFile
from lorakit.files.archive_bytes import Arriving, Bytes, ByteStream, Inflation, Limits
from lorakit.files.archive_members import Members, shown
from lorakit.files.archive_tar import RECORD, extract_tar, is_tar_header
from lorakit.files.archive_zip import FILE, extract_zip

__all__ = ["Extracted", "Kind", "Limits", "extract_stream"]

Kind = Literal["tar", "tar.gz", "tar.zst", "zip"]
_BEGINNINGS: dict[bytes, Kind] = {b"\x1f\x8b": "tar.gz", b"\x28\xb5\x2f\xfd": "tar.zst", FILE: "zip"}


@dataclass(frozen=True, slots=True)
class Extracted:
    """What came out of an archive.

    Attributes:
        kind: What the archive was.
        files: Names of the files below the folder, in the archive's order.
        bytes: Of all the files.
        sha256: Of the archive itself.
    """

    kind: Kind
    files: tuple[str, ...]
    bytes: int
    sha256: str


def extract_stream(
    stream: ByteStream,
    into: Path,
    *,
    kind: Kind | None = None,
    limits: Limits | None = None,
    progress: Callable[[int], None] | None = None,
) -> Extracted:
    """Unpack an archive below `into`, a folder of the caller's, to be thrown away after an error.

    The stream is read to its end. Files and folders get the modes that the umask gives to new ones, whatever the
    archive says; archives inside the archive stay as they are. At most a few MiB are in memory at any moment.

    Args:
        stream: Read from front to back, once.
        kind: What the archive has to be; None takes what its first bytes say.
        progress: Called with the bytes of the archive that were read so far.

    Raises:
        InvalidFile: it is no archive of that kind, is damaged or truncated, contradicts itself, holds no files, or
            something stands behind its end.
        Refused: a member is a link or a device, has a name that is not plain or that another one has, or the archive
            comes to more than the limits.
        LorakitError: it is compressed with zstd, and no library for that is installed.
    """
    limits = limits or Limits()
    arriving = Arriving(stream, limits, progress)
    archive = Bytes(iter(arriving))
    found = _kind(archive.peek(RECORD))
    if kind is not None and kind != found:
        raise InvalidFile(f"the archive should be {kind}, and is {found}: name it as what it is")
    members = Members(into, limits)
    inflation = Inflation(archive, limits)
    match found:
        case "zip":
            extract_zip(archive, members, inflation)
        case "tar":
            extract_tar(archive, members)
        case "tar.gz":
            extract_tar(Bytes(inflation.gunzipped()), members)
        case "tar.zst":
            extract_tar(Bytes(inflation.unzstandarded()), members)
    if not members.files:
        raise InvalidFile("the archive holds no files")
    return Extracted(found, tuple(members.files), members.bytes, arriving.sha256())


def _kind(beginning: bytes) -> Kind:
    for magic, kind in _BEGINNINGS.items():
        if beginning.startswith(magic):
            return kind
    if is_tar_header(beginning):
        return "tar"
    raise InvalidFile(
        f"this is no archive that can be read: it begins with {shown(beginning[:16])}; lorakit "
        f"reads .tar, .tar.gz, .tar.zst and .zip"
    )
