"""What should come out, in float64 and dense, and how near a low rank can come to it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mixing.pairs import DENSITY, SCALE, WEIGHTS, read_factors

if TYPE_CHECKING:
    import torch


def weighted_sum(pair: Path) -> torch.Tensor:
    return sum(weight * delta for delta, weight in zip(deltas(pair), WEIGHTS.values(), strict=True))


def ties(pair: Path) -> torch.Tensor:
    """As PEFT defines it (peft/utils/merge_utils.py): trim, elect each sign, and the mean of what agrees."""
    import torch

    trimmed = []
    for delta in deltas(pair):
        values = delta.abs().flatten()
        least = values.kthvalue(values.numel() - int(DENSITY * values.numel()) + 1).values
        trimmed.append(torch.where(delta.abs() >= least, delta, 0.0))
    elected = torch.where(sum(trimmed) >= 0, 1.0, -1.0)
    agree = [delta.sign() == elected for delta in trimmed]
    kept = sum(weight * delta * mask for delta, mask, weight in zip(trimmed, agree, WEIGHTS.values(), strict=True))
    return kept / sum(mask.double() for mask in agree).clamp(min=1)


def deltas(pair: Path) -> list[torch.Tensor]:
    """Of a pair with one module, dense in float64."""
    found = []
    for name in WEIGHTS:
        ((b, a),) = read_factors(pair / name).values()
        found.append(SCALE * (b.double() @ a.double()))
    return found


def error(target: torch.Tensor, b: torch.Tensor, a: torch.Tensor) -> float:
    """‖target - B A‖, in float64 by blocks of rows."""
    parts = zip(target.split(1024), b.double().split(1024), strict=True)
    return sum(float((rows.double() - part @ a.double()).square().sum()) for rows, part in parts) ** 0.5


def least_error(target: torch.Tensor, rank: int) -> float:
    """Of any product of that rank, by the eigenvalues of M Mᵀ in float64 (Eckart and Young)."""
    import torch

    m = (target if target.shape[0] <= target.shape[1] else target.T).double()
    gram = m @ m.T
    return float(torch.linalg.eigvalsh(gram)[:-rank].clamp(min=0).sum().sqrt())
