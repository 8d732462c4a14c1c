"""A checkpoint as an archive, block by block as it is sent: nothing of it is written beside."""

from __future__ import annotations

import io
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from lorakit.checkpoints.moving.manifest import FILE as MANIFEST
from lorakit.checkpoints.moving.manifest import manifest
from lorakit.checkpoints.moving.trees import Hashing, LocalFile
from lorakit.errors import LorakitError
from lorakit.files.archive_bytes import GZIP
from lorakit.files.archive_tar import RECORD
from lorakit.files.archives import Kind

_LEVEL = 1  # weights hardly get smaller
_FIRST_TIME, _LAST_TIME = 315532800, 4354819198  # 1980-01-01 and 2107-12-31, between which a zip can name times


def packed(files: Sequence[LocalFile], kind: Kind, digests: dict[str, str]) -> Iterator[bytes]:
    """The bytes of an archive of the files, the list of their digests last; these are put into `digests`.

    Raises:
        Incomplete: a file was written to meanwhile.
        LorakitError: it shall be packed with zstd, and no library for that is installed.
    """
    match kind:
        case "tar":
            return _tar(files, digests)
        case "tar.gz":
            return _compressed(_tar(files, digests), zlib.compressobj(_LEVEL, wbits=GZIP))
        case "tar.zst":
            return _compressed(_tar(files, digests), _zstandard().ZstdCompressor().compressobj())
        case "zip":
            return _zip(files, digests)


def _contents(files: Sequence[LocalFile], digests: dict[str, str]) -> Iterator[tuple[str, int, int, Iterable[bytes]]]:
    """Name, size, time and bytes of each member; each is to be read to its end before the next."""
    for file in files:
        hashing = Hashing(file.blocks())
        yield file.name, file.size, file.state[1] // 10**9, hashing
        digests[file.name] = hashing.hexdigest()
    listed = manifest(digests).encode()
    newest = max((file.state[1] // 10**9 for file in files), default=0)
    yield MANIFEST, len(listed), newest, (listed,)


def _tar(files: Sequence[LocalFile], digests: dict[str, str]) -> Iterator[bytes]:
    for name, size, modified, blocks in _contents(files, digests):
        info = tarfile.TarInfo(name)
        info.size, info.mtime, info.mode = size, modified, 0o644
        yield info.tobuf(tarfile.PAX_FORMAT, "utf-8", "strict")
        yield from blocks
        yield bytes(-size % RECORD)
    yield bytes(2 * RECORD)


def _compressed(blocks: Iterable[bytes], compressor: Any) -> Iterator[bytes]:
    for block in blocks:
        if piece := compressor.compress(block):
            yield piece
    yield compressor.flush()


def _zip(files: Sequence[LocalFile], digests: dict[str, str]) -> Iterator[bytes]:
    pipe = _Pipe()
    with zipfile.ZipFile(pipe, "w", zipfile.ZIP_DEFLATED, compresslevel=_LEVEL) as archive:
        for name, size, modified, blocks in _contents(files, digests):
            info = zipfile.ZipInfo(name, _zip_time(modified))
            info.compress_type, info.file_size, info.external_attr = zipfile.ZIP_DEFLATED, size, 0o100644 << 16
            with archive.open(info, "w", force_zip64=size >= 1 << 31) as member:
                for block in blocks:
                    member.write(block)
                    yield pipe.taken()
    yield pipe.taken()


class _Pipe(io.RawIOBase):
    """What is written, until it is taken; it can't be gone back in."""

    def __init__(self) -> None:
        self._written = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, block: Any, /) -> int:
        self._written += block
        return len(block)

    def taken(self) -> bytes:
        taken, self._written = bytes(self._written), bytearray()
        return taken


def _zip_time(seconds: int) -> tuple[int, int, int, int, int, int]:
    import time

    moment = time.gmtime(min(max(_FIRST_TIME, seconds), _LAST_TIME))
    return moment[0], moment[1], moment[2], moment[3], moment[4], moment[5]


def _zstandard() -> Any:
    try:
        import zstandard
    except ImportError:
        raise LorakitError(
            "packing with zstd needs a library: pip install 'lorakit[zstd]', or name a .tar.gz"
        ) from None
    return zstandard
