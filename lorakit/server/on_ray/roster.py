"""Which replicas there are, what is in each, and what each is to do: they come for their orders by themselves.

Orders don't wait behind requests, as calls through Ray would; and each replica can be told something of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from lorakit.errors import EngineFailed
from lorakit.server.on_ray.messages import Adapter, Bring, Described, Leave, Orders, Outcome, Told
from lorakit.server.sight.logs import log
from lorakit.server.spread.expositions import joined

HELD = 2.0  # seconds that a replica's question for orders is held, when there are none
SILENT = 3.0  # seconds
SCRAPE = 2.0  # seconds that metrics wait for a replica


@dataclass(slots=True, eq=False)
class Member:
    """A replica that is there. `heard`: when it said something last."""

    told: Told
    heard: float
    bring: list[Bring] = field(default_factory=list)
    leave: list[Leave] = field(default_factory=list)
    waits: dict[int, asyncio.Future[Outcome]] = field(default_factory=dict)
    scrape: bool = False
    scraped: asyncio.Event = field(default_factory=asyncio.Event)
    metrics: bytes = b""
    any: asyncio.Event = field(default_factory=asyncio.Event)  # there are orders

    @property
    def name(self) -> str:
        return self.told.replica

    @property
    def is_silent(self) -> bool:
        """Whether it may be dead: it says something several times in so many seconds."""
        return time.monotonic() - self.heard > SILENT


class Roster:
    """All methods run on one event loop. `patience`: seconds after which one that says nothing counts as gone."""

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self._members: dict[str, Member] = {}
        self._gone: set[str] = set()  # actors that Ray said are dead: what is still on its way from them says nothing
        self._numbers = itertools.count(1)
        self._loads = self._removes = 0  # of those that are gone
        self._left = asyncio.Event()  # set, and replaced, when one is gone
        self.came: Callable[[Member], None] = _ignored  # told of each that is new
        self.heard: Callable[[], None] = _nothing  # and whenever one said something
        self.stays: Callable[[str], tuple[bool, bool]] = _neither  # whether a revision is kept, and pinned

    # what replicas say and ask

    def tell(self, told: Told) -> None:
        """A replica says how it is."""
        if told.actor in self._gone:
            return
        if told.ends:
            self._gone.add(told.actor)
            self._forget(told.replica)
            return
        member = self._members.get(told.replica)
        if member is None or member.told.actor != told.actor:
            member = self._joined(told)
        member.told, member.heard = told, time.monotonic()
        for number, outcome in told.settled:
            if (wait := member.waits.pop(number, None)) is not None and not wait.done():
                wait.set_result(outcome)
        if told.metrics is not None:
            member.metrics = told.metrics
            member.scraped.set()
        self.heard()

    def _joined(self, told: Told) -> Member:
        self._forget(told.replica)
        known = next(iter(self._members.values()), None)
        if (
            known is not None
            and (mine := known.told.described.offered.limits.base) != told.described.offered.limits.base
        ):
            raise EngineFailed(f"replica '{told.replica}' serves another base than '{mine}'")
        member = self._members[told.replica] = Member(told, time.monotonic())
        log.info("replica '%s' has joined, with %d places", told.replica, told.described.places)
        self.came(member)
        return member

    async def orders(self, replica: str) -> Orders:
        """What a replica is to do now; nothing after a while."""
        member = self._members.get(replica)
        if member is None:  # it has not said yet how it is
            return Orders()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(HELD):
                await member.any.wait()
        member.any.clear()
        member.heard = time.monotonic()
        bring, leave, scrape = tuple(member.bring), tuple(member.leave), member.scrape
        member.bring.clear()
        member.leave.clear()
        member.scrape = False
        stays = {name: self.stays(name) for name in member.told.adapters}
        return Orders(
            bring=bring, leave=leave, metrics=scrape,
            kept=frozenset(name for name, (kept, _) in stays.items() if kept),
            pinned=frozenset(name for name, (_, pinned) in stays.items() if pinned),
        )  # fmt: skip

    # who is there

    @property
    def members(self) -> Sequence[Member]:
        """Those that were heard of lately."""
        for name, member in list(self._members.items()):
            if time.monotonic() - member.heard > self._patience:
                log.warning("replica '%s' has said nothing for %.0f s", name, self._patience)
                self._forget(name)
        return tuple(self._members.values())

    def died(self, actor: str) -> None:
        """Ray says that a replica's process is dead."""
        self._gone.add(actor)
        for name, member in list(self._members.items()):
            if member.told.actor == actor:
                log.warning("replica '%s' is dead", name)
                self._forget(name)

    def _forget(self, name: str) -> None:
        member = self._members.pop(name, None)
        if member is None:
            return
        self._loads += member.told.loads
        self._removes += member.told.removes
        for wait in member.waits.values():
            if not wait.done():
                wait.set_result(Outcome("unreached", f"replica '{name}' is gone"))
        member.scraped.set()
        member.any.set()
        self._left.set()
        self._left = asyncio.Event()

    async def nobody(self) -> None:
        """Until no replica is there."""
        while self.members:
            left = self._left
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._patience):
                    await left.wait()

    @property
    def described(self) -> Described | None:
        """What a replica that is there is."""
        return next((member.told.described for member in self._members.values()), None)

    @property
    def loads(self) -> int:
        return self._loads + sum(member.told.loads for member in self._members.values())

    @property
    def removes(self) -> int:
        return self._removes + sum(member.told.removes for member in self._members.values())

    # what replicas are told

    def bring(
        self, member: Member, adapter: Adapter, *, wait: float, urgent: bool = False, if_room: bool = False
    ) -> asyncio.Future[Outcome]:
        """Have a replica bring an adapter in: what comes of it."""
        number, outcome = next(self._numbers), asyncio.get_running_loop().create_future()
        member.waits[number] = outcome
        member.bring.append(Bring(number, adapter, wait, urgent, if_room))
        member.any.set()
        return outcome

    def let_go(self, name: str) -> list[asyncio.Future[Outcome]]:
        """Have all let go of a revision, as one may have it and not have said so yet: what comes of it in each."""
        waits = []
        for member in self.members:
            number, outcome = next(self._numbers), asyncio.get_running_loop().create_future()
            member.waits[number] = outcome
            member.leave.append(Leave(number, name))
            member.any.set()
            waits.append(outcome)
        return waits

    async def metrics(self) -> bytes:
        """What all engines count, with the label `replica`; of one that does not say it in time, what it said last."""
        members = self.members
        for member in members:
            member.scraped.clear()
            member.scrape = True
            member.any.set()
        waits = [asyncio.create_task(member.scraped.wait()) for member in members]
        if waits:
            _, late = await asyncio.wait(waits, timeout=SCRAPE)
            for wait in late:
                wait.cancel()
        return joined({member.name: member.metrics for member in members}, "replica")


def _ignored(_: Member) -> None:
    pass


def _nothing() -> None:
    pass


def _neither(_: str) -> tuple[bool, bool]:
    return False, False
