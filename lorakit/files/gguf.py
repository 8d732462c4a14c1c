"""GGUF files as headers and byte ranges, read and checked without loading a tensor.

The format (github.com/ggml-org/ggml, docs/gguf.md), little endian: `GGUF`, version, counts of tensors and keys; each
key with its type and value; each tensor's name, sizes (the last dimension first), type and offset; the data, aligned.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from lorakit.errors import InvalidFile, Refused
from lorakit.files.regular import opened

MAGIC = b"GGUF"
MAX_HEADER = 1 << 28  # bytes; a vocabulary of a million tokens stays far below
MAX_ENTRIES = 1 << 21  # keys, tensors, and texts in arrays: tokens and their merges
MAX_DIMENSIONS = 4
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """`kind` is ggml's number of the type, `start` its first byte in the file; `shape` as torch has it."""

    name: str
    shape: tuple[int, ...]
    kind: int
    start: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """Single values and texts by their keys; of an array its length alone."""

    file: Path
    size: int
    values: Mapping[str, Any]
    lengths: Mapping[str, int]
    tensors: Mapping[str, GgufTensor]

    @property
    def architecture(self) -> str:
        return str(self.values.get("general.architecture", ""))

    def number(self, key: str) -> int | None:
        """A whole number that the model's architecture prefixes: `attention.head_count`."""
        value = self.values.get(f"{self.architecture}.{key}")
        return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def read_gguf_header(file: Path) -> GgufHeader:
    """Raises:
    NotFound: there is no such file.
    InvalidFile: it is cut short, isn't GGUF, or contradicts itself.
    Refused: it is of version 1, or big endian.
    """
    with opened(file) as stream:
        size = os.fstat(stream.fileno()).st_size
        if stream.read(4) != MAGIC:
            raise InvalidFile(f"'{file}' is no GGUF file")
        return _Head(stream, file, size).read()


class _Head:
    """Reads one value after another, and never beyond `MAX_HEADER`."""

    def __init__(self, stream: BinaryIO, file: Path, size: int) -> None:
        self._stream = stream
        self._file = file
        self._size = size
        self._left = MAX_ENTRIES

    def read(self) -> GgufHeader:
        version = self._number("I")
        if version not in (2, 3):
            raise Refused(
                f"'{self._file}' is GGUF of version {version}, or of another byte order: only 2 and 3, little endian, "
                f"are read; convert it anew with llama.cpp"
            )
        tensor_count, key_count = self._count(), self._count()
        values: dict[str, Any] = {}
        lengths: dict[str, int] = {}
        for _ in range(key_count):
            key, kind = self._text(), self._number("I")
            if key in values or key in lengths:
                raise InvalidFile(f"'{self._file}': the key '{key}' stands twice")
            if kind == _ARRAY:
                lengths[key] = self._skipped_array()
            else:
                values[key] = self._value(kind)
        tensors = [self._tensor() for _ in range(tensor_count)]
        alignment = values.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise InvalidFile(f"'{self._file}': general.alignment is {alignment!r}")
        start = -(-self._stream.tell() // alignment) * alignment
        return GgufHeader(self._file, self._size, values, lengths, self._placed(tensors, start))

    def _placed(self, tensors: list[GgufTensor], start: int) -> dict[str, GgufTensor]:
        found: dict[str, GgufTensor] = {}
        for tensor in tensors:
            if tensor.name in found:
                raise InvalidFile(f"'{self._file}': the tensor '{tensor.name}' stands twice")
            if start + tensor.start > self._size:
                raise InvalidFile(f"'{self._file}' is cut short: '{tensor.name}' would begin behind its end")
            found[tensor.name] = GgufTensor(tensor.name, tensor.shape, tensor.kind, start + tensor.start)
        return found

    def _tensor(self) -> GgufTensor:
        name, dimensions = self._text(), self._number("I")
        if dimensions > MAX_DIMENSIONS:
            raise InvalidFile(f"'{self._file}': '{name}' has {dimensions} dimensions")
        sizes = [self._number("Q") for _ in range(dimensions)]
        return GgufTensor(name, tuple(reversed(sizes)), self._number("I"), self._number("Q"))

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._text()
        if kind not in _SCALARS:
            raise InvalidFile(f"'{self._file}' has a value of the unknown type {kind}")
        return self._number(_SCALARS[kind])

    def _skipped_array(self) -> int:
        kind = self._number("I")
        if kind in _SCALARS:
            count = int(self._number("Q"))
            self._skip(count * struct.calcsize(_SCALARS[kind]))
        elif kind == _STRING:
            count = self._count()
            for _ in range(count):
                self._skip(self._number("Q"))
        else:
            raise InvalidFile(f"'{self._file}' has an array of the type {kind}, which no writer uses")
        return count

    def _count(self) -> int:
        """Of entries that follow, which take time to read."""
        count = int(self._number("Q"))
        self._left -= count
        if self._left < 0:
            raise InvalidFile(f"'{self._file}' claims {count} entries: it is damaged, or no model")
        return count

    def _text(self) -> str:
        return self._bytes(self._number("Q")).decode(errors="replace")

    def _number(self, letter: str) -> Any:
        return struct.unpack(f"<{letter}", self._bytes(struct.calcsize(letter)))[0]

    def _bytes(self, count: int) -> bytes:
        self._ensure(count)
        return self._stream.read(count)

    def _skip(self, count: int) -> None:
        self._ensure(count)
        self._stream.seek(count, os.SEEK_CUR)

    def _ensure(self, count: int) -> None:
        end = self._stream.tell() + count
        if end > self._size:
            raise InvalidFile(f"'{self._file}' is cut short: its header goes on behind its end")
        if end > MAX_HEADER:
            raise InvalidFile(f"'{self._file}' has a header of more than {MAX_HEADER >> 20} MB: it is not read")
