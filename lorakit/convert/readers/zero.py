"""How ZeRO keeps the fp32 master weights: flat, and cut into equal parts by rank.

ZeRO 1 and 2: of each group of parameters the ranks' partitions, one behind the other, are all its parameters in the
order of `param_shapes`; a cut may fall in the middle of one. ZeRO 3: each rank's groups, one behind the other, hold a
share of every parameter, those of the last ranks filled up.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from lorakit.convert.readers.pieced import PiecedTensor
from lorakit.errors import InvalidFile
from lorakit.files.pieces import StoredPiece
from lorakit.files.torch_tensors import StoredTorchTensor, part_of

PARTITIONS, SHARES = "single_partition_of_fp32_groups", "fp32_flat_groups"  # keys of ZeRO 1 and 2, and of 3

Shapes = Mapping[str, tuple[int, ...]]
Said = Mapping[str, Any]  # an optimizer's state, one a rank


@dataclass(frozen=True, slots=True)
class Flat:
    """Rows of elements, one behind the other, as one; `ends` is where each ends in it."""

    rows: tuple[StoredTorchTensor, ...]
    ends: tuple[int, ...]

    @property
    def dtype(self) -> str:
        return self.rows[0].dtype if self.rows else "F32"

    @property
    def count(self) -> int:
        return self.ends[-1] if self.ends else 0

    def pieces(self, begin: int, end: int, at: int = 0) -> Iterator[StoredPiece]:
        """[begin, end) of it, as what begins at `at` of a whole."""
        number = bisect_right(self.ends, begin)
        while begin < end:
            row = self.rows[number]
            start = begin - (self.ends[number] - row.shape[0])
            count = min(end - begin, row.shape[0] - start)
            if count:
                yield StoredPiece((at,), part_of(row, (start,), (count,)))
            begin, at, number = begin + count, at + count, number + 1


def flat(rows: Any) -> Flat:
    """Raises InvalidFile where these aren't flat tensors of one dtype."""
    rows = rows if isinstance(rows, list | tuple) else [rows]
    found = [row for row in rows if isinstance(row, StoredTorchTensor) and len(row.shape) == 1]
    if len(found) != len(rows) or len({row.dtype for row in found}) > 1:
        raise InvalidFile("what should be flat weights of one dtype are others")
    return Flat(tuple(found), tuple(accumulate(row.shape[0] for row in found)))


def of_partitions(groups: Sequence[Shapes], ranks: Sequence[Said]) -> dict[str, PiecedTensor]:
    """ZeRO 1 and 2.

    Raises:
        InvalidFile: the ranks' weights are not those of these shapes.
    """
    held = [rank[PARTITIONS] for rank in ranks]
    if not all(isinstance(rows, list) and len(rows) == len(groups) for rows in held):
        raise InvalidFile("the ranks do not agree on how many groups of parameters there are")
    tensors: dict[str, PiecedTensor] = {}
    for number, shapes in enumerate(groups):
        whole = flat([rows[number] for rows in held])
        starts = _starts(shapes, ranks[0].get("param_alignment_paddings"), number)
        for name, shape in shapes.items():
            begin, end = starts[name], starts[name] + math.prod(shape)
            if end > whole.count:
                raise InvalidFile(f"the ranks' weights end before '{name}' does")
            tensors[name] = PiecedTensor(name, whole.dtype, shape, tuple(whole.pieces(begin, end)), flat=True)
    return tensors


def _starts(shapes: Shapes, free: Any, number: int) -> dict[str, int]:
    """Where each parameter begins in its group; `free`: elements left out behind each, if any are, group by group.

    `param_slice_mappings` say it too, and wrongly where gradients go round robin (seen in DeepSpeed 0.19.8).
    """
    paddings = free[number] if isinstance(free, list) and number < len(free) else [0] * len(shapes)
    known = isinstance(paddings, list) and len(paddings) == len(shapes)
    if not known or not all(type(padding) is int and padding >= 0 for padding in paddings):
        raise InvalidFile("param_alignment_paddings is not a number for each parameter")
    ends = accumulate(math.prod(shape) + padding for shape, padding in zip(shapes.values(), paddings, strict=True))
    return dict(zip(shapes, (0, *ends), strict=False))


def of_shares(groups: Sequence[Shapes], ranks: Sequence[Said]) -> dict[str, PiecedTensor]:
    """ZeRO 3.

    Raises:
        InvalidFile: the ranks' weights are not those of these shapes.
    """
    held = [flat(rank[SHARES]) for rank in ranks]
    shapes = {name: shape for group in groups for name, shape in group.items()}
    counts = [share(shape, len(ranks)) for shape in shapes.values()]
    if any(rows.count != sum(counts) for rows in held):
        raise InvalidFile(f"the ranks' weights are not the {sum(counts):,} numbers each that the shapes take")
    starts = accumulate(counts, initial=0)
    return {
        name: shared(name, shape, held, start) for (name, shape), start in zip(shapes.items(), starts, strict=False)
    }


def share(shape: tuple[int, ...], ranks: int) -> int:
    """Elements of each rank's part, the filling counted."""
    return -(-math.prod(shape) // ranks)


def shared(name: str, shape: tuple[int, ...], ranks: Sequence[Flat], start: int = 0) -> PiecedTensor:
    """What each rank has a share of, from `start` of its elements on."""
    if len({rows.dtype for rows in ranks}) != 1:
        raise InvalidFile(f"the ranks do not agree of which dtype '{name}' is")
    size, left = share(shape, len(ranks)), math.prod(shape)
    pieces: list[StoredPiece] = []
    for number, rows in enumerate(ranks):
        own = max(0, min(size, left - number * size))
        if start + own > rows.count:
            raise InvalidFile(f"rank {number}'s weights end before '{name}' does")
        pieces += rows.pieces(start, start + own, number * size)
    return PiecedTensor(name, ranks[0].dtype, shape, tuple(pieces), flat=True)
