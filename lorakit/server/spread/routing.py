"""Which of several engines answers a request: a pure decision over what is known of each, in microseconds.

A request goes where its adapter is, to the least busy such engine. An adapter that is nowhere goes to one of its two
homes, which consistent hashing gives it among the engines of the smallest largest rank that is large enough, for every
request to an engine pays for that rank. An adapter with so many requests in flight that one engine should not answer
them all is copied to others, while it keeps those that have it above the mean. Requests go to a copy once it is there;
or at once, where they would only wait in a queue, or for a slot while a far less busy engine has one. Copies beyond
what is needed get no requests, and so make place first. `benchmarks/fleet.py` compares this with other rules, and is
where the numbers below come from.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field

from lorakit.server.spread.ring import Ring, place_of, place_of_number

BUSY = 1.25  # times the mean of all engines
IDLE = 1 / 64  # of what an engine answers at once: below that none is busy
PART = 0.25  # of an engine's usual requests: an adapter has one engine, and one more for each such part
SPARE = 0.5  # of another's requests: an engine with no more is worth a load where a request would wait for a slot
HOMES = 2  # of each pool that are looked at


@dataclass(frozen=True, slots=True)
class Capacity:
    """What an engine was started with. `slots`: adapters that answer at once; `memory`: that it holds; `at_once`:
    requests that it answers at once, while others wait in its queue."""

    slots: int
    memory: int
    max_rank: int
    at_once: int


@dataclass(frozen=True, slots=True)
class Asked:
    """What a request names: a revision, its rank, and its run, for all revisions of a run have the same homes."""

    adapter: str
    rank: int
    run: str


@dataclass(frozen=True, slots=True)
class Choice:
    """`is_there`: the engine has the adapter; `copy_to`: another that should have it too, before long."""

    engine: str
    is_there: bool = True
    copy_to: str | None = None


@dataclass(frozen=True, slots=True)
class Nowhere:
    """No engine can answer, and why."""

    reason: str


@dataclass(slots=True, eq=False)
class _Engine:
    name: str
    capacity: Capacity
    healthy: bool = True
    in_flight: int = 0
    answering: dict[str, int] = field(default_factory=dict)  # requests of each adapter
    adapters: set[str] = field(default_factory=set)
    coming: set[str] = field(default_factory=set)

    @property
    def fill(self) -> float:
        return self.in_flight / self.capacity.at_once

    @property
    def is_full(self) -> bool:
        return self.in_flight >= self.capacity.at_once

    @property
    def has_place(self) -> bool:
        return len(self.adapters) + len(self.coming) < self.capacity.memory

    def has_slot(self, adapter: str | None) -> bool:
        return adapter is None or adapter in self.answering or len(self.answering) < self.capacity.slots


@dataclass(slots=True, eq=False)
class _Adapter:
    """Engines in the order in which they got it."""

    holders: dict[str, _Engine] = field(default_factory=dict)
    coming: dict[str, _Engine] = field(default_factory=dict)
    in_flight: int = 0


class Router:
    """Holds what it is told of the engines, and chooses. It asks nobody and has no clock: the same tellings give the
    same choices. An engine that was started anew joins anew."""

    def __init__(self) -> None:
        self._engines: dict[str, _Engine] = {}
        self._adapters: dict[str, _Adapter] = {}  # those that are somewhere, or asked for
        self._pools: dict[int, Ring] = {}  # by largest rank, the smallest first
        self._in_flight = 0  # of the healthy
        self._at_once = 0
        self._plain = 0  # requests for the base so far

    # what there is

    def join(self, engine: str, capacity: Capacity) -> None:
        """An engine is there, and nothing is in it."""
        self.leave(engine)
        self._engines[engine] = _Engine(engine, capacity)
        self._at_once += capacity.at_once
        if capacity.max_rank not in self._pools:
            self._pools = dict(sorted({**self._pools, capacity.max_rank: Ring()}.items()))
        self._pools[capacity.max_rank].join(engine)

    def leave(self, engine: str) -> None:
        """An engine is gone, with all that was in it and all that it was answering."""
        if engine not in self._engines:
            return
        self.set_health(engine, False)
        found = self._engines.pop(engine)
        for name in {*found.adapters, *found.coming, *found.answering}:
            adapter = self._adapters[name]
            adapter.holders.pop(engine, None)
            adapter.coming.pop(engine, None)
            adapter.in_flight -= found.answering.get(name, 0)
            self._forget(name, adapter)
        rank = found.capacity.max_rank
        self._pools[rank].leave(engine)
        if not len(self._pools[rank]):
            del self._pools[rank]

    def set_health(self, engine: str, healthy: bool) -> None:
        """Whether it answers: one that does not gets no requests, and keeps what it has."""
        found = self._engines[engine]
        if found.healthy != healthy:
            found.healthy = healthy
            sign = 1 if healthy else -1
            self._in_flight += sign * found.in_flight
            self._at_once += sign * found.capacity.at_once

    def loading(self, engine: str, adapter: str) -> None:
        """An adapter is on its way into an engine; `loaded` or `removed` follows."""
        self._engines[engine].coming.add(adapter)
        self._known(adapter).coming[engine] = self._engines[engine]

    def loaded(self, engine: str, adapter: str) -> None:
        """It is in the engine, and answers."""
        found, known = self._engines[engine], self._known(adapter)
        found.coming.discard(adapter)
        known.coming.pop(engine, None)
        found.adapters.add(adapter)
        known.holders[engine] = found

    def removed(self, engine: str, adapter: str) -> None:
        """It is in the engine no more, or did not get there."""
        found, known = self._engines[engine], self._known(adapter)
        found.coming.discard(adapter)
        known.coming.pop(engine, None)
        found.adapters.discard(adapter)
        known.holders.pop(engine, None)
        self._forget(adapter, known)

    def begun(self, engine: str, adapter: str | None) -> None:
        """A request was handed to an engine; None for one of the base."""
        found = self._engines[engine]
        found.in_flight += 1
        self._in_flight += found.healthy
        if adapter is not None:
            found.answering[adapter] = found.answering.get(adapter, 0) + 1
            self._known(adapter).in_flight += 1

    def ended(self, engine: str, adapter: str | None) -> None:
        """It was answered, or failed. Nothing, for an engine that has left."""
        found = self._engines.get(engine)
        if found is None or (adapter is not None and adapter not in found.answering):
            return
        found.in_flight -= 1
        self._in_flight -= found.healthy
        if adapter is not None:
            known = self._adapters[adapter]
            known.in_flight -= 1
            found.answering[adapter] -= 1
            if not found.answering[adapter]:
                del found.answering[adapter]
                self._forget(adapter, known)

    def _known(self, adapter: str) -> _Adapter:
        known = self._adapters.get(adapter)
        if known is None:
            known = self._adapters[adapter] = _Adapter()
        return known

    def _forget(self, name: str, adapter: _Adapter) -> None:
        if not (adapter.holders or adapter.coming or adapter.in_flight):
            self._adapters.pop(name, None)

    # choices

    def choose(self, asked: Asked | None) -> Choice | Nowhere:
        """Where a request goes; None asks for the base. There is an engine as long as one is healthy and takes the
        rank, however busy all are."""
        if asked is None:
            self._plain += 1
            near = self._near(self._pools.values(), place_of_number(self._plain))
            found = self._least(near, None)
            return Choice(found.name) if found is not None else Nowhere(self._why_nowhere(0))
        known = self._adapters.get(asked.adapter)
        if known is not None:
            if holders := _usable(known.holders.values(), asked.rank):
                return self._among(holders, known, asked)
            if coming := _usable(known.coming.values(), asked.rank):
                return Choice(_best(coming, asked.adapter).name, is_there=False)
        found = self._home(asked)
        return Choice(found.name, is_there=False) if found is not None else Nowhere(self._why_nowhere(asked.rank))

    def places(self, asked: Asked, before: str | None = None) -> tuple[str, ...]:
        """The engines that should have a revision before a name moves to it: those that answer for `before`, which the
        name means now; else the one to which a first request would go."""
        known = self._adapters.get(before) if before is not None else None
        if known is not None and (holders := _usable(known.holders.values(), asked.rank)):
            return tuple(one.name for one in holders if before in one.answering) or (holders[0].name,)
        choice = self.choose(asked)
        return (choice.engine,) if isinstance(choice, Choice) else ()

    def _among(self, holders: list[_Engine], known: _Adapter, asked: Asked) -> Choice:
        """One of those that have it, and whether one more should."""
        needed = self._needed(known)
        best = _best(holders[:needed], asked.adapter)
        if self._is_busy(best) or not best.has_slot(asked.adapter):
            best = _best(holders, asked.adapter)
        waits = best.is_full or not best.has_slot(asked.adapter)
        is_enough = best.fill <= max(IDLE, self._mean) or len(holders) + len(known.coming) >= needed
        if is_enough and not waits:
            return Choice(best.name)
        other = self._home(asked, {*known.holders, *known.coming})
        if other is None or other.fill >= best.fill or self._is_busy(other) or not other.has_slot(asked.adapter):
            return Choice(best.name)
        if best.is_full or (waits and other.fill <= SPARE * best.fill):
            return Choice(other.name, is_there=False)
        return Choice(best.name, copy_to=None if is_enough or other.coming else other.name)

    def _needed(self, adapter: _Adapter) -> int:
        """Engines for what it has in flight."""
        usual = max(self._mean, IDLE) * self._at_once / len(self._engines)
        return 1 + int(adapter.in_flight / (PART * usual)) if usual else 1

    def _home(self, asked: Asked, without: Collection[str] = ()) -> _Engine | None:
        """Where to load it: in the smallest pool that takes its rank, unless its homes there are busy."""
        place = place_of(asked.run)
        found: list[_Engine] = []
        for rank, ring in self._pools.items():
            if rank >= asked.rank:
                near = list(self._near([ring], place, without))
                best = self._least(near, asked.adapter)
                if best is not None and not self._is_busy(best) and best.has_slot(asked.adapter):
                    return best
                found += near
        return self._least(found, asked.adapter)

    def _near(self, rings: Iterable[Ring], place: int, without: Collection[str] = ()) -> Iterator[_Engine]:
        """Of each ring the first that are healthy."""
        for ring in rings:
            left = HOMES
            for name in ring.walk(place):
                engine = self._engines[name]
                if engine.healthy and name not in without:
                    yield engine
                    left -= 1
                    if not left:
                        break

    def _least(self, engines: Iterable[_Engine], adapter: str | None) -> _Engine | None:
        """The least busy of those that have a slot; those with place for another adapter come first."""
        return min(
            engines, default=None, key=lambda engine: (
                self._is_busy(engine), not engine.has_slot(adapter), not engine.has_place, engine.fill
            ),
        )  # fmt: skip

    @property
    def _mean(self) -> float:
        return self._in_flight / self._at_once if self._at_once else 0.0

    def _is_busy(self, engine: _Engine) -> bool:
        return engine.fill > max(IDLE, BUSY * self._mean)

    def _why_nowhere(self, rank: int) -> str:
        ranks = [engine.capacity.max_rank for engine in self._engines.values() if engine.healthy]
        if not ranks:
            return f"none of {len(self._engines)} engines answers"
        cure = f"shrink it, or start an engine with --max-lora-rank {rank}"
        return f"its rank is {rank}, and no engine that answers takes more than {max(ranks)}: {cure}"


def _usable(engines: Iterable[_Engine], rank: int) -> list[_Engine]:
    """Those that are healthy and take the rank."""
    return [engine for engine in engines if engine.healthy and engine.capacity.max_rank >= rank]


def _best(engines: list[_Engine], adapter: str) -> _Engine:
    """The least busy, of those that have a slot."""
    if len(engines) == 1:
        return engines[0]
    return min(engines, key=lambda engine: (not engine.has_slot(adapter), engine.in_flight / engine.capacity.at_once))
