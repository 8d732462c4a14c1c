"""Which revisions are in the engine, and who is using them.

Three tiers: the store; the engine's memory, from which a request may be answered; and its slots, of which each adapter
that answers holds one. An adapter leaves the memory only after its last request, and before another takes its place: on
a CPU, vLLM puts a new adapter into the first free slot, so more than `slots` at any moment would reach the one that
must stay empty. What falls out of vLLM's own memory is read again from its path inside a step, so it is never given
more than it holds.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from lorakit.errors import LorakitError
from lorakit.server.engines.engine import Engine, LoadFailed
from lorakit.server.following.turns import Load, Remove, Resident, Room, Step, Take, Want, has_slot, next_step, yielding


class NoSlot(LorakitError):
    """Every slot of the engine stayed in use for as long as a request may wait."""


def nobody(_: str) -> bool:
    return False


@dataclass(slots=True)
class Counted:
    """What a server says of its residency: how often an adapter was loaded, and taken out."""

    loads: int = 0
    removes: int = 0


class Residence(Protocol):
    """Which adapters are where: in one engine (`Residency`), or in several. What the methods do is said there."""

    @property
    def counted(self) -> Counted: ...

    @property
    def names(self) -> Sequence[str]: ...

    @property
    def residents(self) -> Sequence[Resident]: ...

    @property
    def places(self) -> int: ...

    @property
    def has_room(self) -> bool: ...

    @property
    def waiting(self) -> int: ...

    def find(self, name: str) -> Resident | None: ...

    def use(self, name: str) -> Resident | None: ...

    def done(self, resident: Resident) -> None: ...

    async def ensure(
        self, name: str, folder: Path, *, wait: float, urgent: bool = False, rank: int = 1,
        instead_of: Path | None = None,
    ) -> None: ...  # fmt: skip

    async def leave(self, name: str) -> None: ...

    async def close(self) -> None: ...


def nothing(_: Path) -> None:
    pass


class Residency:
    """The adapters in one engine. All methods run on the event loop; loads and removals are one at a time.

    Revisions of the same content, which have the same folder, are one adapter there.

    Args:
        kept: whether an adapter of this name should stay if others can go.
        pinned: whether one of this name never goes.
        fair_wait: seconds that others wait before a busy adapter takes no new requests until they had their turn.
        came, went: told of each folder that is in the engine from now on, and is no more.
    """

    def __init__(
        self, engine: Engine, *, kept: Callable[[str], bool] = nobody, pinned: Callable[[str], bool] = nobody,
        fair_wait: float = 1.0, came: Callable[[Path], None] = nothing, went: Callable[[Path], None] = nothing,
    ) -> None:  # fmt: skip
        self._engine = engine
        self._came, self._went = came, went
        self._kept, self._pinned = kept, pinned
        limits = engine.limits
        self._room = Room(limits.slots, max(limits.slots, limits.memory), fair_wait)
        self._residents: dict[Path, Resident] = {}
        self._names: dict[str, Resident] = {}
        self._wants: dict[Path, Want] = {}  # in the order in which they came
        self._given: dict[str, int] = {}  # how often each of the engine's names was used
        self._worker: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()  # set, and replaced, when there may be something to do
        self.counted = Counted()

    def find(self, name: str) -> Resident | None:
        return self._names.get(name)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._names)

    @property
    def residents(self) -> tuple[Resident, ...]:
        return tuple(self._residents.values())

    @property
    def places(self) -> int:
        """How many adapters the engine holds at all."""
        return self._room.memory

    @property
    def has_room(self) -> bool:
        """Whether one more could come in and answer without another having to wait, or to go that is to stay."""
        if self._wants or sum(resident.busy for resident in self.residents) >= self._room.slots:
            return False
        return len(self._residents) < self._room.memory or any(
            not resident.busy and not any(self._kept(name) or self._pinned(name) for name in resident.names)
            for resident in self.residents
        )

    @property
    def waiting(self) -> int:
        """Requests, and others, that wait for an adapter to come in."""
        return sum(want.waiters for want in self._wants.values())

    def use(self, name: str) -> Resident | None:
        """Count a request in, when the revision is there, not on its way out, and no other's turn comes first."""
        resident = self._names.get(name)
        if resident is None or not resident.open or not self._may_start(resident):
            return None
        resident.in_flight += 1
        resident.used = time.monotonic()
        return resident

    def done(self, resident: Resident) -> None:
        """Count a request out."""
        resident.in_flight -= 1
        if not resident.busy:
            self._wake()

    def _may_start(self, resident: Resident) -> bool:
        """Of what waits, each gets a slot first."""
        return has_slot(resident, self.residents, self._room, promised=len(self._wants))

    async def ensure(
        self, name: str, folder: Path, *, wait: float, urgent: bool = False, rank: int = 1,
        instead_of: Path | None = None,
    ) -> None:  # fmt: skip
        """Have a revision in the engine, with a first token that is a number, and ready to be used at once: `use`
        gives it, if nothing is awaited before.

        Args:
            urgent: a busy adapter makes place for it without having had its time; and it is enough that it is there.
            rank, instead_of: where there are several engines, they say which it is for; `instead_of` is the folder of
                what a name means now that is to mean this.

        Raises:
            LoadFailed: the engine refused it, or its first token was no number.
            NoSlot: no slot became free within `wait` seconds.
        """
        resident = self._residents.get(folder)
        may_use = resident is not None and resident.open and self._may_start(resident)
        if resident is not None and (may_use or (urgent and resident.proven)):
            self._name(resident, name)
            return
        if resident is None and (why := self._engine.no_place_for(name)):
            raise NoSlot(why)
        want = self._wants.get(folder)
        if want is None:
            want = self._wants[folder] = Want(folder, name, wait)
        want.names.add(name)
        want.urgent |= urgent
        want.waiters += 1
        self._wake()
        try:
            async with asyncio.timeout(wait):
                await want.settled.wait()
        except TimeoutError:
            raise NoSlot(_too_late(want, name, wait)) from None
        finally:
            self._waited(want)
        if want.error is not None:
            raise want.error

    def _waited(self, want: Want) -> None:
        """One fewer waits for it: it was settled, or is waited for no more."""
        want.waiters -= 1
        if want.promised_by is not None:  # what waited goes on now, and counts itself in before the next round
            asyncio.get_running_loop().call_soon(self._unpromise, want.promised_by)
        elif not want.waiters and self._wants.get(want.folder) is want:
            del self._wants[want.folder]
            self._mark()  # what made way for it need not any more
            self._wake()

    def _unpromise(self, resident: Resident) -> None:
        resident.promised -= 1
        if not resident.busy:
            self._wake()

    async def leave(self, name: str) -> None:
        """Remove a revision after its last request, however long that takes, unless it is wanted again before, or its
        content is another's too.

        Raises:
            LorakitError: the engine did not let go of it.
        """
        resident = self._names.pop(name, None)
        if resident is None:
            return
        resident.names.discard(name)
        if resident.names:
            return
        resident.leaving = True
        self._wake()
        while self._residents.get(resident.folder) is resident and resident.leaving:
            await self._changed.wait()
            if resident.removing and resident.stuck:
                raise LorakitError(f"the engine did not let go of '{name}': {resident.stuck}")

    async def close(self) -> None:
        """Do nothing more; who waits is told so."""
        if self._worker is not None:
            self._worker.cancel()
            await asyncio.gather(self._worker, return_exceptions=True)
        self.give_up("the engine is gone that it was to be loaded into")
        self._residents.clear()
        self._names.clear()
        self._changed.set()  # who waits for one to leave need not any more

    def give_up(self, reason: str) -> None:
        """Who waits for an adapter is told that it does not come, for now."""
        for want in list(self._wants.values()):
            self._fail(want, NoSlot(f"'{want.name}' did not come into the engine: {reason}"))

    # one step at a time

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())

    async def _work(self) -> None:
        """Until nothing is waited for, and nothing is to leave."""
        while True:
            changed, residents, wants = self._changed, self._judged(), list(self._wants.values())
            later = self._mark()
            step = next_step(residents, wants, self._room)
            if step is not None:
                await self._take(step)
            elif not wants and not any(resident.leaving and not resident.removing for resident in residents):
                return
            else:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(None if later == math.inf else later):
                        await changed.wait()

    def _mark(self) -> float:
        return yielding(self.residents, list(self._wants.values()), self._room, time.monotonic())

    def _judged(self) -> list[Resident]:
        """What is in the engine; when it is full, with what may have to make place."""
        full = len(self._residents) >= self._room.memory
        for resident in self._residents.values() if full and self._wants else ():
            resident.kept = any(self._kept(name) for name in resident.names)
            resident.pinned = any(self._pinned(name) for name in resident.names)
        return list(self._residents.values())

    async def _take(self, step: Step) -> None:
        match step:
            case Take(resident, want):
                self._settle(want, resident)
            case Load(want):
                try:
                    self._settle(want, await self._load(want))
                except Exception as error:  # whoever waits for it is told; the others go on
                    self._fail(want, error)
            case Remove(resident):
                try:
                    await self._remove(resident)
                except Exception as error:
                    resident.stuck = error
                    self._wake()
                    for want in list(self._wants.values()):
                        self._fail(want, error)

    def _settle(self, want: Want, resident: Resident) -> None:
        for name in want.names:
            self._name(resident, name)
        resident.promised += want.waiters
        resident.used = time.monotonic()
        want.promised_by = resident
        self._wants.pop(want.folder, None)
        want.settled.set()

    def _fail(self, want: Want, error: Exception) -> None:
        want.error = error
        self._wants.pop(want.folder, None)
        want.settled.set()

    def _name(self, resident: Resident, name: str) -> None:
        resident.names.add(name)
        self._names[name] = resident
        if resident.leaving:  # it is wanted again
            resident.leaving = False
            self._wake()

    async def _load(self, want: Want) -> Resident:
        want.begun = True
        count = self._given.get(want.name, 0)
        self._given[want.name] = count + 1
        engine_name = want.name if count == 0 else f"{want.name}#{count + 1}"
        began = time.monotonic()
        await self._engine.load(engine_name, want.folder)
        resident = self._residents[want.folder] = Resident(
            want.name, engine_name, want.folder, self._engine, entering=True
        )
        try:
            wrong = await self._wrong(resident, want.wait)
        except BaseException:
            with contextlib.suppress(Exception):
                await self._remove(resident)
            raise
        if wrong is not None:
            await self._remove(resident)
            raise LoadFailed(wrong)
        resident.entering = False
        resident.seconds = time.monotonic() - began
        self.counted.loads += 1
        self._came(want.folder)
        return resident

    async def _wrong(self, resident: Resident, wait: float) -> str | None:
        """What is wrong with its first token, if anything is."""
        try:
            async with asyncio.timeout(wait):
                return await self._engine.try_out(resident.engine_name)
        except TimeoutError:
            raise NoSlot(_too_busy(resident.name, wait)) from None

    async def _remove(self, resident: Resident) -> None:
        resident.removing = True
        await self._engine.remove(resident.engine_name)
        del self._residents[resident.folder]
        for name in resident.names:
            if self._names.get(name) is resident:
                del self._names[name]
        self.counted.removes += 1
        self._went(resident.folder)
        self._wake()


def _too_late(want: Want, name: str, wait: float) -> str:
    return _too_busy(name, wait) if want.begun else f"no slot of the engine became free for '{name}' within {wait:g} s"


def _too_busy(name: str, wait: float) -> str:
    return f"the engine was too busy to try '{name}' out within {wait:g} s"
