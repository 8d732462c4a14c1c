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
from math import sqrt
from pathlib import Path
from typing import Any, TypeVar

from lorakit.adapters.adapter import Adapter
from lorakit.adapters.delta import Delta
from lorakit.adapters.truncation import Factors, inner_product, noise_of, one_thread, product_spectrum
from lorakit.checkpoints.finished import CHECKPOINT, is_adapter
from lorakit.checkpoints.locate import open_adapter
from lorakit.checkpoints.tensors import listed
from lorakit.errors import NotFound, Refused, UnsupportedAdapter
from lorakit.files.safetensors import read_header
from lorakit.mix.changes import Change, Closeness, State, TensorChange, tensor_changes
from lorakit.mix.compare import CUTOFF, different_bases, matching_modules, with_biases
from lorakit.mix.opened import opened

LEADING = 8  # singular values in `as_dict()`

_T = TypeVar("_T")


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
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    *more: str | os.PathLike[str],
    modules: str = "*",
    closeness: Closeness | None = None,
) -> DiffReport:
    """Say what changed from each adapter to the next, and since the first. `diff_tensors` is for everything else.

    Args:
        closeness: which tensors are called close; as numpy's allclose without.
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
    steps = [(), *(tensor_changes(before, after, closeness) for before, after in pairwise(tensors))]
    for adapter in stored:
        adapter.ensure_unchanged()
    return DiffReport(
        tuple(_stage(adapter, i, list(found.values()), steps[i]) for i, adapter in enumerate(adapters)),
        found,
        (*different_bases(adapters), *chain(*beyond), *with_biases(adapters), *_reshaped(found), *_nested(stored)),
    )


def _opened(reference: str | os.PathLike[str]) -> Adapter:
    folder = Path(reference)
    if (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file():
        raise Refused(
            f"'{folder}' is a model or a regular checkpoint, not an adapter: lorakit.diff_tensors takes those"
        )
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


def _as_deltas(adapter: Adapter) -> tuple[Adapter, tuple[str, ...]]:
    """An adapter that does more than add low-rank factors is compared by those, and a note says so."""
    try:
        return opened(adapter).plain(work="compared"), ()
    except (UnsupportedAdapter, NotFound) as refusal:
        return adapter, (f"{refusal}; of its deltas, low-rank factors alone are compared",)


def _reshaped(modules: Mapping[str, ModuleDiff]) -> tuple[str, ...]:
    reshaped = [name for name, module in modules.items() if module.reshaped]
    return (f"the shapes differ at {listed(reshaped)}: their change is in no sum",) if reshaped else ()


def _nested(adapters: Sequence[Adapter]) -> tuple[str, ...]:
    """A model's second adapter is saved into a folder inside of the first one's."""
    folders = {adapter.name: adapter.files()[0].file.parent for adapter in adapters}
    inner = {name: sorted(filter(is_adapter, folder.iterdir())) for name, folder in folders.items()}
    others = {name: [one.name for one in found if not CHECKPOINT.fullmatch(one.name)] for name, found in inner.items()}
    return tuple(
        f"'{name}' has other adapters in it, which are not compared: {listed(found)}"
        for name, found in others.items()
        if found
    )
