"""What the engines of a fleet are started with: all alike, or in pools by rank."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil

from fleet.engine import Size
from fleet.timings import Timings
from fleet.traffic import ANSWER, PROMPT, RANKS, Traffic

POOLS = (16, 32, 64, 128)  # largest ranks
ROOM = 0.8  # of the memory of a pool that its adapters may take: the rest is for copies, and for new revisions
USUAL_BATCH, USUAL_ADAPTERS = 128, 24  # of a busy engine


def capacity(timings: Timings, rank: int) -> float:
    """Requests a second that a busy engine answers, all adapters there."""
    return timings.rate(rank, batch=USUAL_BATCH, adapters=USUAL_ADAPTERS, prompt=PROMPT, answer=ANSWER)


def alike(engines: int) -> list[int]:
    return [max(RANKS)] * engines


def pools(timings: Timings, traffic: Traffic, engines: int, size: Size) -> list[int]:
    """The largest rank of each engine. A pool gets as many as hold its adapters, as far as there are so many; beyond
    that the engines go where the work is."""
    shares = _gathered(traffic.shares())
    adapters = _gathered({rank: float(traffic.ranks.count(rank)) for rank in RANKS})
    hold = {rank: ceil(adapters[rank] / (size.memory * ROOM)) for rank in POOLS}
    work = {rank: shares[rank] / capacity(timings, rank) for rank in POOLS}
    counts = dict.fromkeys(POOLS, 1)
    for _ in range(engines - len(POOLS)):
        short = max(POOLS, key=lambda rank: (max(1.0, hold[rank] / counts[rank]), work[rank] / counts[rank]))
        counts[short] += 1
    return [rank for rank in POOLS for _ in range(counts[rank])]


def _gathered(by_rank: Mapping[int, float]) -> dict[int, float]:
    """By the pool that each rank belongs to."""
    found = dict.fromkeys(POOLS, 0.0)
    for rank, amount in by_rank.items():
        found[min(pool for pool in POOLS if pool >= rank)] += amount
    return found
