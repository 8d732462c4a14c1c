"""`lorakit.shrink`: an adapter of a smaller rank, as near to what it was as that rank allows."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from lorakit.adapters.adapter import Adapter
from lorakit.adapters.source import Stage
from lorakit.errors import UsageError
from lorakit.mix.mix import rank_choice, report_of
from lorakit.mix.opened import AdapterLike, BaseLike, opened, with_trained
from lorakit.mix.reduce import reduced


def shrink(
    adapter: AdapterLike,
    *,
    rank: int | None = None,
    energy: float | None = None,
    budget: int | None = None,
    own_ranks: bool | None = None,
    base: BaseLike | None = None,
) -> Adapter:
    """The best approximation of each module's delta at a smaller rank; trained copies and biases stay as they are.

    Args:
        rank: the largest rank of any module.
        energy: the share of each module's squared norm to keep, with as small a rank as does it.
        budget: how many parameters all factors may have together; shared out by singular value.
        own_ranks, base: as for `mix`.

    Raises:
        UsageError: none or several of rank, energy and budget are given.
        UnsupportedAdapter: there is more in it than deltas and trained copies.
    """
    choice = rank_choice(rank, energy, budget)
    if choice.is_exact:
        raise UsageError("say how far to shrink: a rank, an energy, or a budget")
    plain = with_trained(opened(adapter, base)).plain(work="shrunk")
    result = reduced(plain.deltas, choice)
    settings = choice.as_dict()
    return replace(
        plain,
        deltas=result.deltas,
        biases={module: bias for module, bias in plain.biases.items() if module in result.deltas},
        sources=(Stage("shrink", settings, plain.sources),),
        own_ranks=budget is not None if own_ranks is None else own_ranks,
        reported=cache(lambda: report_of(result, [plain], [1.0], "shrink", settings)),
    )
