"""Tensors whose rows stand elsewhere in a checkpoint, or in another order: read a range at a time, by arithmetic."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorakit.convert.source import SourceTensor

if TYPE_CHECKING:
    import torch


# What rotary embeddings turn, and what is therefore in another order where neighbouring rows are turned together.
TURNED = (".q_proj.weight", ".k_proj.weight", ".q_proj.bias", ".k_proj.bias")


@dataclass(frozen=True, slots=True)
class Rows:
    """Of each `period` rows of a tensor those from `first`, `count` of them: a part of fused or interleaved ones."""

    of: SourceTensor
    period: int
    first: int
    count: int

    @property
    def dtype(self) -> str:
        return self.of.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        rows, *rest = self.of.shape
        return rows // self.period * self.count, *rest

    def read(self, begin: int, end: int) -> torch.Tensor:
        import torch

        width = math.prod(self.of.shape[1:])
        size = self.count * width
        parts = []
        for block in range(begin // size, -(-end // size)) if begin < end else ():
            start = (block * self.period + self.first) * width - block * size
            parts.append(self.of.read(start + max(begin, block * size), start + min(end, (block + 1) * size)))
        return parts[0] if len(parts) == 1 else torch.cat(parts) if parts else self.of.read(0, 0)


@dataclass(frozen=True, slots=True)
class HalvedHeads:
    """Heads whose rows alternate between the two halves that rotary embeddings turn (Meta's order: 0, d/2, 1, …), in
    transformers' order: the first half, and then the other.

    `size` is the rows of a head. Whole heads are read.
    """

    of: SourceTensor
    size: int

    @property
    def dtype(self) -> str:
        return self.of.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.of.shape

    def read(self, begin: int, end: int) -> torch.Tensor:
        width = math.prod(self.of.shape[1:])
        head = self.size * width
        if begin >= end:
            return self.of.read(0, 0)
        first, last = begin // head, -(-end // head)
        heads = self.of.read(first * head, last * head).view(last - first, self.size // 2, 2, width)
        return heads.transpose(1, 2).reshape(-1)[begin - first * head : end - first * head]


@dataclass(frozen=True, slots=True)
class Stacked:
    """Tensors of one dtype, one below the other."""

    parts: tuple[SourceTensor, ...]

    @property
    def dtype(self) -> str:
        return self.parts[0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return sum(part.shape[0] for part in self.parts), *self.parts[0].shape[1:]

    def read(self, begin: int, end: int) -> torch.Tensor:
        import torch

        found, start = [], 0
        for part in self.parts:
            size = math.prod(part.shape)
            if start < end and begin < start + size:
                found.append(part.read(max(begin - start, 0), min(end - start, size)))
            start += size
        return torch.cat(found) if found else self.parts[0].read(0, 0)
