"""Low-rank approximations of products of thin factors: the optimum of a full SVD, at a thousandth of its price.

QR of both factors, then an SVD of the small core: B A = Q_B (R_B R_Aᵀ) Q_Aᵀ, with orthonormal Q (Golub and Van Loan,
Matrix Computations, §5.4). By Eckart and Young its first k singular triples are the best approximation of rank k.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import isfinite
from threading import RLock
from typing import TYPE_CHECKING, TypeAlias

from lorakit.errors import UsageError

if TYPE_CHECKING:
    import torch

NOISE = 1e-14  # of the sum of ‖terms‖

Factors: TypeAlias = "tuple[torch.Tensor, torch.Tensor]"  # B (m, r) and A (r, n)


def product_svd(left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """U (m, k), S (k), Vh (k, n) of left (m, R) times right (R, n), in their dtype; k = min(R, m, n)."""
    import torch

    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.T)
    u, s, vh = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
    return q_left @ u, s, vh @ q_right.T


def spectrum_and_cut(
    left: torch.Tensor, right: torch.Tensor
) -> tuple[torch.Tensor, Callable[[int], tuple[torch.Tensor, torch.Tensor]]]:
    """S of left (m, R) times right (R, n), and what gives the best factors B (m, k) and A (k, n) of a rank k.

    Those are in float32, with √σ in each, so that neither is far from 1. What float64 can't tell from zero is 0 in S.
    No Q is formed: with right = R_rᵀ Q_rᵀ, left singular vectors are left · right · v / σ = left · (R_rᵀ v') / σ, and
    right ones likewise: products alone, in a fifth of the time.
    """
    import torch

    r_left = torch.linalg.qr(left, mode="r")[1]
    r_right = torch.linalg.qr(right.T, mode="r")[1]
    u, s, vh = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
    noise = noise_of(r_left, r_right.T)
    if not isfinite(noise):
        raise UsageError("a delta is too large for float64: give smaller weights")
    s = s.where(s > noise, 0.0)

    def cut_to(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        root = s[:rank].rsqrt().where(s[:rank] > 0, 0.0)
        b = left @ (r_right.T @ vh[:rank].T * root)
        a = (root[:, None] * (u[:, :rank].T @ r_left)) @ right
        return b.float().contiguous(), a.float().contiguous()

    return s, cut_to


def noise_of(left: torch.Tensor, right: torch.Tensor) -> float:
    """What float64 can't tell from zero in left · right, where its terms cancel: of each term by itself, as one may be
    as large in the one factor as it is small in the other.
    """
    return NOISE * float((left.norm(dim=0) * right.norm(dim=1)).sum())


def product_spectrum(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """S (k) of left (m, R) times right (R, n), k = min(R, m, n), largest first."""
    import torch

    r_left = torch.linalg.qr(left, mode="r")[1]
    r_right = torch.linalg.qr(right.T, mode="r")[1]
    spectrum: torch.Tensor = torch.linalg.svdvals(r_left @ r_right.T)
    return spectrum


def inner_product(one: Factors, other: Factors) -> float:
    """⟨B₁A₁, B₂A₂⟩ = tr((B₁ᵀB₂)(A₂A₁ᵀ)), for B (m, r) and A (r, n)."""
    return float(((one[0].T @ other[0]) * (one[1] @ other[1].T)).sum())


def rank_for_energy(spectrum: Sequence[float], energy: float, total: float | None = None) -> int:
    """The smallest rank that keeps the share `energy` of ‖Δ‖² (`total`, else Σ σ²). 0 for a delta of nothing."""
    squares = [value * value for value in spectrum]
    wanted = energy * (sum(squares) if total is None else total)
    if energy >= 1:
        noise = spectrum[0] * 1e-12 if spectrum else 0.0
        return sum(value > noise for value in spectrum)
    kept, rank = 0.0, 0
    while kept < wanted and rank < len(squares):
        kept += squares[rank]
        rank += 1
    return rank


def ranks_within(spectra: Mapping[str, Sequence[float]], costs: Mapping[str, int], budget: int) -> dict[str, int]:
    """Ranks of all modules such that Σ rank · cost ≤ `budget`, keeping as much of Σ σ² as a greedy choice finds.

    A rank of a module costs out + in parameters; triples are taken by σ² a parameter, largest first (a global threshold
    on singular values, as in PARA, arXiv:2604.27796, with the price of each in it).

    Raises:
        UsageError: nothing fits into the budget.
    """
    triples = ((module, sigma) for module, spectrum in spectra.items() for sigma in spectrum if sigma)
    offers = sorted(((sigma**2 / costs[module], module) for module, sigma in triples), key=lambda offer: -offer[0])
    ranks = dict.fromkeys(spectra, 0)
    left = budget
    full: set[str] = set()
    for _, module in offers:
        # a module whose next triple did not fit takes none of its smaller ones either
        if module in full or costs[module] > left:
            full.add(module)
            continue
        ranks[module] += 1
        left -= costs[module]
    if offers and not any(ranks.values()):
        cheapest = min(costs[module] for _, module in offers)
        raise UsageError(f"a budget of {budget} parameters holds nothing: one rank of one module takes {cheapest}")
    return ranks


def cut(u: torch.Tensor, s: torch.Tensor, vh: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """B (m, rank) and A (rank, n) in float32 from the first triples, with √σ in each, so that neither is far from 1."""
    root = s[:rank].sqrt()
    return (u[:, :rank] * root).float().contiguous(), (root[:, None] * vh[:rank]).float().contiguous()


_ALONE = RLock()
_alone: list[int] = []  # how many threads there were, for each that runs now


@contextmanager
def one_thread() -> Iterator[None]:
    """For thin factors: more gain nothing, and cost much where they wait for one another on a busy machine."""
    import torch

    with _ALONE:
        _alone.append(_alone[0] if _alone else torch.get_num_threads())
        torch.set_num_threads(1)
    try:
        yield
    finally:
        with _ALONE:
            before = _alone.pop()
            if not _alone:
                torch.set_num_threads(before)
