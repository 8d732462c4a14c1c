"""What adapters add to one weight, kept as factors: Σ weight · scale · B A."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from lorakit.errors import WrongBase
from lorakit.files.safetensors import StoredTensor
from lorakit.files.tensors import load_tensor

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
    def factor(self) -> float:
        """What B A is multiplied by."""
        return self.weight * self.scale


@dataclass(frozen=True, slots=True)
class Delta:
    """A lazy, immutable sum of low-rank terms: dense shape (out, in), or (vocabulary, features) for an embedding.

    PEFT adds the transpose of B A to an embedding (peft/tuners/lora/layer.py, `Embedding.get_delta_weight`),
    so there `A` is (r, vocabulary) and `B` is (features, r).
    """

    terms: tuple[Term, ...]
    kind: Kind = "linear"

    @property
    def rank(self) -> int:
        """Σ r: the rank of the stacked factors, an upper bound of the delta's own."""
        return sum(term.rank for term in self.terms)

    @property
    def shape(self) -> tuple[int, int]:
        """Of the dense delta, as the base stores such a weight: (out, in), or (vocabulary, features)."""
        out, into = self.terms[0].B.shape[0], self.terms[0].A.shape[1]
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
            return load_tensor(self.terms[0].A)
        return torch.cat([_wide(term.A) for term in self.terms])

    @property
    def B(self) -> torch.Tensor:
        """(out, r): as stored for a single term, else stacked in float32 with each term's weight and scale in it."""
        import torch

        if len(self.terms) == 1:
            return load_tensor(self.terms[0].B)
        return torch.cat([(_wide(term.B).double() * term.factor).float() for term in self.terms], dim=1)

    def dense(self) -> torch.Tensor:
        """The whole delta in float64, of `shape`."""
        import torch

        total = torch.zeros(self.terms[0].B.shape[0], self.terms[0].A.shape[1], dtype=torch.float64)
        for term in self.terms:
            total += term.factor * (load_tensor(term.B).double() @ load_tensor(term.A).double())
        return total.T.contiguous() if self.kind == "embedding" else total

    def svd(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """U (m, k), S (k), Vh (k, n) of `dense()` in float64, k = min(rank, m, n), without forming it.

        QR of each stacked factor, then an SVD of the small core R_B R_Aᵀ.
        """
        import torch

        left, right = self.stacked()
        q_left, r_left = torch.linalg.qr(left)
        q_right, r_right = torch.linalg.qr(right.T)
        u, s, vh = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
        u, vh = q_left @ u, vh @ q_right.T
        return (vh.T, s, u.T) if self.kind == "embedding" else (u, s, vh)

    def norm(self) -> float:
        """The Frobenius norm of the dense delta: ‖B̂ Â‖² = tr((B̂ᵀB̂)(Â Âᵀ))."""
        left, right = self.stacked()
        return float(((left.T @ left) * (right @ right.T)).sum().clamp(min=0).sqrt())

    def stacked(self) -> tuple[torch.Tensor, torch.Tensor]:
        """B̂ (out, Σr) with each term's scale and weight in it, and Â (Σr, in), in float64."""
        import torch

        left = torch.cat([load_tensor(term.B).double() * term.factor for term in self.terms], dim=1)
        right = torch.cat([load_tensor(term.A).double() for term in self.terms])
        return left, right

    def scaled(self, weight: float) -> Delta:
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
        terms = {(term.B, term.A, term.scale): term for term in self.terms}
        for term in other.terms:
            same = terms.get((term.B, term.A, term.scale))
            terms[term.B, term.A, term.scale] = (
                term if same is None else replace(same, weight=same.weight + term.weight)
            )
        return replace(self, terms=tuple(terms.values()))

    def __mul__(self, weight: float) -> Delta:
        return self.scaled(float(weight))

    __rmul__ = __mul__


def _wide(stored: StoredTensor) -> torch.Tensor:
    """At least float32."""
    import torch

    tensor = load_tensor(stored)
    return tensor if tensor.dtype == torch.float64 else tensor.float()
