"""PEFT's own combinations, value for value, for those who need what `add_weighted_adapter` gave them.

Those without `_svd` put each operator on the factors A and B by themselves (peft/tuners/lora/model.py,
`_generalized_task_arithmetic_weighted_adapter`): (Σ b B)(Σ a A) has cross terms that no adapter was trained for, and
the result depends on how a delta is split into factors. Those with `_svd` put it on the dense deltas; the truncation
that follows in PEFT is the caller's. One adapter alone is always PEFT's "linear", whatever was asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import sqrt
from typing import TYPE_CHECKING

from lorakit.errors import UsageError
from lorakit.mix.methods import elementwise
from lorakit.mix.methods.low_rank import Draw, LowRank, kept_at_random

if TYPE_CHECKING:
    import torch

Prune = Callable[["torch.Tensor", "torch.Generator"], "torch.Tensor"]
Fuse = Callable[["torch.Tensor", Sequence[float]], "torch.Tensor"]


def cat(deltas: Sequence[LowRank], weights: Sequence[float], *, draw: Draw) -> LowRank:
    """[B₁ …] [A₁ w₁ s₁; …]: the weighted sum, exactly, with weight and scale in A."""
    import torch

    if len(deltas) == 1:
        return linear(deltas, weights, draw=draw)
    right = [_wide(delta.A) * weight * delta.scale for delta, weight in zip(deltas, weights, strict=True)]
    return LowRank(torch.cat([_wide(delta.B) for delta in deltas], dim=1), torch.cat(right))


def linear(deltas: Sequence[LowRank], weights: Sequence[float], *, draw: Draw) -> LowRank:
    """(Σ √|w s| B) (Σ ±√|w s| A), with the sign of w s in A alone.

    Raises:
        UsageError: the ranks differ.
    """
    return _factorwise(deltas, weights, draw, whole, summed, "peft:linear")


def ties(
    deltas: Sequence[LowRank], weights: Sequence[float], *, draw: Draw, density: float, majority_sign: str
) -> LowRank:
    """TIES on the B's, and TIES on the A's. Raises UsageError: the ranks differ."""
    return _factorwise(deltas, weights, draw, top(density), disjoint(majority_sign), "peft:ties")


def dare_linear(deltas: Sequence[LowRank], weights: Sequence[float], *, draw: Draw, density: float) -> LowRank:
    """DARE on the B's, and DARE on the A's. Raises UsageError: the ranks differ."""
    return _factorwise(deltas, weights, draw, _random(density), summed, "peft:dare_linear")


def dare_ties(
    deltas: Sequence[LowRank], weights: Sequence[float], *, draw: Draw, density: float, majority_sign: str
) -> LowRank:
    """DARE and TIES' election on the B's, and on the A's. Raises UsageError: the ranks differ."""
    return _factorwise(deltas, weights, draw, _random(density), disjoint(majority_sign), "peft:dare_ties")


def magnitude_prune(deltas: Sequence[LowRank], weights: Sequence[float], *, draw: Draw, density: float) -> LowRank:
    """The largest values of the B's, and of the A's. Raises UsageError: the ranks differ."""
    return _factorwise(deltas, weights, draw, top(density), summed, "peft:magnitude_prune")


def unless_alone(method: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A method on dense deltas as PEFT's `_svd` forms are: one adapter alone is what it is, times its weight."""

    def combined(
        deltas: Sequence[LowRank], weights: Sequence[float], *, draw: Draw, **options: float | str
    ) -> torch.Tensor:
        if len(deltas) == 1:
            return elementwise.weighted_sum(deltas, weights, draw=draw)
        return method(deltas, weights, draw=draw, **options)

    return combined


ties_svd = unless_alone(elementwise.ties)
dare_linear_svd = unless_alone(elementwise.dare_linear)
dare_ties_svd = unless_alone(elementwise.dare_ties)
magnitude_prune_svd = unless_alone(elementwise.magnitude_prune)


def _factorwise(
    deltas: Sequence[LowRank], weights: Sequence[float], draw: Draw, prune: Prune, fuse: Fuse, name: str
) -> LowRank:
    if len(deltas) == 1:
        prune, fuse = whole, summed
    there = of_one_rank(deltas, draw, name)
    factors = [weights[index] * delta.scale for index, delta in there]
    roots = [sqrt(abs(factor)) for factor in factors]
    signed = [-root if factor < 0 else root for root, factor in zip(roots, factors, strict=True)]
    return fused(there, roots, signed, draw, prune, fuse)


def of_one_rank(deltas: Sequence[LowRank], draw: Draw, name: str) -> list[tuple[int, LowRank]]:
    """Those that are there, each with its place.

    Raises:
        UsageError: their ranks differ.
    """
    there = [(index, delta) for index, delta in enumerate(deltas) if delta.rank]
    ranks = [delta.rank for _, delta in there]
    if len(set(ranks)) > 1:
        raise UsageError(
            f"{name} needs adapters of the same rank, but on '{draw.module}' they have {', '.join(map(str, ranks))}: "
            f"take '{name.partition(':')[2]}', which works on the deltas themselves"
        )
    return there


def fused(
    there: Sequence[tuple[int, LowRank]], for_left: Sequence[float], for_right: Sequence[float], draw: Draw,
    prune: Prune, fuse: Fuse,
) -> LowRank:  # fmt: skip
    """Prune and fuse the A's, then the B's, with weights for each; an adapter draws for its A first."""
    import torch

    chances = [draw.generator(index) for index, _ in there]
    rights = [prune(_wide(delta.A), chance) for (_, delta), chance in zip(there, chances, strict=True)]
    lefts = [prune(_wide(delta.B), chance) for (_, delta), chance in zip(there, chances, strict=True)]
    return LowRank(fuse(torch.stack(lefts), for_left), fuse(torch.stack(rights), for_right))


def whole(values: torch.Tensor, chance: torch.Generator) -> torch.Tensor:
    return values


def top(density: float) -> Prune:
    def prune(values: torch.Tensor, chance: torch.Generator) -> torch.Tensor:
        import torch

        # of equal values torch.topk keeps others than a sort does: 16-bit factors have many of them
        largest = torch.topk(values.abs().flatten(), int(density * values.numel())).indices
        mask = torch.zeros_like(values).flatten().index_fill_(0, largest, 1)
        return values * mask.view_as(values)

    return prune if density < 1 else whole


def _random(density: float) -> Prune:
    def prune(values: torch.Tensor, chance: torch.Generator) -> torch.Tensor:
        return values * kept_at_random(tuple(values.shape), density, chance, values.device) / density

    return prune if density < 1 else whole


def summed(values: torch.Tensor, weights: Sequence[float]) -> torch.Tensor:
    return elementwise.weighted(values, weights).sum(dim=0)


def disjoint(majority_sign: str) -> Fuse:
    return lambda values, weights: elementwise.disjoint_mean(values, weights, majority_sign)


def _wide(factor: torch.Tensor) -> torch.Tensor:
    """At least float32, as PEFT holds the factors of 16-bit adapters."""
    import torch

    return factor if factor.dtype == torch.float64 else factor.float()
