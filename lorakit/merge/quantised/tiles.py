"""A matrix cut into tiles that have one scale each."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

Tile = tuple[int, int]


def grid(shape: tuple[int, int], tile: Tile) -> tuple[int, int]:
    """How many tiles stand below and beside one another; the last may be ragged."""
    return -(-shape[0] // tile[0]), -(-shape[1] // tile[1])


def tiles(matrix: torch.Tensor, tile: Tile) -> torch.Tensor:
    """(rows of tiles, columns of tiles, tile height, tile width), zeros beyond the edge."""
    import torch

    rows, columns = grid((matrix.shape[0], matrix.shape[1]), tile)
    height, width = rows * tile[0], columns * tile[1]
    if (height, width) != tuple(matrix.shape):
        matrix = torch.nn.functional.pad(matrix, (0, width - matrix.shape[1], 0, height - matrix.shape[0]))
    return matrix.reshape(rows, tile[0], columns, tile[1]).transpose(1, 2)


def spread(scales: torch.Tensor, tile: Tile, shape: tuple[int, int]) -> torch.Tensor:
    """The scale of each element, for scales that stand as the tiles do."""
    return scales.repeat_interleave(tile[0], 0)[: shape[0]].repeat_interleave(tile[1], 1)[:, : shape[1]]


def unchanged_tiles(before: torch.Tensor, after: torch.Tensor, tile: Tile) -> torch.Tensor:
    return tiles(before != after, tile).flatten(2).any(-1).logical_not()


def nearer(wanted: torch.Tensor, first: torch.Tensor, second: torch.Tensor, tile: Tile) -> torch.Tensor:
    """The tiles in which `second` has a smaller squared error than `first`."""
    errors = (tiles((values - wanted).square(), tile).flatten(2).sum(-1) for values in (first, second))
    return next(errors) > next(errors)
