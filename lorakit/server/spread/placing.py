"""Which of several engines has an adapter, which gets it next, and which answers a request for it.

Each engine has its own `Residency`, which loads, removes and counts there; where a request goes is the router's choice.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorakit.errors import LorakitError
from lorakit.server.engines.engine import Engine
from lorakit.server.following.residency import Counted, NoSlot, Residency, nobody
from lorakit.server.following.turns import Resident
from lorakit.server.spread.fleet import Fleet
from lorakit.server.spread.routing import Asked, Nowhere
from lorakit.store.mixes import RUN as MIXES
from lorakit.store.names import split_model

COPY_WAIT = 10.0  # seconds that a copy nobody waits for may wait for its place


@dataclass(frozen=True, slots=True)
class Wanted:
    """A revision as it was asked for last."""

    asked: Asked
    folder: Path


@dataclass(slots=True, eq=False)
class Member:
    """An engine that is there. `gone` is set when it is not any more."""

    name: str
    engine: Engine
    residency: Residency
    gone: asyncio.Event = field(default_factory=asyncio.Event)


class Placing:
    """Stands where `Residency` stands, for a fleet: what the methods do is said there. A revision may be in several
    engines. All methods run on the event loop."""

    def __init__(
        self, fleet: Fleet, *, kept: Callable[[str], bool] = nobody, pinned: Callable[[str], bool] = nobody,
        fair_wait: float = 1.0,
    ) -> None:  # fmt: skip
        self._router = fleet.router
        self._kept, self._pinned, self._fair_wait = kept, pinned, fair_wait
        self._members: dict[str, Member] = {}
        self._wanted: dict[str, Wanted] = {}
        self._before: dict[str, dict[str, Wanted]] = {}  # what was kept in an engine that is gone
        self._ensured: tuple[str, Member] | None = None  # until something else happens
        self._left = Counted()
        self._aside: set[asyncio.Task[None]] = set()
        fleet.follow(self)

    # engines

    def came(self, name: str, engine: Engine) -> None:
        def loaded(folder: Path) -> None:
            self._router.loaded(name, folder.name)

        def removed(folder: Path) -> None:
            self._router.removed(name, folder.name)
            self._forget(folder)

        residency = Residency(
            engine, kept=self._kept, pinned=self._pinned, fair_wait=self._fair_wait, came=loaded, went=removed
        )
        member = self._members[name] = Member(name, engine, residency)
        if before := self._before.pop(name, None):
            self._begin(self._bring_back(member, before))

    async def went(self, name: str) -> None:
        member = self._members.pop(name)
        self._before[name] = {
            one: self._wanted[one] for one in member.residency.names if one in self._wanted and self._kept(one)
        }
        self._left.loads += member.residency.counted.loads
        self._left.removes += member.residency.counted.removes
        member.gone.set()
        await member.residency.close()

    def fell_ill(self, name: str) -> None:
        """It does not answer: who waits for an adapter there may have it elsewhere."""
        self._members[name].residency.give_up("it does not answer")

    async def _bring_back(self, member: Member, wanted: dict[str, Wanted]) -> None:
        """What names mean, and was in it before, is in it again, with nobody's hand."""
        for name, one in list(wanted.items())[: member.residency.places]:
            if self._kept(name):
                await self._copy(member, name, one)

    async def _copy(self, member: Member, name: str, wanted: Wanted) -> None:
        with contextlib.suppress(LorakitError):
            await self._ensure_in(member, name, wanted, wait=COPY_WAIT, urgent=False)

    def _begin(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(coroutine)
        self._aside.add(task)
        task.add_done_callback(self._aside.discard)

    # what is there

    @property
    def _residencies(self) -> Iterator[Residency]:
        return (member.residency for member in self._members.values())

    @property
    def counted(self) -> Counted:
        every = [self._left, *(residency.counted for residency in self._residencies)]
        return Counted(sum(one.loads for one in every), sum(one.removes for one in every))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for residency in self._residencies for name in residency.names))

    @property
    def residents(self) -> tuple[Resident, ...]:
        return tuple(resident for residency in self._residencies for resident in residency.residents)

    @property
    def places(self) -> int:
        return sum(residency.places for residency in self._residencies)

    @property
    def has_room(self) -> bool:
        return any(residency.has_room for residency in self._residencies)

    @property
    def waiting(self) -> int:
        return sum(residency.waiting for residency in self._residencies)

    def find(self, name: str) -> Resident | None:
        """Where there are several, the busiest that is proven."""
        found = [resident for residency in self._residencies if (resident := residency.find(name)) is not None]
        return max(found, default=None, key=lambda one: (one.proven, one.in_flight + one.promised, not one.draining))

    # requests

    def use(self, name: str) -> Resident | None:
        wanted = self._wanted.get(name)
        if wanted is None:
            return None
        ensured, self._ensured = self._ensured, None
        if ensured is not None and ensured[0] == name and not ensured[1].gone.is_set():
            member = ensured[1]
        else:
            choice = self._router.choose(wanted.asked)
            if isinstance(choice, Nowhere) or not choice.is_there:
                return None
            member = self._members[choice.engine]
            if choice.copy_to is not None:
                other = self._members[choice.copy_to]
                self._router.loading(other.name, wanted.asked.adapter)
                self._begin(self._copy(other, name, wanted))
        resident = member.residency.use(name)
        if resident is not None:
            self._router.begun(member.name, wanted.asked.adapter)
        return resident

    def done(self, resident: Resident) -> None:
        for member in self._members.values():
            if member.engine is resident.engine:
                self._router.ended(member.name, resident.folder.name)
                member.residency.done(resident)
                return

    async def ensure(
        self, name: str, folder: Path, *, wait: float, urgent: bool = False, rank: int = 1,
        instead_of: Path | None = None,
    ) -> None:  # fmt: skip
        run = split_model(name)[0]
        # the revisions of a run have the same homes, the mixes each its own
        wanted = self._wanted[name] = Wanted(Asked(folder.name, rank, folder.name if run == MIXES else run), folder)
        until = time.monotonic() + wait
        while True:
            members = self._places(wanted, instead_of.name if urgent and instead_of is not None else None)
            left = max(0.0, until - time.monotonic())
            for other in members[1:]:
                self._begin(self._copy(other, name, wanted))
            try:
                await self._ensure_in(members[0], name, wanted, wait=left, urgent=urgent)
            except NoSlot:
                if time.monotonic() >= until or (not members[0].gone.is_set() and await members[0].engine.alive()):
                    raise
                await asyncio.sleep(0.05)  # that engine is gone, and another may have place
                continue
            self._wanted[name] = wanted
            self._ensured = name, members[0]
            return

    def _places(self, wanted: Wanted, before: str | None) -> list[Member]:
        """Where it should be: one engine for a request; for a name that moves there, each that answers for it now.

        Raises:
            NoSlot: no engine that answers can have it.
        """
        if before is not None and (names := self._router.places(wanted.asked, before)):
            return [self._members[name] for name in names]
        choice = self._router.choose(wanted.asked)
        if isinstance(choice, Nowhere):
            raise NoSlot(choice.reason)
        return [self._members[choice.engine]]

    async def _ensure_in(self, member: Member, name: str, wanted: Wanted, *, wait: float, urgent: bool) -> None:
        """Raises LoadFailed, NoSlot."""
        residency, adapter = member.residency, wanted.asked.adapter
        if member.gone.is_set():
            raise NoSlot(f"the engine '{member.name}' is gone")
        if all(one.folder != wanted.folder for one in residency.residents):
            self._router.loading(member.name, adapter)
        try:
            await residency.ensure(name, wanted.folder, wait=wait, urgent=urgent)
        except NoSlot:
            raise
        except LorakitError as error:
            if not await member.engine.alive(now=True):  # nothing is known of the adapter by that
                raise NoSlot(f"the engine '{member.name}' ended while '{name}' was loaded: {error}") from None
            raise
        finally:
            if not member.gone.is_set() and all(one.folder != wanted.folder for one in residency.residents):
                self._router.removed(member.name, adapter)
                self._forget(wanted.folder)

    def _forget(self, folder: Path) -> None:
        """What is in no engine any more is asked for anew."""
        if all(one.folder != folder for one in self.residents):
            self._wanted = {name: wanted for name, wanted in self._wanted.items() if wanted.folder != folder}

    async def leave(self, name: str) -> None:
        self._wanted.pop(name, None)
        for before in self._before.values():
            before.pop(name, None)
        await asyncio.gather(*(self._leave(member, name) for member in list(self._members.values())))

    async def _leave(self, member: Member, name: str) -> None:
        try:
            await member.residency.leave(name)
        except LorakitError:
            if await member.engine.alive(now=True):
                raise  # of an engine that is dead, it goes with all the rest

    async def close(self) -> None:
        for task in self._aside:
            task.cancel()
        await asyncio.gather(*self._aside, return_exceptions=True)
        for residency in list(self._residencies):
            await residency.close()
