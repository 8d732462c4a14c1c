"""One weight's change in a fine-tune: its norm, where its rounding noise begins, and its low-rank factors."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, replace
from math import isfinite, sqrt
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

from lorakit.adapters.delta import Delta, Term
from lorakit.adapters.randomised import Truncated, svd_for_energy, truncated_svd
from lorakit.adapters.truncation import cut
from lorakit.errors import InvalidFile, UsageError
from lorakit.files.folders import write_all
from lorakit.files.safetensors import StoredTensor
from lorakit.files.tensors import load_range, load_tensor, same_bytes, tensor_bytes, torch_dtype
from lorakit.mix.extraction.noise import RoundingNoise, narrowest
from lorakit.mix.extraction.plan import Pair, Uncarried
from lorakit.mix.extraction.report import ExtractedModule, Stop, UncarriedChange
from lorakit.mix.extraction.tuned import Tuned
from lorakit.mix.reduce import RankChoice

if TYPE_CHECKING:
    import torch

MAX_RANK = 256
BLOCK = 1 << 18  # elements: what stays in a core's cache
ELEMENTS = 1 << 20  # of a tensor without rows, for sums in float64


@dataclass(frozen=True, slots=True)
class Goal:
    """How the rank of each module is chosen; `max_rank` for what is found by energy or within a budget.

    Raises:
        UsageError: the largest rank is below 1.
    """

    choice: RankChoice
    max_rank: int | None = None

    def __post_init__(self) -> None:
        if self.max_rank is not None and self.max_rank < 1:
            raise UsageError(f"a largest rank of {self.max_rank} leaves nothing: it has to be 1 or more")

    def svd(
        self, matrix: torch.Tensor, norm: float, floor: float, cost: int, generator: torch.Generator
    ) -> tuple[Truncated, Stop]:
        """The triples to keep, or with a budget those to choose from; and what ended them."""
        rank, energy, budget = self.choice.rank, self.choice.energy, self.choice.budget
        most = min(*matrix.shape, *(limit for limit in (rank, self.max_rank) if limit is not None))
        if energy is not None:
            found = svd_for_energy(matrix, energy, floor=floor, max_rank=most, generator=generator, norm=norm)
            if 1 - found.error**2 >= energy:
                return found, "energy"
            return found, "noise" if found.rank < most else "max_rank" if most < min(matrix.shape) else "exact"
        if budget is not None:
            most = min(most, budget // cost)
        found = truncated_svd(matrix, most, generator=generator, norm=norm).above(floor)
        if found.rank < most:
            return found, "noise"
        if found.rank == min(matrix.shape):
            return found, "exact"
        return found, "rank" if budget is None else "budget"


@dataclass(frozen=True, slots=True)
class Change:
    """What was found of one module. `B` (out, r) and `A` (r, in) stand in the file of factors; None in a dry run."""

    pair: Pair
    module: ExtractedModule
    spectrum: tuple[float, ...]
    B: StoredTensor | None = None
    A: StoredTensor | None = None

    def first(self, rank: int) -> Change:
        """With the first triples alone: the squares of those that go add to that of the error."""
        if rank == self.module.rank:
            return self
        gone = sum(value**2 for value in self.spectrum[rank:])
        module = replace(
            self.module,
            rank=rank,
            error=sqrt(self.module.error**2 + gone),
            stop="budget",
            parameters=rank * self.pair.cost,
        )
        return replace(self, module=module, spectrum=self.spectrum[:rank])


class Factors:
    """A file that factors are appended to as they are computed, so that memory holds those of one module."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._writer = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        self._end = 0
        self._turn = Lock()

    def put(self, name: str, tensor: torch.Tensor) -> StoredTensor:
        """Append a float32 tensor."""
        block = tensor_bytes(tensor.cpu().contiguous())
        with self._turn:
            first, self._end = self._end, self._end + len(block)
        write_all(self._writer, block, first)
        return StoredTensor(name, self.file, "F32", tuple(tensor.shape), first, first + len(block))

    def deltas(self, change: Change) -> dict[str, Delta]:
        """By module: one, or with a tied head two, whose factors are each other's transposes."""
        if change.B is None or change.A is None or not change.module.rank:
            return {}
        b, a, pair, rank = change.B, change.A, change.pair, change.module.rank
        if rank < a.shape[0]:
            b, a = self.put(b.name, load_tensor(b)[:, :rank]), self.put(a.name, load_tensor(a)[:rank])
        found = {pair.module: Delta((Term(b, a, 1.0),), pair.kind)}
        if pair.head is not None:
            head_b, head_a = self.put(f"{pair.head} B", load_tensor(a).T), self.put(f"{pair.head} A", load_tensor(b).T)
            found[pair.head] = Delta((Term(head_b, head_a, 1.0),))
        return found

    def close(self) -> None:
        os.close(self._writer)


def change_of(
    pair: Pair, goal: Goal, model: Tuned, *, device: str, seed: int, factors: Factors | None
) -> Change | None:
    """What a fine-tune changed in one weight; None where it changed nothing.

    Raises:
        InvalidFile: a weight holds NaN or infinity.
    """
    import torch

    if model.is_stored and same_bytes(pair.tuned, pair.base):
        return None
    delta, noise, weight_norm = _difference(model.load(pair.tuned), pair.base, device)
    norm = noise.norm
    if norm == 0:
        return None
    _ensure_finite(norm, pair.tuned, pair.base)
    floor = noise.floor()
    matrix = delta.T if pair.transposed else delta
    generator = torch.Generator().manual_seed(_seed(seed, pair.module))
    found, stop = goal.svd(matrix, norm, floor, pair.cost, generator)
    module = ExtractedModule(
        pair.module, pair.kind, (delta.shape[0], delta.shape[1]), found.rank, norm,
        norm / weight_norm if weight_norm else None, found.rest, floor, stop, found.rank * pair.cost, pair.head,
    )  # fmt: skip
    change = Change(pair, module, tuple(found.spectrum))
    if factors is None or not found.rank:
        return change
    b, a = cut(found.U, found.S, found.Vh, found.rank)
    return replace(change, B=factors.put(f"{pair.module} B", b), A=factors.put(f"{pair.module} A", a))


def _difference(tuned: torch.Tensor, base: StoredTensor, device: str) -> tuple[torch.Tensor, RoundingNoise, float]:
    """Δ (m, n) in float32 on the device, the rounding noise in it, and ‖W‖ of the base.

    Where `tuned` could hold Δ, it does then: a table of a vocabulary is large.
    """
    import torch

    stored_as = narrowest(tuned)
    wide = torch.promote_types(torch.promote_types(tuned.dtype, torch_dtype(base.dtype)), torch.float32)
    in_place = tuned.dtype == torch.float32 and tuned.device == torch.device(device)
    delta = tuned if in_place else torch.empty(tuned.shape, device=device)
    noise = RoundingNoise((tuned.shape[0], tuned.shape[1]))
    square = 0.0
    rows = max(1, BLOCK // tuned.shape[1])
    for first in range(0, len(tuned), rows):
        values = tuned[first : first + rows].to(device)
        before = _rows(base, first, first + len(values)).to(device=device, dtype=wide)
        change = values.to(wide) - before
        noise.add(values.to(stored_as), change, first)
        delta[first : first + rows] = change
        square += float(before.square().sum(dtype=torch.float64))
    return delta, noise, sqrt(square)


def _rows(stored: StoredTensor, first: int, last: int) -> torch.Tensor:
    width = stored.shape[1]
    return load_range(stored, first * width, last * width).view(last - first, width)


def uncarried_change(part: Uncarried, model: Tuned, *, saved: bool) -> UncarriedChange | None:
    """How much a tensor changed that factors can't carry; None where it did not."""
    stored = part.tuned
    if part.base is None:
        return UncarriedChange(stored.name, stored.shape, stored.nbytes, part.reason, None, None, saved)
    tuned, base = model.load(stored), load_tensor(part.base)
    norm = weight = 0.0
    for first in range(0, tuned.numel(), ELEMENTS):
        before = base.reshape(-1)[first : first + ELEMENTS].double()
        norm += float((tuned.reshape(-1)[first : first + ELEMENTS].double() - before).square().sum())
        weight += float(before.square().sum())
    if not norm:
        return None
    _ensure_finite(norm, stored, part.base)
    relative = sqrt(norm / weight) if weight else None
    return UncarriedChange(stored.name, stored.shape, stored.nbytes, part.reason, sqrt(norm), relative, saved)


def _ensure_finite(norm: float, tuned: StoredTensor, base: StoredTensor) -> None:
    if not isfinite(norm):
        folders = " or ".join(dict.fromkeys(f"'{stored.file.parent}'" for stored in (tuned, base)))
        raise InvalidFile(f"'{tuned.name}' holds NaN or infinity in {folders}: use an earlier checkpoint")


def _seed(seed: int, module: str) -> int:
    """One for each module, whichever others there are."""
    return int.from_bytes(hashlib.sha256(f"{seed} {module}".encode()).digest()[:8], "big") >> 1
