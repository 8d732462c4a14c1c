"""Trained rows of an embedding (PEFT's `trainable_token_indices`) as LoRA on it: exact, with one rank for each row."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorakit.adapters.delta import Delta, Made
from lorakit.adapters.trained import Rows
from lorakit.errors import InvalidFile
from lorakit.files.safetensors import StoredTensor
from lorakit.files.tensors import load_range

if TYPE_CHECKING:
    import torch


def row_changes(rows: Rows, table: StoredTensor) -> tuple[tuple[int, ...], torch.Tensor]:
    """The rows of the base's table that differ from the trained ones, and by what: (rows, features) in float64.

    Raises:
        InvalidFile: there is no such row in the base, or it is of another width.
    """
    import torch

    if len(table.shape) != 2:
        raise InvalidFile(f"it has rows for '{table.name}', which is {list(table.shape)} in the base, and no table")
    count, width = table.shape
    outside = [row for row in rows.indices if not 0 <= row < count]
    if outside or rows.shape[1] != width:
        found = f"row {outside[0]}" if outside else f"rows of {rows.shape[1]} numbers"
        raise InvalidFile(f"it has {found} for '{table.name}', which is {list(table.shape)} in the base")
    own = [load_range(table, row * width, (row + 1) * width) for row in rows.indices]
    changes = rows.load().double() - torch.stack(own).double()
    differs = changes.any(dim=1)
    kept = [row for row, other in zip(rows.indices, differs.tolist(), strict=True) if other]
    return tuple(kept), changes[differs]


def on_embedding(rows: tuple[int, ...], changes: torch.Tensor, count: int) -> Delta:
    """The change of some rows of an embedding of `count`: A (rows, count) has a one in each row's column."""

    def make() -> tuple[torch.Tensor, torch.Tensor]:
        return changes.T, _ones(rows, count)

    return Delta((Made((changes.shape[1], count), make, known_rank=len(rows)),), "embedding")


def on_head(rows: tuple[int, ...], changes: torch.Tensor, count: int) -> Delta:
    """The same change of a head."""

    def make() -> tuple[torch.Tensor, torch.Tensor]:
        return _ones(rows, count).T, changes

    return Delta((Made((count, changes.shape[1]), make, known_rank=len(rows)),))


def _ones(rows: tuple[int, ...], count: int) -> torch.Tensor:
    import torch

    ones = torch.zeros(len(rows), count)
    ones[torch.arange(len(rows)), torch.tensor(rows, dtype=torch.long)] = 1
    return ones
