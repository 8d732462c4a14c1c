"""Safetensors files as headers and byte ranges, read and checked without loading a tensor.

The format (github.com/huggingface/safetensors#format): 8 bytes N, little endian; N bytes of JSON that name each
tensor's dtype, shape and [begin, end) in the data that follows; the data, indexed without holes to its last byte.
"""

from __future__ import annotations

import json
import math
import os
import stat
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.errors import InvalidFile, NotFound
from lorakit.files.regular import at_once

DTYPE_BITS: Mapping[str, int] = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip

MAX_HEADER = 100_000_000  # bytes; the limit of the reference implementation


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor in a file: `start` and `end` are byte offsets from the beginning of the file."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Header:
    """What the head of one file says; `tensors` in the order of their data.

    `head` are the file's first `data_start` bytes, where the file itself is not at hand.
    """

    file: Path
    size: int
    data_start: int
    tensors: dict[str, StoredTensor]
    metadata: dict[str, str]
    head: bytes | None = None


def read_header(file: Path) -> Header:
    """Read and check the head of a safetensors file.

    Raises:
        NotFound: there is no such file.
        InvalidFile: it is cut short, isn't safetensors, or its offsets don't cover the data exactly once.
    """
    try:
        with open(file, "rb", opener=at_once) as stream:
            status = os.fstat(stream.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise InvalidFile(f"'{file}' is a pipe or a device, not a file")
            size, head = status.st_size, stream.read(8)
            if len(head) < 8:
                raise InvalidFile(f"'{file}' is cut short: {size} bytes are no safetensors file")
            (length,) = struct.unpack("<Q", head)
            if length > MAX_HEADER:
                raise InvalidFile(f"'{file}' is no safetensors file: it claims a header of {length} bytes")
            if 8 + length > size:
                raise InvalidFile(f"'{file}' is cut short: {size} bytes, and its header alone takes {8 + length}")
            raw = stream.read(length)
    except FileNotFoundError:
        raise NotFound(f"there is no file '{file}'") from None
    except PermissionError:
        raise InvalidFile(
            f"'{file}' can't be read: permission denied (safetensors 0.8 and later write files for their own user "
            f"alone: run both as one user, or chmod the file)"
        ) from None
    return parse_header(file, raw, size)


def parse_header(file: Path, raw: bytes, size: int) -> Header:
    """What `raw`, the JSON of a file's head, says of a file of `size` bytes.

    Raises:
        InvalidFile: it isn't safetensors, or its offsets don't cover the data exactly once.
    """
    try:
        entries: Any = json.loads(raw, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise InvalidFile(f"'{file}' has a header that can't be parsed: {error}") from None
    if not isinstance(entries, dict):
        raise InvalidFile(f"'{file}' has a header that is no JSON object")
    metadata = entries.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not (isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())):
        raise InvalidFile(f"'{file}' has metadata that does not map text to text")
    data_start = 8 + len(raw)
    tensors = sorted((_entry(file, name, value, data_start) for name, value in entries.items()), key=_by_offset)
    position = data_start
    for tensor in tensors:
        if tensor.start != position:
            raise InvalidFile(f"'{file}': the data of '{tensor.name}' leaves a hole or overlaps another tensor's")
        position = tensor.end
    if position > size:
        raise InvalidFile(f"'{file}' is cut short: {size} of {position} bytes are there")
    if position < size:
        raise InvalidFile(f"'{file}' holds {size - position} bytes that no tensor covers")
    return Header(file, size, data_start, {tensor.name: tensor for tensor in tensors}, metadata)


def _by_offset(tensor: StoredTensor) -> tuple[int, int]:
    return tensor.start, tensor.end


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("a name stands twice")
    return entries


def _entry(file: Path, name: str, value: Any, data_start: int) -> StoredTensor:
    try:
        dtype, shape, (begin, end) = value["dtype"], value["shape"], value["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise InvalidFile(f"'{file}': the entry of '{name}' lacks dtype, shape or data_offsets") from None
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise InvalidFile(f"'{file}': '{name}' has the unknown dtype {dtype!r}")
    if not (isinstance(shape, list) and all(_is_count(n) for n in [*shape, begin, end])):
        raise InvalidFile(f"'{file}': the shape or offsets of '{name}' are no whole numbers")
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if bits % 8 or end - begin != bits // 8:
        raise InvalidFile(f"'{file}': '{name}' takes {end - begin} bytes, but {dtype} {shape} needs {bits // 8}")
    return StoredTensor(name, file, dtype, tuple(shape), data_start + begin, data_start + end)


def _is_count(number: Any) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number >= 0


def planned_header(
    file: Path, tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, Header]:
    """The head of a file yet to be written: its bytes, and where each (name, dtype, shape) will stand.

    Shapes and dtypes fix every offset, so tensors can be written in any order, by any number of threads.
    """
    entries: dict[str, Any] = {}
    if metadata:
        entries["__metadata__"] = dict(metadata)
    position = 0
    for name, dtype, shape in tensors:
        end = position + math.prod(shape) * DTYPE_BITS[dtype] // 8
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    raw = struct.pack("<Q", len(text)) + text
    return raw, parse_header(file, text, len(raw) + position)
