"""Methods that look at each value of the dense deltas: some values are dropped, the others fused.

PEFT's operators (peft/utils/merge_utils.py), on the delta itself: PEFT's own forms without `_svd` put them on the two
factors, where a value means nothing (B Q and Q⁻¹ A are the same delta). The result is one dense float32 matrix, made a
block of rows at a time; of the deltas no more than a block is ever in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from lorakit.mix.methods.blocks import Dense, Largest, row_blocks
from lorakit.mix.methods.low_rank import Draw, LowRank, kept_at_random

if TYPE_CHECKING:
    import torch

Blocks = Iterator["torch.Tensor"]


def magnitude_prune(deltas: Sequence[LowRank], weights: Sequence[float], *, draw: Draw, density: float) -> torch.Tensor:
    """Σ w · top(Δ): of each delta the share `density` of largest magnitude (as PEFT's `magnitude_prune`)."""
    return _fused([trimmed(Dense.of(delta), density) for delta in deltas], deltas, _summed(weights))


def ties(
    deltas: Sequence[LowRank], weights: Sequence[float], *, draw: Draw, density: float, majority_sign: str
) -> torch.Tensor:
    """Trim, elect a sign for each value, and average those that have it: TIES-Merging (arXiv:2306.01708).

    τᵢ = top(Δᵢ); γ = sgn(Σ τᵢ), or sgn(Σ sgn τᵢ) for the majority "frequency"; Σ_{sgn τᵢ = γ} wᵢ τᵢ / #{sgn τᵢ = γ}.
    As PEFT has it, signs are elected before the weights, and a tie goes to +.
    """
    return _fused([trimmed(Dense.of(delta), density) for delta in deltas], deltas, _elected(weights, majority_sign))


def dare_linear(deltas: Sequence[LowRank], weights: Sequence[float], *, draw: Draw, density: float) -> torch.Tensor:
    """Σ w · m ∘ Δ / density, m ~ Bernoulli(density): Drop And REscale (arXiv:2311.03099). Its mean is Σ w Δ."""
    return _fused(_dropped(deltas, draw, density), deltas, _summed(weights))


def dare_ties(
    deltas: Sequence[LowRank], weights: Sequence[float], *, draw: Draw, density: float, majority_sign: str
) -> torch.Tensor:
    """DARE instead of TIES' trimming, then TIES' election and mean (arXiv:2311.03099)."""
    return _fused(_dropped(deltas, draw, density), deltas, _elected(weights, majority_sign))


def della(
    deltas: Sequence[LowRank], weights: Sequence[float], *, draw: Draw, density: float, epsilon: float
) -> torch.Tensor:
    """Drop small values more often than large ones, then elect and fuse: DELLA-Merging (arXiv:2406.11617).

    In a row of n values the one of rank r by magnitude (0 the largest) is dropped with probability
    p = 1 − density − ε/2 + ε r/n; what is kept is divided by 1 − p. Signs are elected and values averaged as in TIES.
    """
    streams = [
        sampled_by_rank(Dense.of(delta), density, epsilon, draw.generator(index)) for index, delta in enumerate(deltas)
    ]
    return _fused(streams, deltas, _elected(weights, "total"))


def breadcrumbs(
    deltas: Sequence[LowRank], weights: Sequence[float], *, draw: Draw, density: float, gamma: float
) -> torch.Tensor:
    """Σ w · m ∘ Δ, where m leaves out the share `gamma` of largest magnitude and keeps the share `density` below it.

    Model Breadcrumbs (arXiv:2312.06795): outliers and small values both go.
    """
    return _fused([without_outliers(Dense.of(delta), density, gamma) for delta in deltas], deltas, _summed(weights))


def weighted_sum(deltas: Sequence[LowRank], weights: Sequence[float], *, draw: Draw) -> torch.Tensor:
    """Σ w s B A as a dense matrix."""
    return _fused([Dense.of(delta).blocks() for delta in deltas], deltas, _summed(weights))


def trimmed(dense: Dense, density: float) -> Blocks:
    """The int(density · size) values of largest magnitude, zeros for the rest."""
    count = int(density * dense.shape[0] * dense.shape[1])
    largest = Largest(dense, count)
    return (block * largest.mask(block) for block in dense.blocks())


def without_outliers(dense: Dense, density: float, gamma: float) -> Blocks:
    """The int(density · size) values of largest magnitude after the int(gamma · size) largest; zeros for the rest."""
    size = dense.shape[0] * dense.shape[1]
    outliers = int(gamma * size)
    above, kept = Largest(dense, outliers), Largest(dense, min(size, outliers + int(density * size)))
    return (block * (kept.mask(block) & ~above.mask(block)) for block in dense.blocks())


def sampled_by_rank(dense: Dense, density: float, epsilon: float, generator: torch.Generator) -> Blocks:
    """DELLA's MAGPRUNE: each value kept with a probability by its rank in its row, and divided by it."""
    import torch

    for block in dense.blocks():
        order = block.abs().argsort(dim=1, descending=True, stable=True)
        by_rank = density + epsilon / 2 - epsilon * torch.arange(block.shape[1], device=block.device) / block.shape[1]
        share = torch.empty_like(block).scatter_(1, order, by_rank.to(block.dtype).expand_as(block))
        yield block * kept_at_random(tuple(block.shape), share, generator, block.device) / share


def _dropped(deltas: Sequence[LowRank], draw: Draw, density: float) -> list[Blocks]:
    return [_kept_and_rescaled(Dense.of(delta), density, draw.generator(index)) for index, delta in enumerate(deltas)]


def _kept_and_rescaled(dense: Dense, density: float, generator: torch.Generator) -> Blocks:
    for block in dense.blocks():
        yield block * kept_at_random(tuple(block.shape), density, generator, block.device) / density


Fuse = Callable[["torch.Tensor"], "torch.Tensor"]


def _fused(streams: Sequence[Blocks], deltas: Sequence[LowRank], fuse: Fuse) -> torch.Tensor:
    """(out, in) in float32: the blocks of all deltas, taken together, stacked in float64 and fused."""
    import torch

    shape = deltas[0].shape
    merged = torch.empty(shape, dtype=torch.float32, device=deltas[0].B.device)
    for rows, *blocks in zip(row_blocks(*shape), *streams, strict=True):
        merged[rows] = fuse(torch.stack(blocks).double())
    return merged


def _summed(weights: Sequence[float]) -> Fuse:
    return lambda values: weighted(values, weights).sum(dim=0)


def _elected(weights: Sequence[float], majority_sign: str) -> Fuse:
    return lambda values: disjoint_mean(values, weights, majority_sign)


def weighted(values: torch.Tensor, weights: Sequence[float]) -> torch.Tensor:
    """wᵢ times values[i], whatever the other dimensions."""
    return values * values.new_tensor(weights).view(-1, *[1] * (values.dim() - 1))


def ties_in_memory(
    values: Sequence[torch.Tensor], weights: Sequence[float], density: float, majority_sign: str
) -> torch.Tensor:
    """TIES on small matrices that are there as a whole: cores, or the factors of a joint SVD."""
    import torch

    trimmed_values = torch.stack([value * largest_in_memory(value, density) for value in values])
    return disjoint_mean(trimmed_values, weights, majority_sign)


def largest_in_memory(values: torch.Tensor, density: float) -> torch.Tensor:
    """A mask of the int(density · size) values of largest magnitude; of equal ones, the first."""
    import torch

    order = values.abs().flatten().argsort(descending=True, stable=True)
    mask = torch.zeros_like(order, dtype=torch.bool)
    mask[order[: int(density * values.numel())]] = True
    return mask.view_as(values)


def disjoint_mean(values: torch.Tensor, weights: Sequence[float], majority_sign: str) -> torch.Tensor:
    """TIES' last two steps on values (adapters, …): elect signs, then the weighted mean of the values that agree."""
    signs = values.sign()
    votes = (values if majority_sign == "total" else signs).sum(dim=0)
    agree = signs == (votes >= 0).to(values.dtype) * 2 - 1
    return (weighted(values, weights) * agree).sum(dim=0) / agree.sum(dim=0).clamp(min=1)
