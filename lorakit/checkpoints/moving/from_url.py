"""One URL into a folder: an archive is unpacked as it arrives, a single file stays one, and goes on after a crash."""

from __future__ import annotations

import base64
import os
import shutil
import stat
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.checkpoints.moving.addresses import Address, archive_named
from lorakit.checkpoints.moving.answers import NotLetIn, Said, refusal, said_in
from lorakit.checkpoints.moving.download import Download, Patience, StartAgain, beginning_of, client_for, sent
from lorakit.errors import InvalidFile, LorakitError, OutOfSpace, Refused, UsageError, disk_errors_named
from lorakit.files.archive_bytes import BLOCK, Bytes, Inflation
from lorakit.files.archive_members import safe_parts
from lorakit.files.archive_tar import RECORD, is_tar_header
from lorakit.files.archives import Kind, Limits, extract_stream
from lorakit.files.folders import free_bytes, read_json, sync_folder, write_json
from lorakit.files.safetensors import read_header

if TYPE_CHECKING:
    import httpx

PART = ".lorakit-part.json"
_AGAIN = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW = _AGAIN | os.O_CREAT | os.O_EXCL
_SYNCED_EVERY = 16 << 20  # bytes that a crash may cost
_FILES = (".safetensors", ".ckpt", ".pt", ".pth", ".pt2", ".npz", ".npy", ".gguf", ".json", ".keras", ".onnx", ".whl")
_MAGIC: dict[bytes, Kind] = {b"\x1f\x8b": "tar.gz", b"\x28\xb5\x2f\xfd": "tar.zst", b"PK\x03\x04": "zip"}

Progress = Callable[[int, int | None], None]


@dataclass(frozen=True, slots=True)
class Arrived:
    """What came.

    Attributes:
        kind: Of the archive that it was; None for a single file.
        files: Names below the folder.
        bytes: Of all the files.
        sha256: Of the archive or the file itself, as it travelled.
        digests: Of the files by name, where they were taken already.
        commit: Of the hub's repository.
        resumed: How often it was gone on with.
        notes: What a person should know.
    """

    kind: Kind | None
    files: tuple[str, ...]
    bytes: int
    sha256: str | None
    digests: Mapping[str, str] | None = None
    commit: str | None = None
    resumed: int = 0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Ahead:
    """What would come: `kind` is "archive" or "file"; `resumable` if a broken connection can be gone on with."""

    name: str
    kind: str
    size: int | None
    resumable: bool


class Body:
    """What a download carries, out of what it is packed in for travelling."""

    def __init__(self, download: Download, limits: Limits) -> None:
        self._bytes = Bytes(_blocks(download))
        if download.said.encoding:
            inflation = Inflation(self._bytes, limits)
            packed = download.said.encoding == "zstd"
            self._bytes = Bytes(inflation.unzstandarded() if packed else inflation.gunzipped())

    def peek(self, size: int) -> bytes:
        return self._bytes.peek(size)

    def read(self, size: int, /) -> bytes:
        return self._bytes.some(size)


def _blocks(download: Download) -> Iterator[bytes]:
    while block := download.read(BLOCK):
        yield block


def look_ahead(address: Address, patience: Patience) -> Ahead:
    """Ask for the first bytes alone, by GET: a URL that is signed for that answers nothing else.

    Raises:
        NotFound, Refused, LorakitError: as `refusal`.
    """
    import httpx

    with client_for(patience) as client:
        try:
            with closing(sent(client, address.text, {"range": f"bytes=0-{RECORD - 1}"})) as answer:
                status = answer.status_code
                if status not in (200, 206, 416):
                    raise refusal(status, beginning_of(answer), str(answer.request.url), address.text)
                said = said_in(status, answer.headers) if status != 416 else Said()
                beginning = b"" if status == 416 else next(answer.iter_raw(RECORD), b"")
        except httpx.HTTPError:
            raise LorakitError(f"'{address.shown}' can't be reached: try again later") from None
    name = said.name or address.name
    kind = "archive" if is_archive(name, beginning) else "file"
    return Ahead(name, kind, said.size, bool(said.condition()) and said.parts)


def fetch_url(
    address: Address, folder: Path, *, limits: Limits, patience: Patience, sha256: str | None,
    progress: Progress | None, through: httpx.BaseTransport | None = None,
) -> Arrived:  # fmt: skip
    """Fill `folder`, which may hold what a killed call for the same address left: see `is_begun`.

    Raises:
        NotFound, Refused, LorakitError: as `Download`, or as `extract_stream`.
        InvalidFile: what came is damaged, cut short, or not of the digest that it should have.
    """
    notes: list[str] = []
    with client_for(patience, through) as client:
        for attempt in count(1):
            try:
                arrived, digests = _fetch_once(client, address, folder, limits, patience, progress)
            except StartAgain as reason:
                if attempt == (2 if reason.changed else patience.tries):
                    raise LorakitError(f"'{address.shown}': {reason}, {attempt} times: try again later") from None
                notes.append(f"{reason}: it was begun again")
                _clear(folder)
            except NotLetIn:
                raise
            except Refused:  # what is damaged, or too large, is not gone on with
                _clear(folder)
                raise
            else:
                break
    if sha256 is not None and sha256 not in digests:
        _clear(folder)
        raise InvalidFile(
            f"'{address.shown}': its sha256 is {digests[0]}, and should be {sha256}: it is damaged, or another one"
        )
    (folder / PART).unlink(missing_ok=True)
    return replace(arrived, notes=tuple(notes))


def _fetch_once(
    client: httpx.Client, address: Address, folder: Path, limits: Limits, patience: Patience, progress: Progress | None
) -> tuple[Arrived, list[str]]:
    """And the digests that may be meant by "its sha256": as it travelled, and unpacked from what it travelled in."""
    part = _part(folder, address)
    download = Download(
        client, address.text, patience, start=part.count if part else 0, known=part.said if part else None,
        before=part.blocks if part else tuple, progress=progress,
    )  # fmt: skip
    with closing(download):
        body = Body(download, limits)
        name = part.file.name if part else download.said.name or address.name
        if part is None and is_archive(name, body.peek(RECORD)):
            try:
                extracted = extract_stream(body, folder, limits=limits)
            except BaseException:
                _clear(folder)  # whatever an archive holds, it is not gone on with
                raise
            arrived = Arrived(
                extracted.kind, extracted.files, extracted.bytes, download.sha256(), resumed=download.resumed
            )
            return arrived, [download.sha256(), extracted.sha256]
        file = part.file if part else folder / _plain(name)
        _write(download, body, file, address, limits)
    size = file.stat().st_size
    if file.suffix == ".safetensors":
        read_header(file)
    arrived = Arrived(None, (file.name,), size, download.sha256(), resumed=download.resumed)
    if download.said.encoding:
        from lorakit.files.digests import file_digest

        return arrived, [download.sha256(), file_digest(file)]
    return arrived, [download.sha256()]


def is_archive(name: str, beginning: bytes) -> bool:
    """By the name where it says so, else by the first bytes. What torch.save writes is a zip file, and one file."""
    if archive_named(name) is not None:
        return True
    if name.lower().endswith(_FILES):
        return False
    if any(beginning.startswith(magic) for magic in _MAGIC):
        inside = beginning[30 : 30 + int.from_bytes(beginning[26:28], "little")]
        return not (beginning.startswith(b"PK") and inside.endswith((b"/data.pkl", b"/.format_version", b"/version")))
    return is_tar_header(beginning)


def ensure_allowed(size: int, limits: Limits, shown: str) -> None:
    """Raises Refused when it comes to more bytes than it may."""
    if size > limits.max_bytes:
        raise Refused(
            f"'{shown}' is larger than the {limits.max_bytes} bytes that are allowed: raise --max-size if it is to be "
            f"trusted"
        )


def refuse_one_digest(sha256: str | None, address: Address) -> None:
    """Raises UsageError for a digest that nothing has."""
    if sha256 is not None:
        raise UsageError(f"'{address.shown}' is a folder, which has no one sha256: leave --sha256 out")


def _plain(name: str) -> str:
    try:
        parts = safe_parts(name, Limits())
    except Refused:
        parts = ()
    return parts[0] if len(parts) == 1 and not parts[0].startswith(".") else "download"


# a single file, and what is left of one


@dataclass(frozen=True, slots=True)
class _Part:
    """The first `count` bytes of a file, which are on the disk for good, and what the server said of the whole."""

    file: Path
    count: int
    said: Said

    def blocks(self) -> Iterator[bytes]:
        with self.file.open("rb") as stream:
            left = self.count
            while left and (block := stream.read(min(BLOCK, left))):
                left -= len(block)
                yield block


def is_begun(folder: Path, address: Address) -> bool:
    """Whether a killed call left the beginning of this very file there."""
    return _part(folder, address) is not None


def _part(folder: Path, address: Address) -> _Part | None:
    try:
        record = read_json(folder / PART)
        said = Said(
            **{**record["said"], "digests": tuple((a, base64.b64decode(b)) for a, b in record["said"]["digests"])}
        )
        part = _Part(folder / _plain(record["name"]), int(record["bytes"]), said)
        there = part.file.lstat()
        mine = stat.S_ISREG(there.st_mode) and there.st_uid == os.geteuid()
    except (InvalidFile, OSError, KeyError, TypeError, ValueError):
        return None
    same = record["address"] == address.shown and bool(said.condition()) and mine and 0 < part.count <= there.st_size
    return part if same else None


def _write(download: Download, body: Body, file: Path, address: Address, limits: Limits) -> None:
    """What is left of the body, behind what the file holds already."""
    at = synced = download.position if file.exists() else 0
    size = download.said.size
    if size is not None and not download.said.encoding:
        ensure_allowed(size, limits, address.shown)
    if size is not None and not download.said.encoding and size - at > free_bytes(file.parent):
        raise OutOfSpace(
            f"'{address.shown}' needs {(size - at) / 1e9:.1f} GB more, and {free_bytes(file.parent) / 1e9:.1f} GB are "
            f"free: free some space or name another --out"
        )
    with disk_errors_named(file), os.fdopen(os.open(file, _AGAIN if at else _NEW, 0o666), "r+b") as writer:
        writer.truncate(at)
        writer.seek(at)
        try:
            while block := body.read(BLOCK):
                at += len(block)
                ensure_allowed(at, limits, address.shown)
                writer.write(block)
                if at - synced >= _SYNCED_EVERY:
                    synced = _remember(writer, at, file, address, download.said)
        except OSError:
            (file.parent / PART).unlink(missing_ok=True)  # a full disk: leave nothing on it
            raise
        except (KeyboardInterrupt, LorakitError) as error:
            if at > synced and (isinstance(error, NotLetIn) or not isinstance(error, Refused)):
                with suppress(OSError):
                    _remember(writer, at, file, address, download.said)
            raise


def _remember(writer: Any, at: int, file: Path, address: Address, said: Said) -> int:
    """Say that the bytes up to `at` are there, once they are."""
    if said.encoding or not said.condition():
        return at
    writer.flush()
    os.fsync(writer.fileno())
    digests = [[name, base64.b64encode(digest).decode()] for name, digest in said.digests]
    record = {"address": address.shown, "name": file.name, "bytes": at, "said": {**asdict(said), "digests": digests}}
    write_json(file.parent / f"{PART}.new", record)
    os.replace(file.parent / f"{PART}.new", file.parent / PART)
    sync_folder(file.parent)
    return at


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def innermost(folder: Path) -> Path:
    """The folder that everything is in: of several, each alone in the one above, the last."""
    inside = list(folder.iterdir())
    return innermost(inside[0]) if len(inside) == 1 and inside[0].is_dir() else folder


def unwrap(folder: Path) -> str | None:
    """Take what lies in the innermost folder up into this one: its path below, where it was another."""
    found = innermost(folder)
    if found == folder:
        return None
    below = found.relative_to(folder)
    aside = found.rename(folder / f".{uuid.uuid4().hex}")  # it may hold something of a name on the way
    shutil.rmtree(folder / below.parts[0], ignore_errors=True)
    for path in aside.iterdir():
        path.rename(folder / path.name)
    aside.rmdir()
    return below.as_posix()
