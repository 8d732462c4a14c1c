"""The bytes of an archive as they arrive: read once from front to back, inflated in small blocks, within limits."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from lorakit.errors import InvalidFile, LorakitError, Refused

BLOCK = 1 << 20
_PIECE = 1 << 16  # of a compressed stream
_ZSTD_PIECE = 512  # four of its bytes can stand for 128 KiB, and what one call gives back has no bound of its own
_ZSTD_WINDOW = 1 << 27  # what `zstd -d` takes without being asked

RAW_DEFLATE, GZIP = -15, 31  # zlib's wbits


@dataclass(frozen=True, slots=True)
class Limits:
    """What an archive may come to.

    Attributes:
        max_bytes: Of the archive itself, and of all its files together.
        max_files: Files and folders together, those that are only part of a name included.
        max_ratio: Bytes that may come out of each byte of a compressed archive, once `unrated_bytes` came out.
        unrated_bytes: So much may come out whatever the ratio: weights that begin as zeros compress 1000 to 1.
        max_name: Bytes of a member's whole name.
        max_depth: Parts of a member's name.
    """

    max_bytes: int = 1 << 38
    max_files: int = 1000
    max_ratio: float = 200.0
    unrated_bytes: int = 64 << 20
    max_name: int = 1024
    max_depth: int = 16


class ByteStream(Protocol):
    """What bytes arrive from: an HTTP body, a pipe, an open file. It may give fewer than asked; none is its end."""

    def read(self, size: int, /) -> bytes: ...


class Bytes:
    """Bytes that come in blocks. `position` counts those that were taken."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._blocks = blocks
        self._block = b""
        self._taken = 0
        self.position = 0

    def some(self, most: int) -> bytes:
        """At least one byte and at most `most`; none at the end."""
        while self._taken == len(self._block):
            block = next(self._blocks, None)
            if block is None:
                return b""
            self._block, self._taken = block, 0
        piece = self._block[self._taken : self._taken + most]
        self._taken += len(piece)
        self.position += len(piece)
        return piece

    def put_back(self, count: int) -> None:
        """Untake the last `count` bytes of what `some` gave last."""
        self._taken -= count
        self.position -= count

    def exactly(self, count: int, what: str) -> bytes:
        """Raises InvalidFile when fewer are left."""
        return b"".join(self.blocks(count, what))

    def blocks(self, count: int, what: str) -> Iterator[bytes]:
        """The next `count` bytes.

        Raises:
            InvalidFile: fewer are left.
        """
        left = count
        while left:
            block = self.some(min(left, BLOCK))
            if not block:
                raise InvalidFile(
                    f"the archive ends {left} bytes before the end of {what}: it is truncated, fetch it again"
                )
            left -= len(block)
            yield block

    def peek(self, count: int) -> bytes:
        """The next `count` bytes, fewer only at the end; they are still to be taken."""
        while len(self._block) - self._taken < count:
            block = next(self._blocks, None)
            if block is None:
                break
            self._block, self._taken = self._block[self._taken :] + block, 0
        return self._block[self._taken : self._taken + count]

    def at_end(self) -> bool:
        return not self.peek(1)


class Arriving:
    """The blocks of a stream, counted and hashed as they arrive."""

    def __init__(self, stream: ByteStream, limits: Limits, progress: Callable[[int], None] | None) -> None:
        self._stream = stream
        self._limits = limits
        self._progress = progress
        self._digest = hashlib.sha256()
        self.count = 0

    def __iter__(self) -> Iterator[bytes]:
        while block := self._stream.read(BLOCK):
            self.count += len(block)
            self._digest.update(block)
            if self.count > self._limits.max_bytes:
                raise Refused(
                    f"the archive is larger than the {self._limits.max_bytes} bytes that are allowed: raise the limit "
                    f"if it is to be trusted"
                )
            if self._progress is not None:
                self._progress(self.count)
            yield block

    def sha256(self) -> str:
        return self._digest.hexdigest()


class Inflation:
    """How much came out of how much: a bomb is known long before it has gone off."""

    def __init__(self, archive: Bytes, limits: Limits) -> None:
        self._archive = archive
        self._limits = limits
        self._bytes = 0

    def inflated(self, wbits: int, what: str) -> Iterator[bytes]:
        """One deflate stream from the archive's next byte to where it says it ends, in blocks of at most 1 MiB.

        Raises:
            InvalidFile: it is damaged or truncated.
            Refused: more came out of it than `max_ratio` allows.
        """
        inflater = zlib.decompressobj(wbits)
        piece = b""
        while not inflater.eof:
            piece = piece or self._archive.some(_PIECE)
            # at the archive's end zlib may still hold something back: ask until nothing comes any more
            try:
                block = inflater.decompress(piece, BLOCK)
            except zlib.error as error:
                raise InvalidFile(f"{what} can't be decompressed: {error}; it is damaged, fetch it again") from None
            if not piece and not block and not inflater.eof:
                raise InvalidFile(f"the archive ends inside {what}: it is truncated, fetch it again")
            piece = inflater.unconsumed_tail
            yield self._counted(block)
        self._archive.put_back(len(inflater.unused_data))

    def gunzipped(self) -> Iterator[bytes]:
        """What all gzip members to the archive's end hold, one behind the other, as gzip(1) reads them.

        Raises:
            InvalidFile: a member is damaged or truncated, or something else stands behind the last one.
        """
        while not self._archive.at_end():
            if self._archive.peek(2) != b"\x1f\x8b":
                raise InvalidFile("something that is not gzip stands behind the end of the archive: refused")
            yield from self.inflated(GZIP, "the gzip archive")

    def unzstandarded(self) -> Iterator[bytes]:
        """What all zstd frames to the archive's end hold.

        Raises:
            LorakitError: no library that reads zstd is installed.
            InvalidFile: a frame is damaged or truncated, or something else stands behind the last one.
        """
        zstandard = _zstandard()
        decompressor = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW)
        while not self._archive.at_end():
            frame = decompressor.decompressobj()
            while not frame.eof:
                piece = self._archive.some(_ZSTD_PIECE)
                if not piece:
                    raise InvalidFile("the archive ends inside a zstd frame: it is truncated, fetch it again")
                try:
                    block = frame.decompress(piece)
                except zstandard.ZstdError as error:
                    raise InvalidFile(f"the zstd archive can't be decompressed: {error}; fetch it again") from None
                yield self._counted(block)
            self._archive.put_back(len(frame.unused_data))

    def _counted(self, block: bytes) -> bytes:
        self._bytes += len(block)
        if self._bytes > self._limits.unrated_bytes + self._limits.max_ratio * self._archive.position:
            raise Refused(
                f"{self._bytes} bytes came out of the first {self._archive.position} of the archive, more than "
                f"{self._limits.max_ratio:g} times as many: it looks like a decompression bomb; raise the limit if it "
                f"is to be trusted"
            )
        return block


def _zstandard() -> Any:
    try:
        import zstandard
    except ImportError:
        raise LorakitError(
            "the archive is compressed with zstd, which Python can't read by itself: pip install 'lorakit[zstd]', or "
            "fetch a .tar.gz"
        ) from None
    return zstandard
