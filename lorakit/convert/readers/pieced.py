"""Tensors that stand in pieces in the files of several ranks, as the readers of distributed checkpoints give them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lorakit.convert.described import is_described
from lorakit.convert.source import ByteRun
from lorakit.files.pieces import Piece, read_pieces
from lorakit.files.torch_tensors import as_stored

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class PiecedTensor:
    """`pieces` cover it once. `flat`: they are placed in the row of all its elements, not along its axes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: Sequence[Piece]
    flat: bool = False

    def read(self, begin: int, end: int) -> torch.Tensor:
        whole = (math.prod(self.shape),) if self.flat else self.shape
        return read_pieces(self.name, self.dtype, whole, self.pieces, begin, end)

    def byte_runs(self) -> tuple[ByteRun, ...] | None:
        if not self.flat and any(piece.shape[1:] != self.shape[1:] for piece in self.pieces):
            return None
        in_order = sorted((piece for piece in self.pieces if math.prod(piece.shape)), key=lambda piece: piece.offsets)
        stored = [as_stored(self.name, piece.stored(self.name, self.dtype)) for piece in in_order]
        runs = [ByteRun(plain.file, plain.start, plain.nbytes) for plain in stored if plain is not None]
        return tuple(runs) if len(runs) == len(stored) else None


def with_config(*folders: Path) -> Path | None:
    """The first of the folders that a model's config describes."""
    return next(filter(is_described, folders), None)
