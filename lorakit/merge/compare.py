"""Numbers that are computed again, and those on disk: how many differ, and by how much."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lorakit.files.safetensors import DTYPE_BITS, StoredTensor
from lorakit.files.tensors import read_into
from lorakit.merge.plan import ComputeTensor

BLOCK = 1 << 22  # bytes
_UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
_FLOATS = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"})


@dataclass(slots=True)
class Difference:
    """Sums over the blocks of one tensor. `ulps`: the largest difference, counted in values of the dtype."""

    elements: int = 0
    different: int = 0
    ulps: int = 0
    squares: float = 0.0  # of the differences, and of the values: only of float32 and float64
    norm: float = 0.0

    def add(self, mine: memoryview, theirs: memoryview, dtype: str) -> None:
        """Take in two blocks of the same length; of packed dtypes, whole bytes are counted."""
        kind: Any = _UNSIGNED.get(DTYPE_BITS[dtype], np.uint8)
        one, other = np.frombuffer(mine, dtype=kind), np.frombuffer(theirs, dtype=kind)
        self.elements += one.size
        different = one != other
        if not different.any():
            return
        a, b = one[different], other[different]
        self.different += a.size
        if dtype in _FLOATS:
            a, b = _ordered(a), _ordered(b)
        self.ulps = max(self.ulps, int(np.where(a > b, a - b, b - a).max()))
        if dtype in ("F32", "F64"):
            wide = "<f4" if dtype == "F32" else "<f8"
            values = one.view(wide).astype("f8")
            self.squares += float(np.square(values - other.view(wide)).sum())
            self.norm += float(np.square(values).sum())

    @property
    def relative(self) -> float:
        """‖difference‖ / ‖values‖ over the blocks that differ; NaN where one of them isn't finite."""
        return (self.squares / self.norm) ** 0.5 if self.norm else float("inf")


def _ordered(bits: Any) -> Any:
    """The bits of floats as unsigned numbers in the order of the floats: neighbours differ by 1."""
    sign = bits.dtype.type(1 << (bits.dtype.itemsize * 8 - 1))
    return np.where(bits & sign, ~bits, bits | sign)


@dataclass(slots=True)
class Comparison:
    """An `Output` for computed bytes that compares them with a tensor on disk, and writes nothing."""

    stored: StoredTensor
    file: int
    difference: Difference = field(default_factory=Difference)

    def put(self, tensor: ComputeTensor, offset: int, view: memoryview) -> None:
        theirs = memoryview(bytearray(len(view)))
        read_into(self.file, theirs, self.stored.start + offset, self.stored)
        self.difference.add(view, theirs, self.stored.dtype)


def compare_copied(source: StoredTensor, reader: int, comparison: Comparison) -> Iterator[int]:
    """Compare a tensor that was to be copied, byte for byte; gives how many bytes each step took."""
    buffer = memoryview(bytearray(min(BLOCK, source.nbytes)))
    theirs = memoryview(bytearray(len(buffer)))
    for offset in range(0, source.nbytes, BLOCK):
        count = min(BLOCK, source.nbytes - offset)
        read_into(reader, buffer[:count], source.start + offset, source)
        read_into(comparison.file, theirs[:count], comparison.stored.start + offset, comparison.stored)
        comparison.difference.add(buffer[:count], theirs[:count], source.dtype)
        yield count


def same_files(one: os.PathLike[str], other: os.PathLike[str]) -> bool:
    """Whether two small files hold the same bytes."""
    with open(one, "rb") as first, open(other, "rb") as second:
        while True:
            a, b = first.read(BLOCK), second.read(BLOCK)
            if a != b:
                return False
            if not a:
                return True
