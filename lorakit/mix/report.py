"""The report of a mix: what it lost, and how the adapters lie to one another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import sqrt
from typing import Any

from lorakit.adapters.adapter import Adapter
from lorakit.adapters.delta import Delta
from lorakit.adapters.report import MixReport, ModuleReport, Weight
from lorakit.adapters.truncation import inner_product, one_thread
from lorakit.mix.compare import cosine, different_bases
from lorakit.mix.reduce import Reduced


def report_of(
    result: Reduced,
    adapters: Sequence[Adapter],
    weights: Sequence[Weight],
    method: str,
    settings: Mapping[str, Any],
    notes: Sequence[str] = (),
) -> MixReport:
    """Computes what was not computed yet."""
    by_module = result.reports()
    with one_thread():
        norms, cosines = norms_and_cosines([adapter.deltas for adapter in adapters])
    return MixReport(
        method=method,
        adapters=tuple(adapter.name for adapter in adapters),
        weights=tuple(weights),
        rank=max((report.rank for report in by_module.values()), default=0),
        modules=len(result.deltas),
        norms=norms,
        cosines=cosines,
        parameters=sum(by_module[module].rank * sum(delta.shape) for module, delta in result.deltas.items()),
        truncation_error=overall_error(by_module),
        notes=(*different_bases(adapters), *notes),
        settings=settings,
        by_module=by_module,
    )


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
