"""Where adapters are kept, in simulated time: what is fetched shares its bandwidth."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

NEVER = float("inf")
Fetch = TypeVar("Fetch")


@dataclass(slots=True)
class Store(Generic[Fetch]):
    """Bytes a second that it gives to all, and at most to one. `given` is how many bytes each fetch would have had that
    was there from the start."""

    bandwidth: float = 10e9
    link: float = 3e9
    now: float = 0.0
    given: float = 0.0
    fetches: list[tuple[float, int, Fetch]] = field(default_factory=list)
    count: int = 0
    due: float = NEVER  # when it is looked at next

    @property
    def pace(self) -> float:
        return min(self.link, self.bandwidth / max(1, len(self.fetches)))

    def advance(self, now: float) -> None:
        self.given += (now - self.now) * self.pace
        self.now = now

    def add(self, fetch: Fetch, size: int) -> None:
        self.count += 1
        heapq.heappush(self.fetches, (self.given + size, self.count, fetch))

    def ended(self) -> Iterator[Fetch]:
        while self.fetches and self.fetches[0][0] <= self.given + 1.0:  # within a byte
            yield heapq.heappop(self.fetches)[2]

    def next_end(self) -> float:
        if not self.fetches:
            return NEVER
        return self.now + max(0.0, self.fetches[0][0] - self.given) / self.pace
