"""A dense delta of which no more than some rows are in memory, and its largest values found all the same."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from lorakit.mix.methods.low_rank import LowRank

if TYPE_CHECKING:
    import torch

BLOCK = 1 << 19  # elements: in float64 and float32 a few blocks stay in a core's own cache
HALF = 16  # bits of a float32 that one pass looks at


def row_blocks(rows: int, columns: int) -> Iterator[slice]:
    """Cut `rows` evenly into blocks of at most `BLOCK` elements, and at least one row."""
    count = max(1, -(-rows // max(1, BLOCK // max(1, columns))))
    return (slice(*edges) for edges in pairwise(rows * index // count for index in range(count + 1)))


@dataclass(frozen=True, slots=True)
class Dense:
    """scale · B A as rows: each value is the float64 product rounded once to float32."""

    left: torch.Tensor  # (out, r) in float64, with the scale in it
    right: torch.Tensor  # (r, in) in float64

    @classmethod
    def of(cls, delta: LowRank) -> Dense:
        return cls(delta.left(), delta.right())

    @property
    def shape(self) -> tuple[int, int]:
        return self.left.shape[0], self.right.shape[1]

    def blocks(self) -> Iterator[torch.Tensor]:
        """All rows, top to bottom, in the blocks of `row_blocks`. Computed anew each time, to the same bits."""
        for rows in row_blocks(*self.shape):
            yield (self.left[rows] @ self.right).float()


class Largest:
    """Marks the `count` values of largest magnitude in the blocks of a dense delta; of equal ones, the first.

    The float32 bits of a magnitude are in the order of the magnitudes. So the value at the edge is found exactly, by
    counting, in two passes over recomputed blocks: the upper 16 bits first, then the lower ones of those on the edge.
    """

    def __init__(self, dense: Dense, count: int) -> None:
        self._count = count
        self._edge, self._on_edge = _edge(dense, count) if count else (0, 0)

    def mask(self, block: torch.Tensor) -> torch.Tensor:
        """Of the next block: they have to come in their order, each once."""
        bits = _magnitude_bits(block)
        if not self._count:
            return bits < 0
        above, on_edge = bits > self._edge, bits == self._edge
        here = int(on_edge.sum())
        if here > self._on_edge:
            on_edge &= (on_edge.flatten().cumsum(0) <= self._on_edge).view_as(on_edge)
        self._on_edge -= min(here, self._on_edge)
        return above | on_edge


def _edge(dense: Dense, count: int) -> tuple[int, int]:
    """The bits of the `count`-th largest magnitude, and how many values that have them are among the largest."""
    upper, wanted = _bin_of(_histogram(dense, None), count)
    lower, wanted = _bin_of(_histogram(dense, upper), wanted)
    return upper << HALF | lower, wanted


def _histogram(dense: Dense, upper: int | None) -> torch.Tensor:
    """How often each upper half occurs; or, of the values with one upper half, each lower one."""
    import torch

    counts = torch.zeros(1 << HALF, dtype=torch.int64, device=dense.left.device)
    for block in dense.blocks():
        bits = _magnitude_bits(block).flatten()
        halves = bits >> HALF if upper is None else bits[bits >> HALF == upper] & ((1 << HALF) - 1)
        counts += torch.bincount(halves, minlength=1 << HALF)
    return counts


def _bin_of(counts: torch.Tensor, wanted: int) -> tuple[int, int]:
    """The bin that holds the `wanted`-th value from the top, and which it is in that bin."""
    from_top = counts.flip(0).cumsum(0)
    place = int((from_top < wanted).sum())
    before = int(from_top[place - 1]) if place else 0
    return len(counts) - 1 - place, wanted - before


def _magnitude_bits(block: torch.Tensor) -> torch.Tensor:
    import torch

    return block.abs().view(torch.int32)
