"""From float32 to the dtype that is written: to nearest, or stochastically; and what of a change survives it.

A bf16 weight has 8 bits: of a delta much smaller than half a unit in its last place, rounding to nearest keeps little.
The survival ⟨W′-W, Δ⟩ / ‖Δ‖² says how much: 1 when nothing is lost on the whole, 0 when nothing is left.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lorakit.files.tensors import torch_dtype

if TYPE_CHECKING:
    from lorakit.merge.apply import Memory
    from lorakit.merge.plan import ComputeTensor


@dataclass(slots=True)
class Survival:
    """Sums over the blocks of one tensor, of what was changed and what is left of it."""

    kept: float = 0.0  # ⟨W′-W, Δ⟩
    norm: float = 0.0  # ‖Δ‖²
    weight: float = 0.0  # ‖W‖²

    def add(self, stored: torch.Tensor, total: torch.Tensor, rounded: torch.Tensor, memory: Memory) -> None:
        shape = (total.shape[0], total.shape[1])
        base = memory.take("base", shape, total.dtype, str(total.device), False).copy_(stored)
        left = memory.take("left", shape, total.dtype, str(total.device), False).copy_(rounded).sub_(base)
        delta = total.sub_(base)  # the exact sum isn't needed any more
        flat = delta.reshape(-1)
        self.norm += float(torch.dot(flat, flat))
        self.kept += float(torch.dot(left.reshape(-1), flat))
        base = base.reshape(-1)
        self.weight += float(torch.dot(base, base))

    @property
    def ratio(self) -> float | None:
        """None where nothing was to change, or no rounding happened."""
        return self.kept / self.norm if self.norm else None


@dataclass(frozen=True, slots=True)
class Rounding:
    """`nearest`, ties to even; or `stochastic`: up or down with the probability that keeps the mean (seeded)."""

    mode: str = "nearest"
    seed: int = 0

    def rounded(
        self, total: torch.Tensor, tensor: ComputeTensor, first: int, memory: Memory, device: str
    ) -> torch.Tensor:
        dtype = torch_dtype(tensor.target.dtype)
        shape = (total.shape[0], total.shape[1])
        if dtype == total.dtype:
            return total
        nearest = memory.take("rounded", shape, dtype, device, False).copy_(total)
        if self.mode == "nearest" or dtype.itemsize != 2 or not tensor.steps:
            return nearest
        return self._stochastic(total, nearest, f"{self.seed} {tensor.target.name} {first}")

    @staticmethod
    def _stochastic(total: torch.Tensor, nearest: torch.Tensor, seed: str) -> torch.Tensor:
        """Go to the neighbour on the other side with the probability (x - nearest) / (neighbour - nearest).

        The bits of a 16-bit float, read as a whole number, count its values: one more is the next one away from zero.
        """
        generator = torch.Generator(total.device)
        generator.manual_seed(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], "little") >> 1)
        rest = total - nearest.to(total.dtype)
        outward = (rest > 0) == (total >= 0)
        step = torch.where(outward, 1, -1).to(torch.int16)
        other = (nearest.view(torch.int16) + step).view(nearest.dtype)
        gap = other.to(total.dtype) - nearest.to(total.dtype)
        chance = torch.where(gap != 0, rest / gap, 0.0)
        drawn = torch.rand(total.shape, generator=generator, device=total.device, dtype=torch.float32)
        change = (rest != 0) & (nearest != 0) & other.isfinite() & (drawn < chance)
        return torch.where(change, other, nearest)
