"""Whose turn it is in an engine with fewer slots than adapters: a pure decision over what is in it and who waits.

Whoever waits longest is served first. Of what is in the engine, the least recently used that answers nothing makes
place; only when nothing is idle does a busy adapter stop taking new requests, and none before others have waited for
`fair_wait` seconds, so that a hot one neither starves them nor is loaded anew for every request.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lorakit.server.engines.engine import Answering


@dataclass(frozen=True, slots=True)
class Room:
    """How many adapters an engine answers with at once, and how many it holds in memory; `fair_wait` in seconds."""

    slots: int
    memory: int
    fair_wait: float


@dataclass(slots=True, eq=False)
class Resident:
    """An adapter in an engine, under a name that the engine was never given before; `names` are the revisions of its
    content that were asked for, `name` the first of them.

    `leaving`: it is not wanted any more. `waited_for`: another needs its slot. `entering`: it is not proven yet.
    `removing`: it may be half out already, and `stuck` says why it is not out. `promised`: requests that waited for it
    and are about to be counted in. `seconds`: that it took to load and prove it.
    """

    name: str
    engine_name: str
    folder: Path
    engine: Answering
    names: set[str] = field(default_factory=set)
    in_flight: int = 0
    promised: int = 0
    leaving: bool = False
    waited_for: bool = False
    entering: bool = False
    removing: bool = False
    stuck: Exception | None = None
    kept: bool = False
    pinned: bool = False
    seconds: float = 0.0
    used: float = field(default_factory=time.monotonic)

    @property
    def draining(self) -> bool:
        """Whether it takes no new requests."""
        return self.leaving or self.waited_for or self.entering or self.removing

    @property
    def proven(self) -> bool:
        return not (self.entering or self.removing)

    @property
    def open(self) -> bool:
        """Whether a request may begin: what waited has its turn, though others wait for theirs already."""
        return not self.draining or (self.promised > 0 and self.proven and not self.leaving)

    @property
    def busy(self) -> bool:
        return self.in_flight + self.promised > 0


@dataclass(slots=True, eq=False)
class Want:
    """An adapter that is waited for, by one or more; `settled` when it may be used, or when `error` says why not.

    `wait`: seconds that the first of them waits. `urgent`: a busy adapter makes place without having had its time.
    `begun`: it has a place, and is being loaded or tried out there.
    """

    folder: Path
    name: str
    wait: float
    names: set[str] = field(default_factory=set)
    urgent: bool = False
    begun: bool = False
    waiters: int = 0
    since: float = field(default_factory=time.monotonic)
    settled: asyncio.Event = field(default_factory=asyncio.Event)
    promised_by: Resident | None = None
    error: Exception | None = None


@dataclass(frozen=True, slots=True)
class Take:
    """It is there, and has a slot: whoever waits for it may use it."""

    resident: Resident
    want: Want


@dataclass(frozen=True, slots=True)
class Load:
    """There is place for it."""

    want: Want


@dataclass(frozen=True, slots=True)
class Remove:
    """It makes place, or is not wanted any more."""

    resident: Resident


Step = Take | Load | Remove


def next_step(residents: Sequence[Resident], wants: Sequence[Want], room: Room) -> Step | None:
    """What can be done now, `wants` in the order in which they came; None when all has to wait."""
    for resident in residents:
        if resident.leaving and not resident.busy and not resident.removing:
            return Remove(resident)
    inside = {resident.folder: resident for resident in residents}
    for want in wants:
        found = inside.get(want.folder)
        if found is not None and found.proven and not found.waited_for:
            if has_slot(found, residents, room):
                return Take(found, want)
        elif (step := _way_in(want, found, residents, room)) is not None:
            return step
    return None


def _way_in(want: Want, half_out: Resident | None, residents: Sequence[Resident], room: Room) -> Step | None:
    """For what is not there: into a free place, or one that is made."""
    if half_out is not None and not half_out.removing:
        return None
    if half_out is not None:
        return Remove(half_out)
    if sum(resident.busy for resident in residents) >= room.slots:
        return None
    if len(residents) < room.memory:
        return Load(want)
    idle = [resident for resident in residents if not resident.busy and not resident.pinned]
    return Remove(min(idle, key=_goes_first)) if idle else None


def has_slot(resident: Resident, residents: Sequence[Resident], room: Room, *, promised: int = 0) -> bool:
    """Whether it holds a slot, or may take one, when so many are promised to others."""
    return resident.busy or sum(other.busy for other in residents) + promised < room.slots


def yielding(residents: Sequence[Resident], wants: Sequence[Want], room: Room, now: float) -> float:
    """Mark the busy adapters that take no new requests until others had their turn, and no others: one more for each
    `fair_wait` that somebody waits. Seconds until that changes by itself.

    One that leaves comes to rest by itself, so to mark it gains nothing; one that is pinned makes no place.
    """
    due = sum(_due(want, room, now) for want in wants) - max(0, room.slots - sum(one.busy for one in residents))
    may_yield = [
        resident
        for resident in residents
        if resident.busy and not resident.leaving and (not resident.pinned or room.memory > room.slots)
    ]
    order = sorted(may_yield, key=lambda resident: (not resident.waited_for, *_goes_first(resident)))
    marked = {id(resident) for resident in order[: int(max(0, min(due, len(order))))]}
    for resident in residents:
        resident.waited_for = id(resident) in marked
    if not wants or room.fair_wait <= 0:
        return math.inf
    return min(room.fair_wait - (now - want.since) % room.fair_wait for want in wants)


def _due(want: Want, room: Room, now: float) -> float:
    """How many busy adapters have to make place for it by now: the first of them may be at a long answer."""
    waited = (now - want.since) // room.fair_wait if room.fair_wait > 0 else math.inf
    return waited + want.urgent


def _goes_first(resident: Resident) -> tuple[bool, bool, bool, float]:
    """First what is half out, then what leaves anyway, then what nobody wants kept; among equals the least recently
    used."""
    return not resident.removing, not resident.leaving, resident.kept, resident.used
