"""`lorakit.mix`: Σ weight · adapter as one adapter. Exact: factors are stacked, whatever the ranks and modules."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import sqrt
from typing import Any

from lorakit.adapters.adapter import Adapter
from lorakit.adapters.delta import Delta
from lorakit.errors import UsageError
from lorakit.store.locate import open_adapter

METHODS = ("linear",)

AdapterLike = Adapter | str | os.PathLike[str]


@dataclass(frozen=True, slots=True)
class MixReport:
    """What was done, and how the adapters lie to one another.

    `norms` are Frobenius norms over all modules, of each adapter before its weight. `cosines[i][j]` is
    ⟨Δᵢ, Δⱼ⟩ / (‖Δᵢ‖ ‖Δⱼ‖) over all modules: near 0 they leave each other alone, below 0 they undo each other.
    None where one of the two is zero.
    """

    method: str
    adapters: tuple[str, ...]
    weights: tuple[float, ...]
    rank: int
    modules: int
    norms: tuple[float, ...]
    cosines: tuple[tuple[float | None, ...], ...]
    truncation_error: float = 0.0
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "adapters": [
                {"path": path, "weight": weight, "norm": norm}
                for path, weight, norm in zip(self.adapters, self.weights, self.norms, strict=True)
            ],
            "rank": self.rank,
            "modules": self.modules,
            "cosines": [list(row) for row in self.cosines],
            "truncation_error": self.truncation_error,
            "notes": list(self.notes),
        }


def mix(
    pairs: Sequence[tuple[AdapterLike, float]], method: str = "linear", rank: int | str = "exact", **options: Any
) -> Adapter:
    """Mix adapters into one: Σ weight · scale · B A for each module. Its `report` says how they lie to one another.

    Args:
        pairs: (adapter, weight). The same adapter twice adds up its weights.
        method: "linear", the weighted sum.
        rank: "exact": the sum of the ranks, with nothing lost.

    Raises:
        UsageError: there is no such method, rank or option yet, or nothing to mix.
        WrongBase: a module has different shapes in two adapters.
        UnsupportedAdapter: an adapter has more than low-rank factors.
    """
    if method not in METHODS:
        raise UsageError(f"there is no method '{method}'; there is: {', '.join(METHODS)}")
    if rank != "exact":
        raise UsageError(f"rank {rank!r}: only 'exact' is there, the sum of the adapters' ranks")
    if options:
        raise UsageError(f"method 'linear' takes no {', '.join(sorted(options))}")
    if not pairs:
        raise UsageError("no adapter is named: there is nothing to mix")
    opened = [adapter if isinstance(adapter, Adapter) else open_adapter(os.fspath(adapter)) for adapter, _ in pairs]
    weights = [float(weight) for _, weight in pairs]
    mixed = opened[0].scaled(weights[0])
    for adapter, weight in zip(opened[1:], weights[1:], strict=True):
        mixed = mixed.plus(adapter.scaled(weight))
    return replace(mixed, report=_report(mixed, opened, weights, method))


def _report(mixed: Adapter, adapters: Sequence[Adapter], weights: Sequence[float], method: str) -> MixReport:
    products = inner_products([adapter.deltas for adapter in adapters])
    norms = [sqrt(max(0.0, products[index][index])) for index in range(len(adapters))]
    cosines = tuple(
        tuple(
            product / (norm * other) if norm and other else None
            for product, other in zip(row, norms, strict=True)
        )
        for row, norm in zip(products, norms, strict=True)
    )  # fmt: skip
    bases = dict.fromkeys(str(adapter.base) for adapter in adapters)
    notes = (f"the adapters name different bases: {', '.join(bases)}",) if len(bases) > 1 else ()
    return MixReport(
        method=method,
        adapters=tuple(adapter.name for adapter in adapters),
        weights=tuple(weights),
        rank=mixed.rank,
        modules=len(mixed.deltas),
        norms=tuple(norms),
        cosines=cosines,
        notes=notes,
    )


def inner_products(adapters: Sequence[Mapping[str, Delta]]) -> list[list[float]]:
    """⟨Δᵢ, Δⱼ⟩ = tr((BᵢᵀBⱼ)(AⱼAᵢᵀ)), summed over the modules; never forms a dense delta."""
    count = len(adapters)
    sums = [[0.0] * count for _ in range(count)]
    for module in dict.fromkeys(name for deltas in adapters for name in deltas):
        stacked = [deltas[module].stacked() if module in deltas else None for deltas in adapters]
        for i, mine in enumerate(stacked):
            for j, other in enumerate(stacked[: i + 1]):
                if mine is not None and other is not None:
                    sums[i][j] += float(((mine[0].T @ other[0]) * (mine[1] @ other[1].T)).sum())
    return [[sums[max(i, j)][min(i, j)] for j in range(count)] for i in range(count)]
