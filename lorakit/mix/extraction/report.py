"""What an extraction found, kept, and could not keep: as values and as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path
from typing import Any, Literal

from lorakit.adapters.delta import Kind

Stop = Literal["rank", "energy", "budget", "noise", "max_rank", "exact"]


@dataclass(frozen=True, slots=True)
class ExtractedModule:
    """One module's change as factors: `shape` is as stored, `norm` is ‖Δ‖, `relative_change` ‖Δ‖ / ‖W‖ (None where W
    is 0), `error` is ‖Δ - B A‖, measured.

    `stop` says why the rank is not larger: what was asked for, the rounding noise of the stored weights (`noise`),
    `max_rank`, or that there is nothing more (`exact`). `floor` is the singular value where that noise begins.
    """

    module: str
    kind: Kind
    shape: tuple[int, int]
    rank: int
    norm: float
    relative_change: float | None
    error: float
    floor: float
    stop: Stop
    parameters: int
    head: str | None = None

    @property
    def relative_error(self) -> float:
        return self.error / self.norm

    @property
    def energy(self) -> float:
        """The share of ‖Δ‖² that is kept."""
        return max(0.0, 1 - self.relative_error**2)


@dataclass(frozen=True, slots=True)
class UncarriedChange:
    """A tensor that changed and that no factors can carry. `norm` is None where its shape changed, too;
    `relative_change` also where it was 0.
    """

    tensor: str
    shape: tuple[int, ...]
    nbytes: int
    reason: str
    norm: float | None
    relative_change: float | None
    saved: bool


@dataclass(frozen=True, slots=True)
class ExtractReport:
    """What was done, or with `dry_run` what would be. `equal` counts tensors that the fine-tune left alone."""

    out: Path | None
    tuned: str
    base: str
    settings: Mapping[str, Any]
    device: str
    dry_run: bool
    modules: tuple[ExtractedModule, ...]
    uncarried: tuple[UncarriedChange, ...]
    equal: int
    left_out: tuple[str, ...] = ()
    seconds: float = 0.0
    remarks: tuple[str, ...] = field(default=())

    @property
    def rank(self) -> int:
        """The largest rank of any module."""
        return max((module.rank for module in self.modules), default=0)

    @property
    def parameters(self) -> int:
        return sum(module.parameters for module in self.modules)

    @property
    def lost(self) -> tuple[UncarriedChange, ...]:
        """What is not in the adapter."""
        return tuple(change for change in self.uncarried if not change.saved)

    @property
    def relative_error(self) -> float | None:
        """The part of the whole change, in norm, that the adapter lacks: of low rank or not carried at all. None where
        it lacks a tensor of another shape than the base's, whose change has no norm.
        """
        if any(change.norm is None for change in self.lost):
            return None
        lacking = sum(module.error**2 for module in self.modules)
        lacking += sum(change.norm**2 for change in self.lost if change.norm is not None)
        whole = sum(module.norm**2 for module in self.modules)
        whole += sum(change.norm**2 for change in self.uncarried if change.norm is not None)
        return sqrt(lacking / whole) if whole else 0.0

    @property
    def notes(self) -> tuple[str, ...]:
        return (*self.remarks, *self._of_uncarried(), *self._of_noise(), *self._of_max_rank())

    def _of_uncarried(self) -> tuple[str, ...]:
        lost = self.lost
        if not lost:
            return ()
        size = sum(change.nbytes for change in lost)
        cure = (
            "they are part of modules that hold others, and can't be saved with an adapter"
            if self.settings.get("save_rest")
            else "--save-rest keeps them whole (PEFT loads that, vLLM does not)"
        )
        return (
            f"{len(lost)} changed tensors ({size / 1e6:.1f} MB; the first: {lost[0].tensor}, {lost[0].reason}) can't "
            f"be carried by low-rank factors and are not in the adapter: {cure}",
        )

    def _of_noise(self) -> tuple[str, ...]:
        at_floor = [module for module in self.modules if module.stop == "noise"]
        if not at_floor:
            return ()
        none = sum(1 for module in at_floor if module.rank == 0)
        gone = f"; nothing is left of {none} modules, which changed by no more than that" if none else ""
        return (
            f"the rank of {len(at_floor)} modules stops where the rounding noise of the stored weights begins "
            f"(the largest: {max(module.rank for module in at_floor)}){gone}",
        )

    def _of_max_rank(self) -> tuple[str, ...]:
        short = [module for module in self.modules if module.stop == "max_rank"]
        if not short:
            return ()
        least = min(short, key=lambda module: module.energy)
        return (
            f"{len(short)} modules keep less than the energy asked for at the largest rank allowed "
            f"({self.settings.get('max_rank')}): '{least.module}' {least.energy:.1%}",
        )

    def as_dict(self) -> dict[str, Any]:
        """The same as plain data, for `--json` and `lorakit.json`."""
        return {
            "out": None if self.out is None else str(self.out),
            "tuned": self.tuned,
            "base": self.base,
            "dry_run": self.dry_run,
            "device": self.device,
            **self.settings,
            "rank_kept": self.rank,
            "parameters": self.parameters,
            "relative_error": self.relative_error,
            "equal": self.equal,
            "seconds": round(self.seconds, 3),
            "modules": [_module(module) for module in self.modules],
            "uncarried": [_change(change) for change in self.uncarried],
            "left_out": list(self.left_out),
            "notes": list(self.notes),
        }


def _module(module: ExtractedModule) -> dict[str, Any]:
    return {
        "module": module.module,
        **({} if module.head is None else {"head": module.head}),
        "kind": module.kind,
        "shape": list(module.shape),
        "rank": module.rank,
        "energy": module.energy,
        "relative_error": module.relative_error,
        "norm": module.norm,
        "relative_change": module.relative_change,
        "noise_floor": module.floor,
        "stop": module.stop,
    }


def _change(change: UncarriedChange) -> dict[str, Any]:
    return {
        "tensor": change.tensor,
        "shape": list(change.shape),
        "bytes": change.nbytes,
        "reason": change.reason,
        "norm": change.norm,
        "relative_change": change.relative_change,
        "saved": change.saved,
    }
