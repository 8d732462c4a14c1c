"""Methods on cores: in bases U, V that all adapters share, every delta is U C Vᵀ with C no larger than (Σr, Σr).

Nothing is lost by it, as the bases hold the column and row spaces of all deltas, and nothing of the size of a weight is
formed. All in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from lorakit.adapters.truncation import product_svd
from lorakit.mix.methods.elementwise import ties_in_memory
from lorakit.mix.methods.linear import linear
from lorakit.mix.methods.low_rank import Draw, LowRank

if TYPE_CHECKING:
    import torch

    Triples = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # U (out, k), S (k), Vh (k, in)

NOISE = 1e-12  # singular values below this share of the largest are float64's rounding


@dataclass(frozen=True, slots=True)
class Cores:
    """Δᵢ = U Cᵢ Vᵀ, with orthonormal columns in U (out, p) and V (in, q)."""

    U: torch.Tensor
    cores: Sequence[torch.Tensor]  # (p, q) each
    V: torch.Tensor

    def spanned(self, core: torch.Tensor) -> LowRank:
        """U · core · Vᵀ, with the core in the factor that makes the smaller rank."""
        if core.shape[0] <= core.shape[1]:
            return LowRank(self.U, core @ self.V.T)
        return LowRank(self.U @ core, self.V.T)


def iso_c(deltas: Sequence[LowRank], weights: Sequence[float], *, draw: Draw) -> LowRank:
    """σ̄ U Vᵀ, of Σ w Δ = U Σ Vᵀ with σ̄ the mean of its singular values: Iso-C (arXiv:2502.04959).

    The mean is over the rank of the sum, and only its own directions are made equal: the paper's updates are of full
    rank, while a low-rank sum has a null space, in which no direction is better than another.
    """
    shared = joint_cores(deltas)
    weighted = [core * weight for core, weight in zip(shared.cores, weights, strict=True)]
    u, s, vh = svd_of(sum(weighted[1:], weighted[0]), noise_of=weighted)
    if not len(s):
        return linear(deltas, weights, draw=draw)
    return LowRank(shared.U @ u * s.mean(), vh @ shared.V.T)


def tsv(deltas: Sequence[LowRank], weights: Sequence[float], *, draw: Draw) -> LowRank:
    """U⊥ diag(w σ) V⊥ᵀ, of the singular triples of all deltas side by side: TSV-Merge (arXiv:2412.00081).

    U⊥ = P Qᵀ from the SVD P D Qᵀ of [U₁ … U_T] is the nearest matrix with orthonormal columns (Procrustes), V⊥ alike:
    so the tasks' singular vectors no longer interfere. Where Σ rank > min(out, in), each of the T deltas that are not
    zero keeps its first min(out, in) / T triples.
    """
    return _decorrelated(joint_cores(deltas), deltas, weights, draw)


def core_tsv(deltas: Sequence[LowRank], weights: Sequence[float], *, draw: Draw) -> LowRank:
    """TSV-Merge in Core Space (arXiv:2509.17786): `tsv` on the cores in the reference bases.

    TSV-Merge turns with its bases, so this is the same delta as `tsv`.
    """
    return _decorrelated(reference_cores(deltas), deltas, weights, draw)


def core_ties(
    deltas: Sequence[LowRank], weights: Sequence[float], *, draw: Draw, density: float, majority_sign: str
) -> LowRank:
    """U · ties(C₁, …, C_T) · Vᵀ, with the cores in the reference bases: TIES in Core Space (arXiv:2509.17786)."""
    shared = reference_cores(deltas)
    if not prod(shared.cores[0].shape):
        return linear(deltas, weights, draw=draw)
    return shared.spanned(ties_in_memory(list(map(zero_noise, shared.cores)), weights, density, majority_sign))


def joint_cores(deltas: Sequence[LowRank]) -> Cores:
    """In the bases that a QR of the stacked factors gives: its triangles hold the cores' halves."""
    import torch

    U, lefts = torch.linalg.qr(torch.cat([delta.left() for delta in deltas], dim=1))
    V, rights = torch.linalg.qr(torch.cat([delta.right() for delta in deltas]).T)
    ranks = [delta.rank for delta in deltas]
    halves = zip(lefts.split(ranks, dim=1), rights.split(ranks, dim=1), strict=True)
    return Cores(U, [left @ right.T for left, right in halves], V)


def reference_cores(deltas: Sequence[LowRank]) -> Cores:
    """In the bases of Core Space: the left singular vectors of [B₁ … B_T], the right ones of [A₁; …; A_T].

    The paper takes the factors as they are stored, which makes the bases depend on how B A happens to be split. Here
    B = U √σ and A = √σ Vᵀ of each delta's own SVD, so that the bases are the deltas' own.
    """
    import torch

    triples = [triples_of(delta) for delta in deltas]
    lefts = [u * s.sqrt() for u, s, _ in triples]
    rights = [s.sqrt()[:, None] * vh for _, s, vh in triples]
    U = oriented(svd_of(torch.cat(lefts, dim=1).T))[2].T
    V = oriented(svd_of(torch.cat(rights)))[2].T
    return Cores(U, [(U.T @ left) @ (right @ V) for left, right in zip(lefts, rights, strict=True)], V)


def triples_of(delta: LowRank) -> Triples:
    """The singular triples of one delta whose σ is not rounding; none for a delta of zero."""
    return without_noise(product_svd(delta.left(), delta.right()))


def svd_of(matrix: torch.Tensor, noise_of: Sequence[torch.Tensor] = ()) -> Triples:
    """The singular triples of a small matrix whose σ is not rounding.

    `noise_of`: what the matrix is the sum of, where it may be smaller than the rounding of these.
    """
    import torch

    largest = sum(float(torch.linalg.matrix_norm(part)) for part in noise_of)
    return without_noise(torch.linalg.svd(matrix, full_matrices=False), largest)


def without_noise(triples: Triples, largest: float = 0.0) -> Triples:
    u, s, vh = triples
    rank = int((s > NOISE * max(largest, float(s[0]))).sum()) if len(s) else 0
    return u[:, :rank], s[:rank], vh[:rank]


def oriented(triples: Triples) -> Triples:
    """The same with signs that an SVD leaves open: in each u and v together, so that v's largest value is positive.

    TIES needs them: a vote that is a tie goes to +, so without it the result would be LAPACK's choice.
    """
    u, s, vh = triples
    signs = vh.gather(1, vh.abs().argmax(dim=1, keepdim=True)).sign()
    return u * signs.T, s, vh * signs


def zero_noise(values: torch.Tensor) -> torch.Tensor:
    """With zeros for what is float64's rounding: a value that is not there has no vote, and is not counted."""
    return values * (values.abs() > NOISE * values.abs().max())


def _decorrelated(shared: Cores, deltas: Sequence[LowRank], weights: Sequence[float], draw: Draw) -> LowRank:
    import torch

    triples = [(weight, *svd_of(core)) for core, weight in zip(shared.cores, weights, strict=True)]
    tasks = [task for task in triples if len(task[2])]
    if not tasks:
        return linear(deltas, weights, draw=draw)
    room = min(shared.U.shape[0], shared.V.shape[0])
    if sum(len(s) for _, _, s, _ in tasks) > room:
        each = max(1, room // len(tasks))
        tasks = [(weight, u[:, :each], s[:each], vh[:each]) for weight, u, s, vh in tasks]
    left = orthogonalised(torch.cat([u for _, u, _, _ in tasks], dim=1))
    right = orthogonalised(torch.cat([vh for _, _, _, vh in tasks]).T)
    scales = torch.cat([s * weight for weight, _, s, _ in tasks])
    return LowRank(shared.U @ left * scales, right.T @ shared.V.T)


def orthogonalised(columns: torch.Tensor) -> torch.Tensor:
    """The nearest matrix with orthonormal columns: P Qᵀ of the SVD P D Qᵀ.

    Directions with D = 0, where adapters share theirs, are left out: any would be as near.
    """
    p, _, qh = svd_of(columns)
    return p @ qh
