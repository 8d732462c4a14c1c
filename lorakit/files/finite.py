"""Are all numbers of a file finite? Looked at as bits, so that no torch is needed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lorakit.files.safetensors import Header, StoredTensor
from lorakit.files.tensors import read_into

# An IEEE number is infinite or NaN when all bits of its exponent are set.
_EXPONENTS = {
    "F64": (np.uint64, 0x7FF0_0000_0000_0000),
    "F32": (np.uint32, 0x7F80_0000),
    "F16": (np.uint16, 0x7C00),
    "BF16": (np.uint16, 0x7F80),
}
_BLOCK = 1 << 24  # bytes at a time


@dataclass(frozen=True, slots=True)
class Content:
    """What the numbers of a file are: the first tensor with NaN or infinity, and whether all of them are zero."""

    not_finite: str | None
    all_zero: bool


def look_at_numbers(header: Header, *, most: int | None = None) -> Content:
    """Read every number of a file once, in blocks; or `most` bytes of each tensor.

    Raises:
        InvalidFile: the file became shorter since its header was read.
    """
    all_zero = True
    buffer = memoryview(bytearray(min(_BLOCK, header.size)))
    # Read, not mapped: a map of a file that its trainer cuts short would end this process.
    with header.file.open("rb") as stream:
        for stored in header.tensors.values():
            finite, zero = _look(stream.fileno(), stored, buffer, most)
            all_zero = all_zero and zero
            if not finite:
                return Content(stored.name, False)
    return Content(None, all_zero)


def _look(reader: int, stored: StoredTensor, buffer: memoryview, most: int | None) -> tuple[bool, bool]:
    kind, exponent = _EXPONENTS.get(stored.dtype, (np.uint8, None))
    zero = True
    end = stored.end if most is None else min(stored.end, stored.start + most)
    for start in range(stored.start, end, _BLOCK):
        view = buffer[: min(_BLOCK, end - start)]
        read_into(reader, view, start, stored)
        block = np.frombuffer(view, dtype=kind)
        zero = zero and not (block if exponent is None else block << kind(1)).any()  # without the sign
        if exponent is not None and bool(((block & kind(exponent)) == kind(exponent)).any()):
            return False, zero
    return True, zero
