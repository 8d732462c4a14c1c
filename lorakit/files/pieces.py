"""Tensors in pieces: which box of the whole each piece holds, and a range of elements read out of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import TYPE_CHECKING, Protocol

from lorakit.errors import Refused
from lorakit.files.tensors import torch_dtype
from lorakit.files.torch_tensors import StoredTorchTensor, load_into, part_of

if TYPE_CHECKING:
    import torch

MAX_COMPARISONS = 100_000  # of pieces with one another, where they form no grid


class Placed(Protocol):
    """What begins at `offsets` of a whole, and has `shape`."""

    @property
    def offsets(self) -> tuple[int, ...]: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


class Piece(Placed, Protocol):
    """One whose elements stand in a file."""

    def stored(self, name: str, dtype: str) -> StoredTorchTensor:
        """Where; of that dtype, and of the piece's shape.

        Raises:
            NotFound, InvalidFile: its file is gone, or holds another thing there.
        """


@dataclass(frozen=True, slots=True)
class Box:
    offsets: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StoredPiece:
    """A piece whose place is known."""

    offsets: tuple[int, ...]
    tensor: StoredTorchTensor

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    def stored(self, name: str, dtype: str) -> StoredTorchTensor:
        return self.tensor


def read_pieces(
    name: str, dtype: str, shape: tuple[int, ...], pieces: Sequence[Piece], begin: int, end: int
) -> torch.Tensor:
    """Elements [begin, end) of the whole in the order of their indices, flat; `pieces` cover it.

    Raises:
        NotFound, InvalidFile: a piece's file is gone, became shorter, or holds another thing.
    """
    import torch

    flat = torch.empty(end - begin, dtype=torch_dtype(dtype))
    filled = 0
    for box in boxes(shape, begin, end):
        into = flat[filled : filled + math.prod(box.shape)].view(box.shape)
        filled += into.numel()
        for piece in pieces:
            common = _common(box, piece)
            if common is not None:
                place = _offsets_in(box, common)
                target = into[tuple(slice(at, at + size) for at, size in zip(place, common.shape, strict=True))]
                load_into(name, part_of(piece.stored(name, dtype), _offsets_in(piece, common), common.shape), target)
    return flat


def boxes(shape: tuple[int, ...], begin: int, end: int) -> Iterator[Box]:
    """What elements [begin, end) of a tensor are, one box behind the other: along each axis, part of a row; whole
    rows; part of a row.
    """
    if begin >= end:
        return
    if not shape:
        yield Box((), ())
        return
    row = math.prod(shape[1:])
    first, last = -(-begin // row), end // row
    if first > last:  # within one row
        yield from _in_row(shape, last, begin - last * row, end - last * row)
        return
    yield from _in_row(shape, first - 1, begin - (first - 1) * row, row)
    if first < last:
        yield Box((first, *(0 for _ in shape[1:])), (last - first, *shape[1:]))
    yield from _in_row(shape, last, 0, end - last * row)


def _in_row(shape: tuple[int, ...], index: int, begin: int, end: int) -> Iterator[Box]:
    for box in boxes(shape[1:], begin, end):
        yield Box((index, *box.offsets), (1, *box.shape))


def _common(one: Placed, other: Placed) -> Box | None:
    """What both hold; None when that is nothing."""
    ranges = [
        (max(start, begin), min(start + size, begin + count))
        for start, size, begin, count in zip(one.offsets, one.shape, other.offsets, other.shape, strict=True)
    ]
    if any(start >= stop for start, stop in ranges):
        return None
    return Box(tuple(start for start, _ in ranges), tuple(stop - start for start, stop in ranges))


def _offsets_in(holder: Placed, box: Box) -> tuple[int, ...]:
    return tuple(at - start for at, start in zip(box.offsets, holder.offsets, strict=True))


def cover(pieces: Sequence[Placed], shape: tuple[int, ...], where: str) -> bool:
    """Whether they are the whole, each part once: all inside, as many elements as it has, and no two overlap.

    Raises:
        Refused: that would take too long to find out.
    """
    inside = all(
        len(piece.offsets) == len(piece.shape) == len(shape)
        and all(offset + size <= whole for offset, size, whole in zip(piece.offsets, piece.shape, shape, strict=True))
        for piece in pieces
    )
    if not inside or sum(math.prod(piece.shape) for piece in pieces) != math.prod(shape):
        return False
    placed = sorted((piece for piece in pieces if math.prod(piece.shape)), key=lambda piece: piece.offsets)
    if not shape or _is_grid(placed):
        return True
    compared = 0
    for place, piece in enumerate(placed):
        for other in islice(placed, place + 1, None):
            if other.offsets[0] >= piece.offsets[0] + piece.shape[0]:
                break
            compared += 1
            if compared > MAX_COMPARISONS:
                raise Refused(f"'{where}': {len(placed):,} pieces of one tensor form no grid: not read")
            if _common(piece, other) is not None:
                return False
    return True


def _is_grid(placed: Sequence[Placed]) -> bool:
    """Whether along each axis the pieces share the same cuts; then two overlap only where they begin alike."""
    for axis in range(len(placed[0].shape) if placed else 0):
        ranges = sorted({(piece.offsets[axis], piece.offsets[axis] + piece.shape[axis]) for piece in placed})
        if any(start < end for (_, end), (start, _) in pairwise(ranges)):
            return False
    return len({piece.offsets for piece in placed}) == len(placed)
