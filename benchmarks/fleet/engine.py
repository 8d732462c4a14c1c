"""One engine in simulated time. Its requests share it: each step gives every one of them a token. A prompt and a load
hold all of them up, as they do in vLLM."""

from __future__ import annotations

import heapq
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from itertools import islice

from fleet.timings import Timings
from fleet.traffic import RANKS

MOST_SLOTS = 128
LOOKED_AT = 8  # of those that wait for a slot: enough to find one that may begin, and to be fair


@dataclass(frozen=True, slots=True)
class Size:
    """`slots` are as many as the GPU's memory has for adapters of the largest rank there is: of a smaller one there are
    more. `memory`: adapters that the engine holds; `at_once`: requests that it answers at a time."""

    slots: int = 32
    memory: int = 192
    at_once: int = 256
    fair_wait: float = 1.0

    def slots_of(self, rank: int) -> int:
        return min(MOST_SLOTS, self.slots * max(RANKS) // rank)


@dataclass(slots=True, eq=False)
class Waiting:
    """Requests for one adapter, and since when it waits."""

    since: float
    requests: deque[int] = field(default_factory=deque)


class Engine:
    """What it has and what it answers. `done` is how many tokens each request would have had that was there from the
    start: a request ends when that has grown by its length."""

    def __init__(self, number: int, timings: Timings, rank: int, size: Size) -> None:
        self.number, self.timings, self.rank, self.size = number, timings, rank, size
        self.slots = size.slots_of(rank)
        self.life = 0  # how often it died: what was begun in an earlier one is void
        self.alive = True
        self.used = 0.0  # requests times seconds
        self.clear(0.0)

    def clear(self, now: float) -> None:
        self.now = self.stalled = now
        self.done = 0.0
        self.pace = 1.0  # seconds a step
        self.ends: list[tuple[float, int]] = []  # (done, request)
        self.answering: dict[int, int] = {}
        self.inside: OrderedDict[int, None] = OrderedDict()  # adapters, the least recently used first
        self.wanted: dict[int, Waiting] = {}  # what is waited for, and not there
        self.ready: dict[int, Waiting] = {}  # what is there, and has no slot
        self.waiting = 0  # requests
        self.yielding: set[int] = set()
        self.coming: dict[int, None] = {}  # adapters that are to be loaded, in order
        self.loading: int | None = None
        self.due = float("inf")  # when it is looked at next

    @property
    def in_flight(self) -> int:
        return len(self.ends) + self.waiting

    def advance(self, now: float) -> None:
        begin = max(self.now, self.stalled)
        if self.ends and now > begin:
            self.done += (now - begin) / self.pace
        self.used += self.in_flight * (now - self.now)
        self.now = now

    def set_pace(self) -> None:
        self.pace = self.timings.step(len(self.ends), len(self.answering), self.rank)

    def stall(self, seconds: float) -> float:
        """Nothing else goes on for so long: when that ends."""
        self.stalled = max(self.stalled, self.now) + seconds
        return self.stalled

    def next_end(self) -> float:
        if not self.ends:
            return float("inf")
        return max(self.now, self.stalled) + max(0.0, self.ends[0][0] - self.done) * self.pace

    def may_begin(self, adapter: int) -> bool:
        if len(self.ends) >= self.size.at_once or adapter not in self.inside:
            return False
        if adapter in self.answering:
            return adapter not in self.yielding
        return len(self.answering) < self.slots

    def begin(self, request: int, adapter: int, prompt: int, answer: int) -> float:
        """When its first token is there."""
        self.answering[adapter] = self.answering.get(adapter, 0) + 1
        self.inside.move_to_end(adapter)
        first = self.stall(self.timings.prompt(prompt, self.rank))
        heapq.heappush(self.ends, (self.done + answer - 1, request))
        return first

    def wait(self, request: int, adapter: int) -> None:
        among = self.ready if adapter in self.inside else self.wanted
        found = among.get(adapter)
        if found is None:
            found = among[adapter] = Waiting(self.now)
        found.requests.append(request)
        self.waiting += 1

    def came(self, adapter: int) -> None:
        """It was loaded."""
        self.inside[adapter] = None
        if adapter in self.wanted:
            self.ready[adapter] = self.wanted.pop(adapter)

    def end(self, adapter: int) -> None:
        self.answering[adapter] -= 1
        if not self.answering[adapter]:
            del self.answering[adapter]
            self.yielding.discard(adapter)

    def next_waiting(self) -> tuple[int, int] | None:
        """A request that can begin now, and its adapter. Whose turn it is follows `following/turns.py`: whoever waits
        longest; and once it has waited for `fair_wait`, an adapter that answers lets it have its slot."""
        if len(self.ends) >= self.size.at_once:
            return None
        stuck = 0
        for adapter, waiting in islice(self.ready.items(), LOOKED_AT):
            if self.may_begin(adapter):
                request = waiting.requests.popleft()
                self.waiting -= 1
                if not waiting.requests:
                    del self.ready[adapter]
                return request, adapter
            stuck += adapter not in self.answering and self.now - waiting.since >= self.size.fair_wait
        if stuck > len(self.yielding):
            oldest_first = (one for one in self.inside if one in self.answering and one not in self.yielding)
            self.yielding.update(islice(oldest_first, 1))
        return None

    def make_place(self) -> tuple[bool, int | None]:
        """Whether one more adapter has place, and what had to go for it: the least recently used that is idle."""
        if len(self.inside) < self.size.memory:
            return True, None
        for adapter in self.inside:
            if adapter not in self.answering and adapter not in self.ready:
                del self.inside[adapter]
                return True, adapter
        return False, None
