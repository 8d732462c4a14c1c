"""What a merging method is given: the deltas of one module, and chance that can be had again."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class LowRank:
    """One adapter's delta of one module, in memory: scale · B A.

    An adapter that has nothing for the module is a delta of rank 0: B (out, 0), A (0, in).
    """

    B: torch.Tensor  # (out, r), as stored
    A: torch.Tensor  # (r, in)
    scale: float = 1.0

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of B A."""
        return self.B.shape[0], self.A.shape[1]

    def left(self) -> torch.Tensor:
        """scale · B in float64."""
        return self.B.double() * self.scale

    def right(self) -> torch.Tensor:
        """A in float64."""
        return self.A.double()


@dataclass(frozen=True, slots=True)
class Draw:
    """Chance for one module: a stream of its own for each adapter, from SHA-256 of seed, module and adapter.

    The streams are drawn on the CPU, value by value in row-major order, so what is drawn depends neither on the number
    of threads, nor on the device, nor on how a matrix is cut into blocks, nor on which modules were done before.
    """

    seed: int
    module: str

    def generator(self, adapter: int) -> torch.Generator:
        """A CPU generator at the beginning of the stream of the adapter of that index."""
        import torch

        digest = sha256(f"{self.seed}\n{self.module}\n{adapter}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))


def kept_at_random(
    shape: tuple[int, ...], share: float | torch.Tensor, generator: torch.Generator, device: torch.device
) -> torch.Tensor:
    """A mask of `shape`, True with probability `share` (of one value or of each)."""
    import torch

    drawn = torch.rand(shape, generator=generator).to(device)
    return drawn < share
