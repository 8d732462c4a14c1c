"""A change of one weight as plain factors. Ranks follow from shapes alone; tensors are read when they are asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class ExactFactors:
    """One module's change as plain factors: ΔW = B A of `shape` (out, in), computed anew each time it is asked for.

    `shape` is that of the linear map, also where the base stores its transpose (transformers' Conv1D), as LoRA's is.
    `make` gives B (out, rank) and A (rank, in) in float64, the scale in B.
    """

    shape: tuple[int, int]
    rank: int
    make: Callable[[], Pair]


def product(shape: tuple[int, int], rank: int, make: Callable[[], Pair]) -> ExactFactors:
    """Factors as they are; where their inner size is above min(out, in), their product and an identity instead."""
    if rank <= min(shape):
        return ExactFactors(shape, rank, make)

    def multiplied() -> torch.Tensor:
        left, right = make()
        return left @ right

    return dense(shape, multiplied)


def dense(shape: tuple[int, int], make: Callable[[], torch.Tensor]) -> ExactFactors:
    """A whole matrix W as W I or I W, with the smaller identity: rank min(out, in)."""
    return ExactFactors(shape, min(shape), lambda: beside_identity(make()))


def beside_identity(matrix: torch.Tensor) -> Pair:
    import torch

    out, into = matrix.shape
    identity = torch.eye(min(out, into), dtype=matrix.dtype)
    return (identity, matrix) if out <= into else (matrix, identity)


def row_products(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """(n, p) and (n, q) -> (n, p·q), each row the Kronecker product of the two: the face-splitting product.

    (P Q) ∘ (R S) = row_products(P, R) · row_products(Qᵀ, Sᵀ)ᵀ (Slyusar 1999).
    """
    return (one[:, :, None] * other[:, None, :]).flatten(1)
