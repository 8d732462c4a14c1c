"""A mix whose steps are kept, each as an adapter that names the one before as its parent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, cast

from lorakit.adapters.adapter import Adapter
from lorakit.adapters.reading import load_adapter
from lorakit.adapters.report import MixReport, Weight
from lorakit.errors import UsageError
from lorakit.mix.methods.registry import method_named
from lorakit.mix.mix import mix, rank_choice
from lorakit.mix.opened import AdapterLike
from lorakit.mix.reduce import MOST
from lorakit.mix.shrink import shrink


def mix_in_stages(
    pairs: Sequence[tuple[AdapterLike, Weight]],
    keep: Path,
    method: str = "linear",
    rank: int | str | None = None,
    *,
    energy: float | None = None,
    budget: int | None = None,
    own_ranks: bool | None = None,
    **options: Any,
) -> Adapter:
    """As `mix`, but what the method gives is written to `keep/1-METHOD` before its rank is reduced.

    What is dense is kept at rank 512 at most. The report is that of both steps; its loss is that of the second.

    Raises:
        UsageError: the rank is exact, so that there is one stage alone; or as `mix`.
        Conflict: that folder exists.
    """
    choice = rank_choice(rank, energy, budget)
    if choice.is_exact:
        raise UsageError("an exact mix has no stages to keep: choose a rank, an energy or a budget")
    folder = keep / f"1-{method.replace(':', '-')}"
    # what a method gives dense is kept as far as an adapter goes
    first = mix(pairs, method, MOST if method_named(method).gives == "dense" else None, **options)
    first.save(folder)
    kept = load_adapter(folder)
    small = shrink(kept, rank=choice.rank, energy=choice.energy, budget=choice.budget, own_ranks=own_ranks)
    return replace(small, reported=cache(lambda: _report(first, small)))


def _report(first: Adapter, small: Adapter) -> MixReport:
    """That of the mix, with the ranks and the loss of what became of it."""
    whole, cut = cast(MixReport, first.report), cast(MixReport, small.report)
    return replace(
        whole, rank=cut.rank, modules=cut.modules, parameters=cut.parameters, truncation_error=cut.truncation_error,
        by_module=cut.by_module, settings={**whole.settings, **cut.settings},
    )  # fmt: skip
