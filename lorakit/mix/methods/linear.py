"""Sums of deltas, exact in their factors: the weighted sum, and the arc between two."""

from __future__ import annotations

from collections.abc import Sequence
from math import acos, sin, sqrt

from lorakit.adapters.truncation import inner_product
from lorakit.errors import UsageError
from lorakit.mix.methods.low_rank import Draw, LowRank

PARALLEL = 0.9995  # above this |cosine| the sine of the angle says more of rounding than of the deltas


def linear(deltas: Sequence[LowRank], weights: Sequence[float], *, draw: Draw) -> LowRank:
    """Σ w s B A, by stacking: [w₁ s₁ B₁ …] [A₁; …] in float64 (task arithmetic, arXiv:2212.04089)."""
    import torch

    left = [delta.left() * weight for delta, weight in zip(deltas, weights, strict=True)]
    return LowRank(torch.cat(left, dim=1), torch.cat([delta.right() for delta in deltas]))


def slerp(deltas: Sequence[LowRank], weights: Sequence[float], *, draw: Draw) -> LowRank:
    """sin((1 − t)θ)/sin θ · Δ₁ + sin(tθ)/sin θ · Δ₂, with t = w₂/(w₁ + w₂) and θ the angle between the two.

    Shoemake, Animating Rotation with Quaternion Curves (SIGGRAPH 1985), on deltas as vectors. Where they are nearly
    parallel, or one of them is zero, there is no one arc between them: (1 − t) Δ₁ + t Δ₂. For t outside [0, 1], of a
    negative weight, the arc goes on.

    Raises:
        UsageError: there are not two adapters, or their weights sum to zero.
    """
    if len(deltas) != 2:
        raise UsageError(f"slerp goes from one adapter to another, but there are {len(deltas)}: name two")
    total = sum(weights)
    if not total:
        raise UsageError(f"slerp needs weights whose sum is not zero, but they are {weights[0]:g} and {weights[1]:g}")
    t = weights[1] / total
    one, two = deltas
    norms = sqrt(max(0.0, _product(one, one)) * max(0.0, _product(two, two)))
    cosine = _product(one, two) / norms if norms else 1.0
    if abs(cosine) > PARALLEL:
        return linear(deltas, (1 - t, t), draw=draw)
    angle = acos(cosine)
    return linear(deltas, (sin((1 - t) * angle) / sin(angle), sin(t * angle) / sin(angle)), draw=draw)


def _product(one: LowRank, two: LowRank) -> float:
    return inner_product((one.left(), one.right()), (two.left(), two.right()))
