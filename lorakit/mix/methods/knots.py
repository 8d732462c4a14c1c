"""KnOTS: adapters aligned by one SVD of all of them, and merged where they differ."""

from __future__ import annotations

from collections.abc import Sequence

from lorakit.mix.methods.cores import oriented, svd_of, triples_of, zero_noise
from lorakit.mix.methods.elementwise import ties_in_memory
from lorakit.mix.methods.linear import linear
from lorakit.mix.methods.low_rank import Draw, LowRank


def knots(
    deltas: Sequence[LowRank], weights: Sequence[float], *, draw: Draw, density: float, majority_sign: str
) -> LowRank:
    """U Σ · ties(V₁ᵀ, …, V_Tᵀ), of the SVD [Δ₁ … Δ_T] = U Σ [V₁ᵀ … V_Tᵀ]: KnOTS-TIES (arXiv:2410.19735).

    With Δᵢ = Uᵢ Sᵢ Wᵢᵀ the joined deltas are [U₁S₁ … U_T S_T] times a block diagonal of orthonormal rows, so that an
    SVD of that thin left factor gives U, Σ and each Vᵢᵀ (k, in).
    """
    import torch

    triples = [triples_of(delta) for delta in deltas]
    ranks = [len(s) for _, s, _ in triples]
    if not sum(ranks):
        return linear(deltas, weights, draw=draw)
    u, s, wh = svd_of(torch.cat([u * s for u, s, _ in triples], dim=1))
    rights = [w @ vh for w, (_, _, vh) in zip(torch.split(wh, ranks, dim=1), triples, strict=True)]
    u, s, joined = oriented((u, s, torch.cat(rights, dim=1)))
    rights = list(map(zero_noise, joined.chunk(len(deltas), dim=1)))
    return LowRank(u * s, ties_in_memory(rights, weights, density, majority_sign))
