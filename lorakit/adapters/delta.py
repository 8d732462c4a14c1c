"""What adapters add to one weight, kept as factors: Σ weight · scale · B A."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from math import isfinite
from typing import TYPE_CHECKING, Any, Literal

from lorakit.errors import UnsupportedAdapter, UsageError, WrongBase
from lorakit.files.safetensors import StoredTensor
from lorakit.files.tensors import load_floats

if TYPE_CHECKING:
    import torch

Kind = Literal["linear", "embedding"]


@dataclass(frozen=True, slots=True)
class Term:
    """weight · scale · B A, with B (out, r) and A (r, in) on disk."""

    B: StoredTensor
    A: StoredTensor
    scale: float
    weight: float = 1.0

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def known_rank(self) -> int:
        return self.rank

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of B A."""
        return self.B.shape[0], self.A.shape[1]

    @property
    def factor(self) -> float:
        """What B A is multiplied by."""
        return self.weight * self.scale

    def load(self) -> tuple[torch.Tensor, torch.Tensor]:
        """B and A as they are stored."""
        return load_floats(self.B), load_floats(self.A)

    @property
    def key(self) -> Any:
        """Equal for terms that differ in their weight alone."""
        return self.B, self.A, self.scale


@dataclass(frozen=True, slots=True)
class Made:
    """weight · B A, with factors of a known product's shape that are computed when they are first asked for, and kept.

    `known_rank` is what can be said of the rank without computing them.
    """

    shape: tuple[int, int]
    load: Callable[[], tuple[torch.Tensor, torch.Tensor]]
    weight: float = 1.0
    known_rank: int | None = None

    @property
    def rank(self) -> int:
        return self.load()[1].shape[0] if self.known_rank is None else self.known_rank

    @property
    def factor(self) -> float:
        return self.weight

    @property
    def key(self) -> Any:
        return self.load


def made(
    shape: tuple[int, int], make: Callable[[], tuple[torch.Tensor, torch.Tensor]], rank: int | None = None
) -> Made:
    """A term whose factors `make` gives, asked once: B (out, r) and A (r, in) of the product's `shape`."""
    return Made(shape, cache(make), known_rank=rank)


@dataclass(frozen=True, slots=True)
class Delta:
    """A lazy, immutable sum of low-rank terms: dense shape (out, in), or (vocabulary, features) for an embedding.

    PEFT adds the transpose of B A to an embedding (peft/tuners/lora/layer.py, `Embedding.get_delta_weight`),
    so there `A` is (r, vocabulary) and `B` is (features, r).
    """

    terms: tuple[Term | Made, ...]
    kind: Kind = "linear"

    @property
    def stored(self) -> tuple[Term, ...]:
        """The terms, all of them on disk.

        Raises:
            UnsupportedAdapter: one was computed.
        """
        if not all(isinstance(term, Term) for term in self.terms):
            raise UnsupportedAdapter("an adapter that was computed can't be merged: save it, and merge that folder")
        return tuple(term for term in self.terms if isinstance(term, Term))

    @property
    def rank(self) -> int:
        """Σ r: the rank of the stacked factors, an upper bound of the delta's own."""
        return sum(term.rank for term in self.terms)

    @property
    def known_rank(self) -> int | None:
        """`rank` where it is known without computing factors."""
        ranks = [term.known_rank for term in self.terms]
        return None if None in ranks else sum(rank for rank in ranks if rank is not None)

    @property
    def shape(self) -> tuple[int, int]:
        """Of the dense delta, as the base stores such a weight: (out, in), or (vocabulary, features)."""
        out, into = self.terms[0].shape
        return (into, out) if self.kind == "embedding" else (out, into)

    @property
    def scale(self) -> float:
        """What `B A` is multiplied by: alpha/r of a single term; 1 for a sum, whose `B` holds each term's own."""
        return self.terms[0].factor if len(self.terms) == 1 else 1.0

    @property
    def A(self) -> torch.Tensor:
        """(r, in): as stored for a single term, else the terms' factors stacked in float32."""
        import torch

        if len(self.terms) == 1:
            return self.terms[0].load()[1]
        return torch.cat([_wide(term.load()[1]) for term in self.terms])

    @property
    def B(self) -> torch.Tensor:
        """(out, r): as stored for a single term, else stacked in float32 with each term's weight and scale in it."""
        import torch

        if len(self.terms) == 1:
            return self.terms[0].load()[0]
        return torch.cat([(term.load()[0].double() * term.factor).float() for term in self.terms], dim=1)

    def dense(self) -> torch.Tensor:
        """The whole delta in float64, of `shape`."""
        import torch

        total = torch.zeros(self.terms[0].shape, dtype=torch.float64)
        for term in self.terms:
            b, a = term.load()
            total += term.factor * (b.double() @ a.double())
        return total.T.contiguous() if self.kind == "embedding" else total

    def svd(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """U (m, k), S (k), Vh (k, n) of `dense()` in float64, k = min(rank, m, n), without forming it."""
        from lorakit.adapters.truncation import product_svd

        u, s, vh = product_svd(*self.stacked())
        return (vh.T, s, u.T) if self.kind == "embedding" else (u, s, vh)

    def norm(self) -> float:
        """The Frobenius norm of the dense delta: ‖B̂ Â‖² = tr((B̂ᵀB̂)(Â Âᵀ))."""
        left, right = self.stacked()
        return float(((left.T @ left) * (right @ right.T)).sum().clamp(min=0).sqrt())

    def stacked(self) -> tuple[torch.Tensor, torch.Tensor]:
        """B̂ (out, Σr) with each term's scale and weight in it, and Â (Σr, in), in float64."""
        import torch

        loaded = [(*term.load(), term.factor) for term in self.terms]
        left = torch.cat([b.double() * factor for b, _, factor in loaded], dim=1)
        right = torch.cat([a.double() for _, a, _ in loaded])
        return left, right

    def scaled(self, weight: float) -> Delta:
        """Raises UsageError for a weight that is not finite."""
        require_finite(weight)
        return replace(self, terms=tuple(replace(term, weight=term.weight * weight) for term in self.terms))

    def plus(self, other: Delta, *, module: str) -> Delta:
        """The sum; terms with the same factors become one, with their weights added up.

        Raises:
            WrongBase: the two are of different shapes.
        """
        if (self.shape, self.kind) != (other.shape, other.kind):
            raise WrongBase(
                f"'{module}' is {self.kind} {list(self.shape)} in one adapter and {other.kind} {list(other.shape)} "
                f"in another: they were made for different bases"
            )
        terms = {term.key: term for term in self.terms}
        for term in other.terms:
            same = terms.get(term.key)
            terms[term.key] = term if same is None else replace(same, weight=same.weight + term.weight)
        return replace(self, terms=tuple(terms.values()))

    def __mul__(self, weight: float) -> Delta:
        return self.scaled(float(weight)) if isinstance(weight, int | float) else NotImplemented

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Delta:
        return self.scaled(1 / divisor)

    def __neg__(self) -> Delta:
        return self.scaled(-1.0)

    def __add__(self, other: Delta) -> Delta:
        return self.plus(other, module="delta") if isinstance(other, Delta) else NotImplemented

    def __radd__(self, other: Any) -> Delta:
        """So that `sum([a, b])` works: it starts from 0."""
        return self if other == 0 else NotImplemented

    def __sub__(self, other: Delta) -> Delta:
        return self + other.scaled(-1.0) if isinstance(other, Delta) else NotImplemented


def require_finite(weight: float) -> None:
    """Raises UsageError for NaN and infinity."""
    if not isfinite(weight):
        raise UsageError(f"the weight {weight} is no finite number")


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """At least float32."""
    import torch

    return tensor if tensor.dtype == torch.float64 else tensor.float()
