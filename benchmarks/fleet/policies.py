"""The rules that are compared: which engine a request goes to, and where a new revision is brought."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Protocol

from fleet.engine import Engine
from lorakit.server.spread.ring import Ring, place_of
from lorakit.server.spread.routing import Asked, Capacity, Nowhere, Router

BOUND = 1.25  # of the mean, as in Mirrokni, Thorup and Zadimoghaddam, SODA 2018, and in KubeAI


class Policy(Protocol):
    """An adapter is a number; `run` is the number of the first revision of the same run."""

    def choose(self, adapter: int, run: int, rank: int) -> tuple[int, int | None]:
        """An engine, and one that should get a copy."""

    def places(self, adapter: int, before: int, run: int, rank: int) -> Sequence[int]:
        """Where a new revision is loaded before the name moves to it."""

    def begun(self, engine: int, adapter: int) -> None: ...
    def ended(self, engine: int, adapter: int) -> None: ...
    def loading(self, engine: int, adapter: int) -> None: ...
    def loaded(self, engine: int, adapter: int) -> None: ...
    def removed(self, engine: int, adapter: int) -> None: ...
    def died(self, engine: int) -> None: ...
    def joined(self, engine: int) -> None: ...


class Plain:
    """Who is alive and how many requests each has: all that most rules look at."""

    def __init__(self, engines: Sequence[Engine]) -> None:
        self.alive = [engine.number for engine in engines]
        self.in_flight = [0] * len(engines)
        self.chance = random.Random(0)
        self.turn = 0

    def choose(self, adapter: int, run: int, rank: int) -> tuple[int, int | None]:
        raise NotImplementedError

    def places(self, adapter: int, before: int, run: int, rank: int) -> Sequence[int]:
        return [self.choose(adapter, run, rank)[0]]

    def begun(self, engine: int, adapter: int) -> None:
        self.in_flight[engine] += 1

    def ended(self, engine: int, adapter: int) -> None:
        self.in_flight[engine] -= 1

    def loading(self, engine: int, adapter: int) -> None:
        pass

    loaded = removed = loading

    def died(self, engine: int) -> None:
        self.alive.remove(engine)
        self.in_flight[engine] = 0

    def joined(self, engine: int) -> None:
        self.alive.append(engine)

    def least(self) -> int:
        """Among equals each in turn."""
        self.turn += 1
        begin = self.turn % len(self.alive)
        return min(self.alive[begin:] + self.alive[:begin], key=self.in_flight.__getitem__)


class AtRandom(Plain):
    def choose(self, adapter: int, run: int, rank: int) -> tuple[int, int | None]:
        return self.chance.choice(self.alive), None


class RoundRobin(Plain):
    def choose(self, adapter: int, run: int, rank: int) -> tuple[int, int | None]:
        self.turn += 1
        return self.alive[self.turn % len(self.alive)], None


class LeastLoaded(Plain):
    def choose(self, adapter: int, run: int, rank: int) -> tuple[int, int | None]:
        return self.least(), None


class Sticky(Plain):
    """The engine that a run was given first keeps it for as long as it lives."""

    def __init__(self, engines: Sequence[Engine]) -> None:
        super().__init__(engines)
        self.owners: dict[int, int] = {}

    def choose(self, adapter: int, run: int, rank: int) -> tuple[int, int | None]:
        found = self.owners.get(run)
        if found is None:
            found = self.owners[run] = self.least()
        return found, None

    def died(self, engine: int) -> None:
        super().died(engine)
        self.owners = {run: owner for run, owner in self.owners.items() if owner != engine}


class Hashing(Plain):
    """Consistent hashing of the run with bounded loads, among all engines."""

    def __init__(self, engines: Sequence[Engine]) -> None:
        super().__init__(engines)
        self.pools = self.pools_of(engines)
        self.rings = {pool: Ring() for pool in sorted(self.pools)}
        self.totals = dict.fromkeys(self.rings, 0)
        for engine, pool in zip(engines, self.pools, strict=True):
            self.rings[pool].join(str(engine.number))

    def pools_of(self, engines: Sequence[Engine]) -> list[int]:
        """The largest rank of each engine's pool: here of all of them."""
        return [max(engine.rank for engine in engines)] * len(engines)

    def choose(self, adapter: int, run: int, rank: int) -> tuple[int, int | None]:
        pool = next(pool for pool in self.rings if pool >= rank and len(self.rings[pool]))
        ring = self.rings[pool]
        most = BOUND * (self.totals[pool] + 1) / len(ring)
        for name in ring.walk(place_of(str(run))):
            found = int(name)
            if self.in_flight[found] + 1 <= most:
                break
        return found, None

    def begun(self, engine: int, adapter: int) -> None:
        super().begun(engine, adapter)
        self.totals[self.pools[engine]] += 1

    def ended(self, engine: int, adapter: int) -> None:
        super().ended(engine, adapter)
        self.totals[self.pools[engine]] -= 1

    def died(self, engine: int) -> None:
        self.totals[self.pools[engine]] -= self.in_flight[engine]
        super().died(engine)
        self.rings[self.pools[engine]].leave(str(engine))

    def joined(self, engine: int) -> None:
        super().joined(engine)
        self.rings[self.pools[engine]].join(str(engine))


class RankPools(Hashing):
    """The same within the engines of the smallest largest rank that is large enough."""

    def pools_of(self, engines: Sequence[Engine]) -> list[int]:
        return [engine.rank for engine in engines]


class Product:
    """lorakit's own router."""

    def __init__(self, engines: Sequence[Engine]) -> None:
        self.engines = engines
        self.router = Router()
        self.names: dict[int, str] = {}
        for engine in engines:
            self.joined(engine.number)

    def name(self, adapter: int) -> str:
        found = self.names.get(adapter)
        if found is None:
            found = self.names[adapter] = f"a{adapter}"
        return found

    def choose(self, adapter: int, run: int, rank: int) -> tuple[int, int | None]:
        choice = self.router.choose(Asked(self.name(adapter), rank, self.name(run)))
        assert not isinstance(choice, Nowhere), choice.reason
        return int(choice.engine), None if choice.copy_to is None else int(choice.copy_to)

    def places(self, adapter: int, before: int, run: int, rank: int) -> Sequence[int]:
        asked = Asked(self.name(adapter), rank, self.name(run))
        return [int(engine) for engine in self.router.places(asked, self.name(before))]

    def begun(self, engine: int, adapter: int) -> None:
        self.router.begun(str(engine), self.name(adapter))

    def ended(self, engine: int, adapter: int) -> None:
        self.router.ended(str(engine), self.name(adapter))

    def loading(self, engine: int, adapter: int) -> None:
        self.router.loading(str(engine), self.name(adapter))

    def loaded(self, engine: int, adapter: int) -> None:
        self.router.loaded(str(engine), self.name(adapter))

    def removed(self, engine: int, adapter: int) -> None:
        self.router.removed(str(engine), self.name(adapter))

    def died(self, engine: int) -> None:
        self.router.leave(str(engine))

    def joined(self, engine: int) -> None:
        found = self.engines[engine]
        self.router.join(str(engine), Capacity(found.slots, found.size.memory, found.rank, found.size.at_once))


class Apart:
    """The same in several gateways, each of which knows what every engine has, and only its own requests."""

    def __init__(self, engines: Sequence[Engine]) -> None:
        self.gateways = [Product(engines) for _ in range(4)]
        self.turn = 0
        self.waiting: dict[tuple[int, int], list[Product]] = {}  # for an engine's answer with an adapter

    def choose(self, adapter: int, run: int, rank: int) -> tuple[int, int | None]:
        self.turn = (self.turn + 1) % len(self.gateways)
        return self.gateways[self.turn].choose(adapter, run, rank)

    def places(self, adapter: int, before: int, run: int, rank: int) -> Sequence[int]:
        return self.gateways[self.turn].places(adapter, before, run, rank)

    def begun(self, engine: int, adapter: int) -> None:
        self.gateways[self.turn].begun(engine, adapter)
        self.waiting.setdefault((engine, adapter), []).append(self.gateways[self.turn])

    def ended(self, engine: int, adapter: int) -> None:
        waiting = self.waiting.get((engine, adapter))
        if waiting:
            waiting.pop(0).ended(engine, adapter)
            if not waiting:
                del self.waiting[engine, adapter]

    def loading(self, engine: int, adapter: int) -> None:
        for gateway in self.gateways:
            gateway.loading(engine, adapter)

    def loaded(self, engine: int, adapter: int) -> None:
        for gateway in self.gateways:
            gateway.loaded(engine, adapter)

    def removed(self, engine: int, adapter: int) -> None:
        for gateway in self.gateways:
            gateway.removed(engine, adapter)

    def died(self, engine: int) -> None:
        self.waiting = {pair: waiting for pair, waiting in self.waiting.items() if pair[0] != engine}
        for gateway in self.gateways:
            gateway.died(engine)

    def joined(self, engine: int) -> None:
        for gateway in self.gateways:
            gateway.joined(engine)


POLICIES: dict[str, Callable[[Sequence[Engine]], Policy]] = {
    "random": AtRandom,
    "round robin": RoundRobin,
    "least loaded": LeastLoaded,
    "sticky": Sticky,
    "consistent hashing, bounded": Hashing,
    "rank pools, hashing": RankPools,
    "lorakit": Product,
    "lorakit, 4 gateways": Apart,
}
