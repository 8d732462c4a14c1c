"""Are all numbers of a file finite? Looked at as bits, so that no torch is needed."""

from __future__ import annotations

import mmap
from dataclasses import dataclass

import numpy as np

from lorakit.files.safetensors import Header, StoredTensor

# An IEEE number is infinite or NaN when all bits of its exponent are set.
_EXPONENTS = {
    "F64": (np.uint64, 0x7FF0_0000_0000_0000),
    "F32": (np.uint32, 0x7F80_0000),
    "F16": (np.uint16, 0x7C00),
    "BF16": (np.uint16, 0x7F80),
}
_BLOCK = 1 << 22  # numbers at a time


@dataclass(frozen=True, slots=True)
class Content:
    """What the numbers of a file are: the first tensor with NaN or infinity, and whether all of them are zero."""

    not_finite: str | None
    all_zero: bool


def look_at_numbers(header: Header) -> Content:
    """Read every number of a file once, in blocks."""
    all_zero = True
    with header.file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for stored in header.tensors.values():
            finite, zero = _look(data, stored)
            all_zero = all_zero and zero
            if not finite:
                return Content(stored.name, False)
    return Content(None, all_zero)


def _look(data: mmap.mmap, stored: StoredTensor) -> tuple[bool, bool]:
    kind, exponent = _EXPONENTS.get(stored.dtype, (np.uint8, None))
    size = np.dtype(kind).itemsize
    zero = True
    for start in range(stored.start, stored.end, _BLOCK * size):
        # copied: the numbers need not be aligned in the file, and a view would keep the map open
        block = np.frombuffer(data[start : min(stored.end, start + _BLOCK * size)], dtype=kind)
        zero = zero and not block.any()
        if exponent is not None and bool(((block & kind(exponent)) == kind(exponent)).any()):
            return False, zero
    return True, zero
