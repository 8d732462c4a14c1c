"""`lorakit.diff`: what changed from one adapter to the next, tensor by tensor and delta by delta.

report = lorakit.diff("stages/exact", "stages/rank-16", "stages/tuned")
report.stages[1].lost, report.stages[2].lost_since_first

Any ranks, any modules: deltas are compared as what they add to the base, whatever their factors.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import chain, pairwise
from math import isfinite, sqrt
from pathlib import Path
from typing import Any, Literal, TypeVar

from lorakit.adapters.adapter import Adapter
from lorakit.adapters.delta import Delta
from lorakit.adapters.truncation import Factors, inner_product, noise_of, one_thread, product_spectrum
from lorakit.errors import NotFound, Refused, UnsupportedAdapter
from lorakit.files.safetensors import StoredTensor, read_header
from lorakit.files.tensors import FLOATS, read_into, same_bytes, torch_dtype
from lorakit.mix.compare import (
    CUTOFF,
    cosine,
    different_bases,
    matching_modules,
    with_biases,
)
from lorakit.mix.opened import opened
from lorakit.store.locate import open_adapter

LEADING = 8  # singular values in `as_dict()`
RTOL, ATOL = 1e-5, 1e-8  # what numpy's allclose takes for close
_BLOCK = 1 << 20  # elements

State = Literal["equal", "close", "different", "only_before", "only_after"]
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class TensorChange:
    """One tensor in two adapters; `before` and `after` are its dtype and shape.

    equal: dtype, shape and every bit; close: |after - before| <= 1e-8 + 1e-5 |before| everywhere. `largest` is
    max |after - before|; None where the two can't be subtracted, or the result is no number.
    """

    name: str
    state: State
    before: str | None = None
    after: str | None = None
    largest: float | None = None

    def as_dict(self) -> dict[str, Any]:
        return {
            "tensor": self.name,
            "state": self.state,
            "before": self.before,
            "after": self.after,
            "largest": self.largest,
        }


@dataclass(frozen=True, slots=True)
class Change:
    """How far a delta is from an earlier one. What it holds are sums, which add up over modules: ‖Δ₁‖², ‖Δ₂‖²,
    ‖Δ₁ - Δ₂‖² and ⟨Δ₁, Δ₂⟩.
    """

    before: float
    after: float
    difference: float
    product: float = 0.0

    @property
    def lost(self) -> float | None:
        """‖Δ₁ - Δ₂‖ / ‖Δ₁‖; None where there was nothing to lose."""
        return sqrt(self.difference / self.before) if self.before else None

    @property
    def cosine(self) -> float | None:
        return cosine(self.product, sqrt(self.before), sqrt(self.after))

    def plus(self, other: Change) -> Change:
        return Change(
            self.before + other.before,
            self.after + other.after,
            self.difference + other.difference,
            self.product + other.product,
        )


@dataclass(frozen=True, slots=True)
class ModuleStage:
    """One module's delta at one stage. `spectrum`: its singular values, largest first.

    `factor_rank` is that of the stacked factors; `rank` is how many singular values aren't zero beside the largest.
    """

    shape: tuple[int, int]
    factor_rank: int
    spectrum: tuple[float, ...]

    @property
    def rank(self) -> int:
        return sum(value > CUTOFF * self.spectrum[0] for value in self.spectrum)

    @property
    def square(self) -> float:
        return sum(value * value for value in self.spectrum)

    def as_dict(self) -> dict[str, Any]:
        return {
            "shape": list(self.shape),
            "factor_rank": self.factor_rank,
            "rank": self.rank,
            "norm": sqrt(self.square),
            "leading": list(self.spectrum[:LEADING]),
        }


@dataclass(frozen=True, slots=True)
class ModuleDiff:
    """One module through the stages: None where it isn't there.

    `since_previous` and `since_first` go from a stage to each: None at the first, and where the shapes differ.
    """

    stages: tuple[ModuleStage | None, ...]
    since_previous: tuple[Change | None, ...]
    since_first: tuple[Change | None, ...]

    @property
    def reshaped(self) -> bool:
        return None in self.since_previous[1:]

    @property
    def largest_loss(self) -> float:
        """In any one step; infinite where it came from nothing, or changed its shape."""
        return max(_loss(change) for change in self.since_previous[1:])

    def as_dict(self) -> dict[str, Any]:
        return {
            "stages": [
                stage and {**stage.as_dict(), **_as_dict(self.since_previous[i], self.since_first[i])}
                for i, stage in enumerate(self.stages)
            ]
        }


def _loss(change: Change | None) -> float:
    if change is None or (change.difference and not change.before):
        return float("inf")
    return change.lost or 0.0


def _as_dict(previous: Change | None, first: Change | None) -> dict[str, Any]:
    return {
        "lost": previous and previous.lost,
        "cosine": previous and previous.cosine,
        "lost_since_first": first and first.lost,
        "cosine_to_first": first and first.cosine,
    }


@dataclass(frozen=True, slots=True)
class Stage:
    """One adapter of the sequence, over its modules; `tensors` are those that it or the stage before it has."""

    path: str
    modules: int
    rank: int
    norm: float
    since_previous: Change | None = None
    since_first: Change | None = None
    tensors: tuple[TensorChange, ...] = ()

    @property
    def lost(self) -> float | None:
        """‖Δ' - Δ‖ / ‖Δ'‖, with Δ' the stage before; None at the first."""
        return None if self.since_previous is None else self.since_previous.lost

    @property
    def lost_since_first(self) -> float | None:
        return None if self.since_first is None else self.since_first.lost

    def count(self, state: State) -> int:
        return sum(change.state == state for change in self.tensors)

    def as_dict(self) -> dict[str, Any]:
        return {
            "path": self.path,
            "modules": self.modules,
            "rank": self.rank,
            "norm": self.norm,
            **_as_dict(self.since_previous, self.since_first),
            "tensors": [change.as_dict() for change in self.tensors],
        }


@dataclass(frozen=True, slots=True)
class DiffReport:
    """The stages in the order they were named, and each module of any of them."""

    stages: tuple[Stage, ...]
    modules: Mapping[str, ModuleDiff]
    notes: tuple[str, ...] = ()

    def spectrum(self, stage: int) -> list[float]:
        """The singular values of all modules at one stage: those of the deltas as one block-diagonal matrix."""
        found = [module.stages[stage] for module in self.modules.values()]
        return sorted((value for one in found if one for value in one.spectrum), reverse=True)

    def most_changed(self) -> list[tuple[str, ModuleDiff]]:
        """Those that lost most in any one step first."""
        return sorted(self.modules.items(), key=lambda item: -item[1].largest_loss)

    def as_dict(self) -> dict[str, Any]:
        return {
            "stages": [stage.as_dict() for stage in self.stages],
            "modules": {name: module.as_dict()["stages"] for name, module in self.modules.items()},
            "notes": list(self.notes),
        }


def diff(
    a: str | os.PathLike[str], b: str | os.PathLike[str], *more: str | os.PathLike[str], modules: str = "*"
) -> DiffReport:
    """Say what changed from each adapter to the next, and since the first.

    Args:
        modules: deltas of these alone: "*.layers.0.*" as a shell would, "q_proj" as the end of a path. Of tensors all
            are compared.

    Raises:
        UsageError: no module matches.
        NotFound, Incomplete, InvalidFile: as `load_adapter`; or a factor holds NaN or infinity.
        Refused: one of them is a model or a regular checkpoint, not an adapter.
    """
    stored = [_opened(reference) for reference in (a, b, *more)]
    adapters, beyond = zip(*(_as_deltas(adapter) for adapter in stored), strict=True)
    with one_thread():
        found = {module: _through_stages(adapters, module) for module in matching_modules(adapters, modules)}
    tensors = [read_header(adapter.files()[0].file).tensors for adapter in stored]
    steps = [(), *(_tensor_changes(before, after) for before, after in pairwise(tensors))]
    for adapter in stored:
        adapter.ensure_unchanged()
    return DiffReport(
        tuple(_stage(adapter, i, list(found.values()), steps[i]) for i, adapter in enumerate(adapters)),
        found,
        (*different_bases(adapters), *chain(*beyond), *with_biases(adapters), *_reshaped(found)),
    )


def _opened(reference: str | os.PathLike[str]) -> Adapter:
    folder = Path(reference)
    if (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file():
        raise Refused(f"'{folder}' is a model or a regular checkpoint: only adapters can be compared so far")
    return open_adapter(os.fspath(reference))


def _through_stages(adapters: Sequence[Adapter], module: str) -> ModuleDiff:
    """Its factors at all stages are in memory at once, and no other module's."""
    deltas = [adapter.deltas.get(module) for adapter in adapters]
    factors = [None if delta is None else delta.stacked() for delta, adapter in zip(deltas, adapters, strict=True)]
    stages = [
        ModuleStage(delta.shape, delta.rank, _spectrum(pair)) if delta and pair else None
        for delta, pair in zip(deltas, factors, strict=True)
    ]

    def change(earlier: int, later: int) -> Change | None:
        before, after = stages[earlier], stages[later]
        squares = before.square if before else 0.0, after.square if after else 0.0
        one, other = factors[earlier], factors[later]
        if one is None or other is None:
            return Change(*squares, sum(squares))
        if _form(deltas[earlier]) != _form(deltas[later]):
            return None
        return Change(*squares, _square_of_difference(one, other), inner_product(one, other) if all(squares) else 0.0)

    later = range(1, len(adapters))
    return ModuleDiff(
        tuple(stages),
        (None, *(change(i - 1, i) for i in later)),
        (None, *(change(0, i) for i in later)),
    )


def _form(delta: Delta | None) -> object:
    return delta and (delta.shape, delta.kind)


def _spectrum(factors: Factors) -> tuple[float, ...]:
    """Singular values, largest first; zero where float64 can't tell them from it."""
    noise = noise_of(*factors)
    return tuple(value if value > noise else 0.0 for value in product_spectrum(*factors).tolist())


def _square_of_difference(one: Factors, other: Factors) -> float:
    """‖Δ₁ - Δ₂‖² by QR of the factors stacked: from the squares of the norms nothing would be left of a small one."""
    import torch

    if all(mine.shape == theirs.shape and torch.equal(mine, theirs) for mine, theirs in zip(one, other, strict=True)):
        return 0.0
    left = torch.linalg.qr(torch.cat([one[0], -other[0]], dim=1), mode="r")[1]
    right = torch.linalg.qr(torch.cat([one[1], other[1]]).T, mode="r")[1]
    return float((left @ right.T).square().sum())


def _stage(adapter: Adapter, index: int, modules: Sequence[ModuleDiff], tensors: tuple[TensorChange, ...]) -> Stage:
    there = _known([module.stages[index] for module in modules])
    return Stage(
        path=adapter.name,
        modules=len(there),
        rank=max((stage.factor_rank for stage in there), default=0),
        norm=sqrt(sum(stage.square for stage in there)),
        since_previous=_summed([module.since_previous[index] for module in modules]) if index else None,
        since_first=_summed([module.since_first[index] for module in modules]) if index else None,
        tensors=tensors,
    )


def _known(found: Sequence[_T | None]) -> list[_T]:
    return [one for one in found if one is not None]


def _summed(changes: Sequence[Change | None]) -> Change:
    return reduce(Change.plus, _known(changes), Change(0.0, 0.0, 0.0))


def _tensor_changes(
    before: Mapping[str, StoredTensor], after: Mapping[str, StoredTensor]
) -> tuple[TensorChange, ...]:  # fmt: skip
    return tuple(_tensor_change(name, before.get(name), after.get(name)) for name in {**before, **after})


def _tensor_change(name: str, before: StoredTensor | None, after: StoredTensor | None) -> TensorChange:
    was, is_now = (None if one is None else f"{one.dtype} {list(one.shape)}" for one in (before, after))
    if before is None or after is None:
        return TensorChange(name, "only_after" if before is None else "only_before", was, is_now)
    if same_bytes(before, after):
        return TensorChange(name, "equal", was, is_now, largest=0.0)
    if before.shape != after.shape or not {before.dtype, after.dtype} <= FLOATS:
        return TensorChange(name, "different", was, is_now)
    largest, close = _largest_difference(before, after)
    return TensorChange(name, "close" if close else "different", was, is_now, largest if isfinite(largest) else None)


def _largest_difference(before: StoredTensor, after: StoredTensor) -> tuple[float, bool]:
    """max |after - before| in float64, block by block, and whether all of it is close."""
    largest, close = 0.0, True
    size = torch_dtype(before.dtype).itemsize
    for start in range(0, before.nbytes // size, _BLOCK):
        count = min(_BLOCK, before.nbytes // size - start)
        old, new = (_elements(stored, start, count) for stored in (before, after))
        difference = (new - old).abs()
        found = float(difference.max())
        largest = found if found > largest or found != found else largest  # NaN stays
        close = close and bool((difference <= ATOL + RTOL * old.abs()).all())
    return largest, close


def _elements(stored: StoredTensor, start: int, count: int) -> Any:
    """`count` elements in float64."""
    import torch

    dtype = torch_dtype(stored.dtype)
    buffer = bytearray(count * dtype.itemsize)
    with stored.file.open("rb") as stream:
        read_into(stream.fileno(), memoryview(buffer), stored.start + start * dtype.itemsize, stored)
    return torch.frombuffer(buffer, dtype=dtype).double()


def _as_deltas(adapter: Adapter) -> tuple[Adapter, tuple[str, ...]]:
    """An adapter that does more than add low-rank factors is compared by those, and a note says so."""
    try:
        return opened(adapter).plain(work="compared"), ()
    except (UnsupportedAdapter, NotFound) as refusal:
        return adapter, (f"{refusal}; of its deltas, low-rank factors alone are compared",)


def _reshaped(modules: Mapping[str, ModuleDiff]) -> tuple[str, ...]:
    reshaped = [repr(name) for name, module in modules.items() if module.reshaped]
    if not reshaped:
        return ()
    shown = ", ".join(reshaped[:4]) + (f" and {len(reshaped) - 4} more" if len(reshaped) > 4 else "")
    return (f"the shapes differ at {shown}: their change is in no sum",)
