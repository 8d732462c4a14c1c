"""What was done to make an adapter, how exact that was, and how its parents lie to one another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Weight = float | Mapping[str, float]  # one for all modules, or by pattern of modules


@dataclass(frozen=True, slots=True)
class ModuleReport:
    """One module of the result: `norm` is ‖Δ‖ before it was cut to `rank`, `lost` is ‖Δ - Δ_rank‖, both measured."""

    rank: int
    norm: float
    lost: float

    @property
    def truncation_error(self) -> float:
        """‖Δ - Δ_rank‖ / ‖Δ‖."""
        return self.lost / self.norm if self.norm else 0.0

    def as_dict(self) -> dict[str, Any]:
        return {"rank": self.rank, "norm": self.norm, "truncation_error": self.truncation_error}


@dataclass(frozen=True, slots=True)
class MixReport:
    """What was done, and how the adapters lie to one another.

    `norms` are Frobenius norms over all modules, of each adapter before its weight. `cosines[i][j]` is
    ⟨Δᵢ, Δⱼ⟩ / (‖Δᵢ‖ ‖Δⱼ‖) over all modules: near 0 they leave each other alone, below 0 they undo each other.
    None where one of the two is zero. `truncation_error` is ‖Δ - result‖ / ‖Δ‖ over all modules, with Δ what the method
    gives. `parameters` counts the values of the result's factors, without padding.
    """

    method: str
    adapters: tuple[str, ...]
    weights: tuple[Weight, ...]
    rank: int
    modules: int
    norms: tuple[float, ...]
    cosines: tuple[tuple[float | None, ...], ...]
    parameters: int = 0
    truncation_error: float = 0.0
    notes: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    by_module: Mapping[str, ModuleReport] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "adapters": [
                {"path": path, "weight": dict(weight) if isinstance(weight, Mapping) else weight, "norm": norm}
                for path, weight, norm in zip(self.adapters, self.weights, self.norms, strict=True)
            ],
            "rank": self.rank,
            "modules": self.modules,
            "parameters": self.parameters,
            "cosines": [list(row) for row in self.cosines],
            "truncation_error": self.truncation_error,
            "notes": list(self.notes),
            "settings": dict(self.settings),
            "by_module": {module: report.as_dict() for module, report in self.by_module.items()},
        }
