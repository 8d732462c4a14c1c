"""What a mix did, how exact it was, and how the adapters lie to one another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import sqrt
from typing import Any

from lorakit.adapters.adapter import Weight
from lorakit.adapters.delta import Delta
from lorakit.mix.compare import cosine, inner_product


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


def overall_error(reports: Mapping[str, ModuleReport]) -> float:
    """‖Δ - result‖ / ‖Δ‖ over all modules."""
    norm = sum(report.norm**2 for report in reports.values())
    return sqrt(sum(report.lost**2 for report in reports.values()) / norm) if norm else 0.0


def norms_and_cosines(
    adapters: Sequence[Mapping[str, Delta]],
) -> tuple[tuple[float, ...], tuple[tuple[float | None, ...], ...]]:
    """Over all modules, from the factors alone."""
    products = inner_products(adapters)
    norms = tuple(sqrt(max(0.0, products[index][index])) for index in range(len(adapters)))
    cosines = tuple(
        tuple(cosine(product, norm, other) for product, other in zip(row, norms, strict=True))
        for row, norm in zip(products, norms, strict=True)
    )
    return norms, cosines


def inner_products(adapters: Sequence[Mapping[str, Delta]]) -> list[list[float]]:
    """⟨Δᵢ, Δⱼ⟩ summed over the modules; never forms a dense delta."""
    count = len(adapters)
    sums = [[0.0] * count for _ in range(count)]
    for module in dict.fromkeys(name for deltas in adapters for name in deltas):
        stacked = [deltas[module].stacked() if module in deltas else None for deltas in adapters]
        for i, mine in enumerate(stacked):
            for j, other in enumerate(stacked[: i + 1]):
                if mine is not None and other is not None:
                    sums[i][j] += inner_product(mine, other)
    return [[sums[max(i, j)][min(i, j)] for j in range(count)] for i in range(count)]
