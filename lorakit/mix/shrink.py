"""`lorakit.shrink`: an adapter of a smaller rank, as near to what it was as that rank allows."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from lorakit.adapters.adapter import Adapter
from lorakit.adapters.source import Stage
from lorakit.adapters.trained import Trained
from lorakit.errors import UsageError
from lorakit.merge.base import read_base
from lorakit.mix.mix import rank_choice
from lorakit.mix.opened import AdapterLike, BaseLike, opened, with_trained
from lorakit.mix.reduce import reduced
from lorakit.mix.report import report_of


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
        own_ranks: as for `mix`; the default for an adapter that has a `rank_pattern` as well.
        base: as for `mix`.

    Raises:
        UsageError: none or several of rank, energy and budget are given.
        UnsupportedAdapter: there is more in it than deltas and trained copies.
    """
    choice = rank_choice(rank, energy, budget)
    if choice.is_exact:
        raise UsageError("say how far to shrink: a rank, an energy, or a budget")
    whole = with_trained(opened(adapter, None if base is None else read_base(base)))
    plain = replace(whole, trained=Trained()).plain(work="shrunk")
    result = reduced(plain.deltas, choice, keep=plain.biases)
    settings = choice.as_dict()
    reported = cache(lambda: report_of(result, [plain], [1.0], "shrink", settings))
    own = budget is not None or bool(plain.config.rank_pattern)
    return replace(
        plain,
        deltas=result.deltas,
        sources=(Stage("shrink", settings, plain.sources, reported=reported),),
        trained=whole.trained,
        own_ranks=own if own_ranks is None else own_ranks,
        reported=reported,
    )
