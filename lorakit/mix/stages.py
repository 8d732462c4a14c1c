"""A mix whose steps are kept, each as an adapter that names the one before as its parent."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorakit.adapters.adapter import Adapter, Weight, load_adapter
from lorakit.errors import UsageError
from lorakit.mix.mix import mix, rank_choice
from lorakit.mix.opened import AdapterLike
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

    Raises:
        UsageError: the rank is exact, so that there is one stage alone; or as `mix`.
        Conflict: that folder exists.
    """
    choice = rank_choice(rank, energy, budget)
    if choice.is_exact:
        raise UsageError("an exact mix has no stages to keep: choose a rank, an energy or a budget")
    first = keep / f"1-{method.replace(':', '-')}"
    keep.mkdir(parents=True, exist_ok=True)
    mix(pairs, method, **options).save(first)
    return shrink(
        load_adapter(first), rank=choice.rank, energy=choice.energy, budget=choice.budget, own_ranks=own_ranks
    )
