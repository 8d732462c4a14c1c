"""The leading singular triples of a large matrix, at the price of a few products with thin blocks.

Halko, Martinsson and Tropp (arXiv:0909.4061), Algorithms 4.4 and 5.1: an orthonormal basis Q of the range of
(M Mᵀ)^q M Ω with a random block Ω, made orthonormal again at every step, and then the SVD of the small matrix Qᵀ M.
q grows until one more gains nothing to speak of: flat spectra, which are the hardest, need most.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import inf, sqrt
from typing import TYPE_CHECKING, TypeAlias

from lorakit.adapters.truncation import rank_for_energy

if TYPE_CHECKING:
    import torch

Product = Callable[["torch.Tensor"], "torch.Tensor"]
Triples: TypeAlias = "tuple[torch.Tensor, torch.Tensor, torch.Tensor]"  # U, S, Vh

SHORT = 384  # a side of which a full SVD takes no time to speak of
OVERSAMPLE = 24
ITERATIONS = 60  # at most; without a norm to measure by, always WITHOUT_NORM
WITHOUT_NORM = 4  # within half a percent of the optimum, of flat spectra, too
GAIN = 5e-3  # of the square of the error: where all further iterations together gain less, they are left out
SLOWEST = 0.98
FIRST_BLOCK = 32  # where the rank is not known, it is looked for among so many triples first
ROWS = 1024  # of a block for sums in float64
CANCELLED = 1e-4  # of ‖M‖²: below it, ‖M‖² - Σσ² is mostly rounding
FLOAT64_ELEMENTS = 1 << 24


@dataclass(frozen=True, slots=True)
class Truncated:
    """The first k singular triples of M, largest first: U (m, k), S (k), Vh (k, n), in float64.

    `norm` is ‖M‖, `rest` is ‖M - U S Vh‖, both measured.
    """

    U: torch.Tensor
    S: torch.Tensor
    Vh: torch.Tensor
    norm: float
    rest: float

    @property
    def rank(self) -> int:
        return int(self.S.numel())

    @property
    def error(self) -> float:
        """‖M - U S Vh‖ / ‖M‖; 0 for a matrix of zeros."""
        return self.rest / self.norm if self.norm else 0.0

    @property
    def spectrum(self) -> list[float]:
        found: list[float] = self.S.tolist()
        return found

    def first(self, rank: int) -> Truncated:
        """The first triples alone: what is left of M is orthogonal to those that go, so the squares add up."""
        gone = float(self.S[rank:].square().sum())
        rest = sqrt(self.rest**2 + gone)
        return replace(self, U=self.U[:, :rank], S=self.S[:rank], Vh=self.Vh[:rank], rest=rest)

    def above(self, floor: float) -> Truncated:
        """The triples whose singular value is above `floor`, and above what float32 products make of zero."""
        import torch

        if not self.rank:
            return self
        noise = torch.finfo(torch.float32).eps * max(self.U.shape[0], self.Vh.shape[1]) ** 0.5 * float(self.S[0])
        return self.first(int((max(floor, noise) < self.S).sum()))


def randomised_svd(
    times: Product,
    transposed_times: Product,
    shape: tuple[int, int],
    rank: int,
    *,
    norm: float | None = None,
    gain: float = GAIN,
    iterations: int | None = None,
    oversample: int = OVERSAMPLE,
    generator: torch.Generator | None = None,
    start: torch.Tensor | None = None,
    otherwise: Callable[[], Triples] | None = None,
) -> Triples:
    """U (m, k), S (k), Vh (k, n) of M of `shape` in float64, k = min(rank, m, n), from its products alone.

    `times` gives M X for X (n, l), `transposed_times` Mᵀ Y for Y (m, l); both may be float32. `start` (n, j) is what
    is known of the row space already. With M's Frobenius `norm`, the iterations end when all others together would
    gain less than the share `gain` of the square of the error. Where the
    last of them was not enough, `otherwise` gives the triples. The draws come from `generator`, on the CPU always.
    """
    import torch

    columns = min(rank + oversample, *shape)
    block = torch.randn(shape[1], columns, generator=generator)
    if start is not None:
        known = start[:, :columns].cpu().float()
        block = torch.cat([known, block[:, known.shape[1] :]], dim=1)
    basis = _orthonormal(times(block))
    q, r = torch.linalg.qr(transposed_times(basis).double())
    rest = gained = inf
    for _ in range(iterations or (WITHOUT_NORM if norm is None else ITERATIONS)):
        if norm is not None:
            before, rest = rest, max(0.0, norm**2 - float(torch.linalg.svdvals(r)[:rank].square().sum()))
            last, gained = gained, max(0.0, before - rest)
            # gains shrink by about the same factor each time: what all those to come would add up to
            factor = min(gained / last, SLOWEST) if 0 < last < inf else SLOWEST
            if gained < inf and gained * factor / (1 - factor) <= gain * rest:
                break
        basis = _orthonormal(times(q))
        q, r = torch.linalg.qr(transposed_times(basis).double())
    else:
        if otherwise is not None:
            return otherwise()
    u, s, vh = torch.linalg.svd(r.T)
    return (basis.double() @ u)[:, :rank], s[:rank], (vh @ q.T)[:rank]


def truncated_svd(
    matrix: torch.Tensor,
    rank: int,
    *,
    generator: torch.Generator | None = None,
    start: torch.Tensor | None = None,
    norm: float | None = None,
    gain: float = GAIN,
) -> Truncated:
    """The first `rank` triples of a dense matrix (m, n) in float32: exactly where a side is short, else randomised."""
    norm = frobenius_norm(matrix) if norm is None else norm
    if min(matrix.shape) <= max(SHORT, 2 * (rank + OVERSAMPLE)):
        u, s, vh = _first(_whole_svd(matrix), rank)
    else:
        u, s, vh = randomised_svd(
            lambda block: matrix @ block.to(matrix),
            lambda block: matrix.T @ block.to(matrix),
            (matrix.shape[0], matrix.shape[1]),
            rank,
            norm=norm,
            gain=gain,
            generator=generator,
            start=start,
            # of a spectrum that is all but flat; what is content with less does not pay for it
            otherwise=(lambda: _first(_whole_svd(matrix), rank)) if gain < GAIN else None,
        )
    return Truncated(u, s, vh, norm, _norm_of_the_rest(matrix, u, s, vh, norm))


def svd_for_energy(
    matrix: torch.Tensor,
    energy: float,
    *,
    floor: float = 0.0,
    max_rank: int | None = None,
    generator: torch.Generator | None = None,
    norm: float | None = None,
    gain: float = GAIN,
) -> Truncated:
    """As few triples of a dense matrix as keep the share `energy` of ‖M‖²; none at or below `floor`.

    The block doubles until that is reached, or the floor, or `max_rank`.
    """
    most = min(*matrix.shape, max_rank or min(matrix.shape))
    norm = frobenius_norm(matrix) if norm is None else norm
    block, start = min(FIRST_BLOCK, most), None
    while True:
        found = truncated_svd(matrix, block, generator=generator, start=start, norm=norm, gain=gain)
        clean = found.above(floor)
        enough = clean.norm**2 - clean.rest**2 >= energy * norm**2
        if enough or clean.rank < found.rank or block == most:
            return clean.first(rank_for_energy(clean.spectrum, energy, norm**2))
        block, start = min(2 * block, most), found.Vh.T


def frobenius_norm(matrix: torch.Tensor) -> float:
    """Summed in float64, by blocks of rows."""
    return sqrt(sum(float(rows.double().square().sum()) for rows in row_blocks(matrix)))


def row_blocks(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Its rows, so many at once that float64 copies of them stay small."""
    for first in range(0, len(tensor), ROWS):
        yield tensor[first : first + ROWS]


def _orthonormal(block: torch.Tensor) -> torch.Tensor:
    import torch

    basis: torch.Tensor = torch.linalg.qr(block.double())[0]
    return basis


def _first(triples: Triples, rank: int) -> Triples:
    u, s, vh = triples
    return u[:, :rank], s[:rank], vh[:rank]


def _whole_svd(matrix: torch.Tensor) -> Triples:
    import torch

    exact = matrix.double() if matrix.numel() <= FLOAT64_ELEMENTS else matrix
    u, s, vh = torch.linalg.svd(exact, full_matrices=False)
    return u.double(), s.double(), vh.double()


def _norm_of_the_rest(matrix: torch.Tensor, u: torch.Tensor, s: torch.Tensor, vh: torch.Tensor, norm: float) -> float:
    """‖M - U S Vh‖ = √(‖M‖² - Σσ²), as U S Vh is a projection of M; where that cancels, the difference itself."""
    square = norm**2 - float(s.square().sum())
    if square > CANCELLED * norm**2:
        return sqrt(square)
    parts = zip(row_blocks(matrix), row_blocks(u * s), strict=True)
    return sqrt(sum(float((rows.double() - part @ vh).square().sum()) for rows, part in parts))
