"""What is done to one weight: a few kinds of steps, as values. Nothing here reads or computes.

A weight is seen as a matrix of `shape[0] × … × shape[-2]` rows and `shape[-1]` columns; a bias as one column. A weight
of a convolution has its output channels as rows, and all else as columns. Steps are applied in their order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from lorakit.adapters.delta import Term
from lorakit.files.safetensors import StoredTensor

if TYPE_CHECKING:
    from lorakit.merge.peft_layers import PeftLayers

Picked = int | tuple[int, int] | None


@dataclass(frozen=True, slots=True)
class Matrix:
    """A matrix that stands in a file: its elements seen in the shape `view`, and along each axis of it what is picked:
    one index, a range, or (None) all. `repeat` is how often each column stands, side by side.
    """

    stored: StoredTensor
    view: tuple[int, ...]
    picked: tuple[Picked, ...] = ()
    repeat: int = 1

    @property
    def shape(self) -> tuple[int, int]:
        sizes = [
            size if pick is None else pick[1] - pick[0]
            for size, pick in zip(self.view, self.picked or (None,) * len(self.view), strict=True)
            if not isinstance(pick, int)
        ]
        return sizes[0], sizes[1] * self.repeat


def matrix(stored: StoredTensor) -> Matrix:
    """The whole tensor: (first axis, all others), which is how the factors of a convolution are multiplied."""
    return Matrix(stored, (stored.shape[0], math.prod(stored.shape[1:])))


@dataclass(frozen=True, slots=True)
class AddProduct:
    """weight += factor · B A, from row `first_row` on; with `transposed`, the transpose of it."""

    B: Matrix
    A: Matrix
    factor: float
    transposed: bool = False
    first_row: int = 0

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """Of what is added to the weight."""
        out, into = self.B.shape[0], self.A.shape[1]
        return (into, out) if self.transposed else (out, into)

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        return (self.B.stored, self.A.stored)


@dataclass(frozen=True, slots=True)
class AddStored:
    """weight += factor · a stored tensor of the same shape (the bias of lora_B)."""

    tensor: StoredTensor
    factor: float


@dataclass(frozen=True, slots=True)
class Take:
    """weight += weight · (the trained tensor - the base's): with the weight 1, the trained tensor itself."""

    tensor: StoredTensor
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class TakeRows:
    """The same for some rows: row `rows[i]` of the weight is trained as row i of the tensor."""

    tensor: StoredTensor
    rows: tuple[int, ...]
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Dora:
    """weight = magnitude / ‖base + Σ B A‖ · (weight + Σ B A), the norm of each output (arXiv:2402.09353).

    The norm is always the unmerged base's, so that several adapters are merged in turn as PEFT does. `by_column`: the
    outputs are the columns, as Conv1D and embeddings store them. A `weight` scales what the step changes.
    """

    magnitude: StoredTensor
    product: AddProduct
    by_column: bool = False
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class SubtractInit:
    """weight -= weight · scale · B₀ A₀, what the factors were started from, rounded to the base's dtype.

    `pissa`: the `rank` largest singular triples (arXiv:2404.02948); `olora`: the first columns of its QR
    decomposition (arXiv:2406.01775). Both products are the same whatever the signs that LAPACK chooses.
    """

    method: Literal["pissa", "olora"]
    rank: int
    scale: float
    weight: float = 1.0
    transposed: bool = False


@dataclass(frozen=True, slots=True)
class ByPeft:
    """What PEFT's own layer of another method makes of the weight, or of the bias beside it."""

    layers: PeftLayers
    module: str
    part: Literal["weight", "bias"]
    sibling: StoredTensor | None = None  # the bias beside the weight, or the weight beside the bias
    weight: float = 1.0


Step = AddProduct | AddStored | Take | TakeRows | Dora | SubtractInit | ByPeft


def product_of(term: Term, *, transposed: bool = False) -> AddProduct:
    return AddProduct(matrix(term.B), matrix(term.A), term.factor, transposed)
