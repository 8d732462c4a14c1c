"""LoRAX's merges of a request, for those who chose weights by what they gave: each on the factors A and B apart.

The whole weight stands before A and before B (so one adapter of weight 2 counts four times), the first adapter's scale
is everyone's, and what DARE drops is not made up for, as LoRAX throws away what it scaled
(server/lorax_server/utils/merges: strategies.py, utils.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lorakit.mix.methods.low_rank import Draw, LowRank, kept_at_random
from lorakit.mix.methods.peft_forms import Fuse, Prune, disjoint, fused, of_one_rank, summed, top, whole

if TYPE_CHECKING:
    import torch


def linear(deltas: Sequence[LowRank], weights: Sequence[float], *, draw: Draw) -> LowRank:
    """s₁ (Σ w B) (Σ w A). Raises UsageError: the ranks differ."""
    return _factorwise(deltas, weights, draw, whole, summed, "lorax:linear")


def ties(
    deltas: Sequence[LowRank], weights: Sequence[float], *, draw: Draw, density: float, majority_sign: str
) -> LowRank:
    """TIES on the B's, and TIES on the A's. Raises UsageError: the ranks differ."""
    return _factorwise(deltas, weights, draw, top(density), disjoint(majority_sign), "lorax:ties")


def dare_linear(deltas: Sequence[LowRank], weights: Sequence[float], *, draw: Draw, density: float) -> LowRank:
    """Values dropped from the B's and from the A's. Raises UsageError: the ranks differ."""
    return _factorwise(deltas, weights, draw, _dropped(density), summed, "lorax:dare_linear")


def dare_ties(
    deltas: Sequence[LowRank], weights: Sequence[float], *, draw: Draw, density: float, majority_sign: str
) -> LowRank:
    """Values dropped, and TIES' election, on the B's and on the A's. Raises UsageError: the ranks differ."""
    return _factorwise(deltas, weights, draw, _dropped(density), disjoint(majority_sign), "lorax:dare_ties")


def _factorwise(
    deltas: Sequence[LowRank], weights: Sequence[float], draw: Draw, prune: Prune, fuse: Fuse, name: str
) -> LowRank:
    there = of_one_rank(deltas, draw, name)
    own = [weights[index] for index, _ in there]
    merged = fused(there, own, own, draw, prune, fuse)
    return LowRank(merged.B * there[0][1].scale, merged.A) if there else merged


def _dropped(density: float) -> Prune:
    def prune(values: torch.Tensor, chance: torch.Generator) -> torch.Tensor:
        return values * kept_at_random(tuple(values.shape), density, chance, values.device)

    return prune if density < 1 else whole
