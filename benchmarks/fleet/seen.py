"""What a simulated fleet did, in numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LOOK = 30.0  # seconds before and after an engine dies or joins, in which loads are counted
LONG = 5.0  # seconds to a first token: with less, more requests at the end than before are chance


@dataclass(frozen=True, slots=True)
class Load:
    """When it was fetched, its bytes, and whether a request waited for it."""

    moment: float
    size: int
    awaited: bool


@dataclass(frozen=True, slots=True)
class Seen:
    """Of the requests that are measured, in the order in which they came: seconds to the first and to the last token,
    and whether each waited for a load. `growth`: of those in flight, from halfway to the end. `seconds`: how long they
    came. `used`: of each engine, requests times seconds."""

    first: np.ndarray
    last: np.ndarray
    waited: np.ndarray
    growth: float
    seconds: float
    loads: Sequence[Load]
    used: Sequence[float]
    retried: int

    @property
    def falls_behind(self) -> bool:
        """Whether its times grow for as long as it runs, for all or for some: those who ask for a hot adapter."""
        slowest, _ = self.within(0.99)
        return slowest > self.seconds / 4 or (slowest > LONG and self.growth > 1.3)

    @property
    def loads_per_thousand(self) -> float:
        return 1000 * len(self.loads) / len(self.last)

    @property
    def cold_per_thousand(self) -> float:
        return 1000 * sum(load.awaited for load in self.loads) / len(self.last)

    @property
    def store_rate(self) -> float:
        """Bytes a second."""
        return sum(load.size for load in self.loads) / self.seconds

    @property
    def balance(self) -> float:
        """The engine with most requests at a time, by the mean."""
        return float(max(self.used) / np.mean(self.used))

    def within(self, share: float) -> tuple[float, float]:
        """Seconds within which this share of the first and of the last tokens came."""
        return float(np.quantile(self.first, share)), float(np.quantile(self.last, share))

    def more_loads(self, moment: float, before: float) -> int:
        """After the one moment than before the other."""
        usual = sum(before - LOOK <= load.moment < before for load in self.loads)
        return sum(moment <= load.moment < moment + LOOK for load in self.loads) - usual
