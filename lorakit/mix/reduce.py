"""Changes of modules as factors of a chosen rank, with what the choice lost, measured.

What is of low rank is cut by QR and a small SVD: the optimum. What a method gives dense is cut by a randomised SVD,
to five digits of it. Nothing is computed until a module's factors are asked for, but for a budget, which has to
know all singular values.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lorakit.adapters.delta import Delta, Kind, Made, made
from lorakit.adapters.randomised import Truncated, svd_for_energy, truncated_svd
from lorakit.adapters.report import ModuleReport
from lorakit.adapters.truncation import cut, one_thread, rank_for_energy, ranks_within, spectrum_and_cut
from lorakit.errors import UsageError
from lorakit.mix.methods.low_rank import Draw

if TYPE_CHECKING:
    import torch

GAIN = 1e-6  # of the square of the error: what may be left to gain, so that it is the optimum's to 1e-5
MOST = 512  # the largest rank that vLLM serves


@dataclass(frozen=True, slots=True)
class RankChoice:
    """How the rank of each module is chosen; exact when nothing is said.

    `rank` for all; `energy`, the share of each module's ‖Δ‖² to keep; `budget`, the parameters of all factors together.

    Raises:
        UsageError: more than one is given, or one is out of range.
    """

    rank: int | None = None
    energy: float | None = None
    budget: int | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("rank", "energy", "budget") if getattr(self, name) is not None]
        if len(given) > 1:
            raise UsageError(f"{' and '.join(given)} both choose the rank: give one of them")
        if self.rank is not None and self.rank < 1:
            raise UsageError(f"rank {self.rank}: it has to be 1 or more, or 'exact'")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise UsageError(f"energy {self.energy:g}: it is the share of ‖Δ‖² to keep, above 0 and at most 1")
        if self.budget is not None and self.budget < 1:
            raise UsageError(f"budget {self.budget}: it counts parameters, and has to be 1 or more")

    @property
    def is_exact(self) -> bool:
        return self.rank is None and self.energy is None and self.budget is None

    def as_dict(self) -> dict[str, Any]:
        if self.is_exact:
            return {"rank": "exact"}
        return {name: value for name in ("rank", "energy", "budget") if (value := getattr(self, name)) is not None}


@dataclass(frozen=True, slots=True)
class Dense:
    """A module's change that is of no low rank: `make` gives it, (out, in) in float32, anew each time."""

    shape: tuple[int, int]
    make: Callable[[], torch.Tensor]
    module: str
    kind: Kind = "linear"


Change = Delta | Dense


@dataclass(slots=True)
class Reduced:
    """Deltas of the chosen ranks; `measured` fills as their factors are computed."""

    deltas: dict[str, Delta] = field(default_factory=dict)
    measured: dict[str, ModuleReport] = field(default_factory=dict)

    def reports(self) -> dict[str, ModuleReport]:
        """Of every module, computing what was not computed yet, one module a core."""
        missing = [module for module in self.deltas if module not in self.measured]
        with one_thread(), ThreadPoolExecutor(os.cpu_count()) as pool:
            for module, report in zip(missing, pool.map(self._report, missing), strict=True):
                self.measured[module] = report
        return {module: self.measured[module] for module in (*self.deltas, *self.measured)}

    def _report(self, module: str) -> ModuleReport:
        delta = self.deltas[module]
        factors = [term.load() for term in delta.terms if isinstance(term, Made)]
        if factors and module in self.measured:
            return self.measured[module]
        return ModuleReport(delta.rank, delta.norm(), 0.0)


def reduced(changes: Mapping[str, Change], choice: RankChoice, keep: Collection[str] = ()) -> Reduced:
    """Each change as factors of the rank that `choice` gives it; a module that a budget has nothing for is left out,
    unless it is among those to keep, or none would be left.

    Raises:
        UsageError: a budget holds nothing, or a dense change is of a larger rank than an adapter can be.
    """
    result = Reduced()
    ranks = _ranks_within(changes, choice.budget, result) if choice.budget is not None else {}
    for module, change in changes.items():
        if choice.is_exact and isinstance(change, Dense):
            _require_small(change)
        if choice.budget is not None and not ranks[module]:
            if module in keep or not any(ranks.values()):
                result.deltas[module] = _nothing(change)
            continue
        wanted = RankChoice(rank=ranks[module]) if choice.budget is not None else choice
        if isinstance(change, Delta) and (wanted.is_exact or _fits(change, wanted)):
            result.deltas[module] = change
        else:
            result.deltas[module] = _lazily(module, change, wanted, result)
    return result


def _nothing(change: Change) -> Delta:
    def make() -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        return torch.zeros(shape[0], 0), torch.zeros(0, shape[1])

    shape = change.terms[0].shape if isinstance(change, Delta) else change.shape
    return Delta((made(shape, make, 0),), change.kind)


def _fits(change: Delta, wanted: RankChoice) -> bool:
    """Whether its rank is known, without computing it, to be no larger than wanted."""
    known = change.known_rank
    return wanted.rank is not None and known is not None and known <= wanted.rank


def _lazily(module: str, change: Change, wanted: RankChoice, result: Reduced) -> Delta:
    def make() -> tuple[torch.Tensor, torch.Tensor]:
        if isinstance(change, Delta):
            spectrum, cut_to = spectrum_and_cut(*change.stacked())
            rank = _rank_of(spectrum.tolist(), wanted)
            result.measured[module] = ModuleReport(rank, float(spectrum.norm()), float(spectrum[rank:].norm()))
            return cut_to(rank)
        found = _decomposed(change, wanted)
        result.measured[module] = ModuleReport(found.rank, found.norm, found.rest)
        return cut(found.U, found.S, found.Vh, found.rank)

    shape = change.terms[0].shape if isinstance(change, Delta) else change.shape
    there = change.known_rank if isinstance(change, Delta) else None
    known = min(wanted.rank, there, *shape) if wanted.rank is not None and there is not None else None
    return Delta((made(shape, make, known),), change.kind)


def _decomposed(change: Dense, wanted: RankChoice) -> Truncated:
    """The leading singular triples of B A (of an embedding, too), as many as are wanted."""
    matrix = change.make()
    if not matrix.isfinite().all():
        raise UsageError(f"the method's change of '{change.module}' is too large for float32: give smaller weights")
    generator = Draw(0, change.module).generator(0)
    if wanted.energy is not None and wanted.energy < 1:
        return svd_for_energy(matrix, wanted.energy, generator=generator, gain=GAIN)
    if wanted.rank is not None:
        return truncated_svd(matrix, min(wanted.rank, *matrix.shape), generator=generator, gain=GAIN)
    return truncated_svd(matrix, min(matrix.shape)).above(0.0)


def _rank_of(spectrum: list[float], wanted: RankChoice) -> int:
    if wanted.energy is not None:
        return rank_for_energy(spectrum, wanted.energy)
    return len(spectrum) if wanted.rank is None else min(wanted.rank, len(spectrum))


def _require_small(change: Dense) -> None:
    if min(change.shape) > MOST:
        raise UsageError(
            f"the method's change of '{change.module}' {list(change.shape)} is of full rank, so no adapter of rank "
            f"{MOST} or less (the most that vLLM serves) is exact: name --rank N or --energy E"
        )


def _ranks_within(changes: Mapping[str, Change], budget: int, result: Reduced) -> dict[str, int]:
    """The rank of each module; those that get none are entered as lost."""
    spectra: dict[str, list[float]] = {}
    norms: dict[str, float] = {}
    with one_thread():
        for module, change in changes.items():
            if isinstance(change, Delta):
                found = spectrum_and_cut(*change.stacked())[0]
                spectra[module], norms[module] = found.tolist(), float(found.norm())
            else:
                triples = _decomposed(change, RankChoice(rank=min(MOST, *change.shape)))
                spectra[module], norms[module] = triples.spectrum, triples.norm
    costs = {module: sum(change.shape) for module, change in changes.items()}
    ranks = ranks_within(spectra, costs, budget)
    for module, rank in ranks.items():
        if not rank:
            result.measured[module] = ModuleReport(0, norms[module], norms[module])
    return ranks
