"""A fleet in simulated time: requests, loads, checkpoints and deaths, as discrete events."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from fleet.engine import Engine, Size
from fleet.policies import Policy
from fleet.seen import Load, Seen
from fleet.store import NEVER, Store
from fleet.timings import BYTES_PER_RANK, Timings
from fleet.traffic import Traffic


@dataclass(frozen=True, slots=True)
class Plan:
    """Requests that come after `warm` seconds are measured. `dies` and `joins`: seconds at which an engine does that
    has about as many adapters as others."""

    warm: float = 0.0
    dies: float = NEVER
    joins: float = NEVER


@dataclass(frozen=True, slots=True)
class Fetch:
    """An adapter on its way from the store; void when the engine has died since."""

    engine: Engine
    life: int
    adapter: int


class Simulation:
    """Adapters are numbers: those of the traffic, which are runs too, and one more for each revision since. `ranks`:
    the largest of each engine."""

    def __init__(
        self, timings: Timings, ranks: Sequence[int], size: Size, policy: Callable[[Sequence[Engine]], Policy],
        traffic: Traffic, plan: Plan,
    ) -> None:  # fmt: skip
        self.engines = [Engine(number, timings, rank, size) for number, rank in enumerate(ranks)]
        self.policy = policy(self.engines)
        self.traffic, self.plan = traffic, plan
        self.store: Store[Fetch] = Store()
        self.events: list[tuple[float, int, Callable[[float], None]]] = []
        self.number = 0
        self.asked: list[int] = traffic.adapters.tolist()
        self.prompts: list[int] = traffic.prompts.tolist()
        self.answers: list[int] = traffic.answers.tolist()
        self.rank = list(traffic.ranks)
        self.run = list(range(len(self.rank)))
        self.current = list(range(len(self.rank)))  # what each run's name means
        self.moving: dict[int, tuple[int, set[int]]] = {}  # by run: its new revision, and the engines it has to reach
        self.superseded: set[int] = set()
        count = len(traffic.times)
        self.revision = [0] * count  # of each request, as are these
        self.first, self.last, self.waited = np.zeros(count), np.zeros(count), np.zeros(count, bool)
        self.loads: list[Load] = []
        self.retried = 0

    def at(self, moment: float, what: Callable[[float], None]) -> None:
        self.number += 1
        heapq.heappush(self.events, (moment, self.number, what))

    def fill(self, adapters: Sequence[int], in_flight: int) -> None:
        """Begin as if these had been asked for before, one by one, each answered when so many more had come."""
        running: deque[tuple[int, int]] = deque()
        for adapter in adapters:
            number, copy = self.policy.choose(adapter, adapter, self.rank[adapter])
            for place in (number, copy):
                if place is not None:
                    self._have(self.engines[place], adapter)
            self.policy.begun(number, adapter)
            running.append((number, adapter))
            if len(running) > in_flight:
                self.policy.ended(*running.popleft())
        for number, adapter in running:
            self.policy.ended(number, adapter)

    def _have(self, engine: Engine, adapter: int) -> None:
        if adapter in engine.inside:
            engine.inside.move_to_end(adapter)
            return
        _, gone = engine.make_place()
        if gone is not None:
            self.policy.removed(engine.number, gone)
        engine.came(adapter)
        self.policy.loading(engine.number, adapter)
        self.policy.loaded(engine.number, adapter)

    def go(self) -> Seen:
        """Until the last request is answered."""
        for moment, run in self.traffic.checkpoints:
            self.at(moment, partial(self._checkpoint, run))
        if self.plan.dies < NEVER:
            self.at(self.plan.dies, self._die)
        arrivals, events = [*self.traffic.times.tolist(), NEVER], self.events
        request = 0
        while events or arrivals[request] < NEVER:
            if events and events[0][0] <= arrivals[request]:
                moment, _, what = heapq.heappop(events)
                what(moment)
            else:
                adapter = self.revision[request] = self.current[self.asked[request]]
                self._hand_on(request, adapter, arrivals[request])
                request += 1
        return self._seen()

    # requests

    def _hand_on(self, request: int, adapter: int, now: float) -> None:
        number, copy = self.policy.choose(adapter, self.run[adapter], self.rank[adapter])
        engine = self.engines[number]
        self.policy.begun(number, adapter)
        engine.advance(now)
        if adapter in engine.inside and adapter not in engine.ready and engine.may_begin(adapter):
            self._begin(engine, request, adapter)
        else:
            engine.wait(request, adapter)
            if adapter not in engine.inside:
                self.waited[request] = True
                self._bring(engine, adapter, now)
            self._admit(engine)
        self._changed(engine)
        if copy is not None:
            self._bring(self.engines[copy], adapter, now)

    def _begin(self, engine: Engine, request: int, adapter: int) -> None:
        self.first[request] = engine.begin(request, adapter, self.prompts[request], self.answers[request])

    def _admit(self, engine: Engine) -> None:
        while engine.ready and (found := engine.next_waiting()) is not None:
            self._begin(engine, *found)

    def _changed(self, engine: Engine) -> None:
        engine.set_pace()
        due = engine.next_end()
        if due < engine.due:
            engine.due = due
            self.at(due, partial(self._look, engine, engine.life))

    def _look(self, engine: Engine, life: int, now: float) -> None:
        """Some may have ended; if not yet, because it became slower since, it is looked at again."""
        if life != engine.life or now < engine.due:
            return
        engine.due = NEVER
        engine.advance(now)
        while engine.ends and engine.ends[0][0] <= engine.done + 1e-9:
            request = heapq.heappop(engine.ends)[1]
            engine.end(self.revision[request])
            self.policy.ended(engine.number, self.revision[request])
            self.last[request] = now
        self._admit(engine)
        if engine.coming and engine.loading is None:
            self._load_next(engine, now)
        self._changed(engine)

    # loads

    def _bring(self, engine: Engine, adapter: int, now: float) -> None:
        if engine.alive and adapter not in engine.inside and adapter not in engine.coming:
            engine.coming[adapter] = None
            self.policy.loading(engine.number, adapter)
            if engine.loading is None:
                self._load_next(engine, now)

    def _load_next(self, engine: Engine, now: float) -> None:
        """One at a time; while all that is inside answers, none."""
        has_place, gone = engine.make_place()
        if gone is not None:
            self.policy.removed(engine.number, gone)
        if has_place:
            engine.loading = next(iter(engine.coming))
            self.store.advance(now)
            self.store.add(Fetch(engine, engine.life, engine.loading), self._size(engine.loading))
            self._await_fetch()

    def _size(self, adapter: int) -> int:
        return self.rank[adapter] * BYTES_PER_RANK

    def _await_fetch(self) -> None:
        due = self.store.next_end()
        if due < self.store.due:
            self.store.due = due
            self.at(due, self._fetched)

    def _fetched(self, now: float) -> None:
        if now < self.store.due:
            return
        self.store.due = NEVER
        self.store.advance(now)
        for fetch in self.store.ended():
            engine, adapter = fetch.engine, fetch.adapter
            if fetch.life == engine.life:
                self.loads.append(Load(now, self._size(adapter), adapter in engine.wanted))
                engine.advance(now)
                ready = engine.stall(engine.timings.load(self.rank[adapter]))
                self.at(ready, partial(self._loaded, fetch))
                self._changed(engine)
        self._await_fetch()

    def _loaded(self, fetch: Fetch, now: float) -> None:
        engine, adapter = fetch.engine, fetch.adapter
        if fetch.life != engine.life:
            return
        engine.advance(now)
        engine.loading = None
        del engine.coming[adapter]
        engine.came(adapter)
        if adapter in self.superseded:
            engine.inside.move_to_end(adapter, last=False)
        self.policy.loaded(engine.number, adapter)
        self._admit(engine)
        if engine.coming:
            self._load_next(engine, now)
        self._changed(engine)
        run = self.run[adapter]
        if run in self.moving and self.moving[run][0] == adapter:
            self._arrived(run, engine.number)

    # checkpoints

    def _checkpoint(self, run: int, now: float) -> None:
        """It is loaded where the rule says; a newer one passes by one that is not there yet."""
        adapter = len(self.rank)
        self.rank.append(self.rank[run])
        self.run.append(run)
        if run in self.moving:
            self.superseded.add(self.moving[run][0])
        places = self.policy.places(adapter, self.current[run], run, self.rank[run])
        self.moving[run] = adapter, set(places)
        for number in places:
            self._bring(self.engines[number], adapter, now)

    def _arrived(self, run: int, number: int) -> None:
        """When it is everywhere, the name moves; the one before makes place first."""
        adapter, missing = self.moving[run]
        missing.discard(number)
        if not missing:
            del self.moving[run]
            before, self.current[run] = self.current[run], adapter
            self.superseded.add(before)
            for engine in self.engines:
                if before in engine.inside:
                    engine.inside.move_to_end(before, last=False)

    # deaths

    def _die(self, now: float) -> None:
        """What it was answering is asked for again."""
        engine = sorted(self.engines, key=lambda engine: len(engine.inside))[len(self.engines) // 2]
        self.at(self.plan.joins, partial(self._join, engine))
        engine.advance(now)
        lost = [request for _, request in engine.ends]
        for waiting in (*engine.wanted.values(), *engine.ready.values()):
            lost += waiting.requests
        engine.life += 1
        engine.alive = False
        engine.clear(now)
        self.policy.died(engine.number)
        self.retried += len(lost)
        for request in lost:
            self._hand_on(request, self.revision[request], now)
        for run in [run for run, (_, missing) in self.moving.items() if engine.number in missing]:
            self._arrived(run, engine.number)

    def _join(self, engine: Engine, now: float) -> None:
        engine.alive = True
        engine.clear(now)
        self.policy.joined(engine.number)

    def _seen(self) -> Seen:
        times, warm = self.traffic.times, self.plan.warm
        measured = times >= warm
        loads = [load for load in self.loads if warm <= load.moment <= times[-1]]
        growth = self._in_flight(times[-1]) / max(1, self._in_flight((warm + times[-1]) / 2))
        return Seen(
            (self.first - times)[measured], (self.last - times)[measured], self.waited[measured], growth,
            float(times[-1]) - warm, loads, [engine.used for engine in self.engines], self.retried,
        )  # fmt: skip

    def _in_flight(self, moment: float) -> int:
        return int(((self.traffic.times <= moment) & (self.last > moment)).sum())
