"""Which revisions are in the engine, and who is using them.

An adapter leaves the engine only after its last request, and before another takes its slot: on a CPU, vLLM puts a new
adapter into the first free slot, so more than `slots` at any moment would reach the one that must stay empty.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from lorakit.errors import LorakitError
from lorakit.server.engine import Engine, LoadFailed


class NoSlot(LorakitError):
    """Every slot of the engine stayed in use for as long as a request may wait."""


@dataclass(slots=True)
class Resident:
    """An adapter in the engine, under a name that the engine was never given before.

    `leaving`: it is not wanted any more. `waited_for`: another needs its slot. `entering`: it is not proven yet.
    `removing`: it may be half out already.
    """

    name: str
    engine_name: str
    in_flight: int = 0
    leaving: bool = False
    waited_for: bool = False
    entering: bool = False
    removing: bool = False
    used: float = field(default_factory=time.monotonic)

    @property
    def draining(self) -> bool:
        """Whether it takes no new requests."""
        return self.leaving or self.waited_for or self.entering or self.removing


class Residency:
    """The adapters in one engine. All methods run on the event loop; loads and removals are one at a time."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._slots = engine.limits.slots
        self._residents: dict[str, Resident] = {}
        self._loads: dict[str, int] = {}
        self._turn = asyncio.Lock()
        self._idle = asyncio.Event()  # set, and replaced, when an adapter has answered its last request

    def find(self, name: str) -> Resident | None:
        return self._residents.get(name)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._residents)

    def use(self, name: str) -> Resident | None:
        """Count a request in, when the revision is there and not on its way out."""
        resident = self._residents.get(name)
        if resident is None or resident.draining:
            return None
        resident.in_flight += 1
        resident.used = time.monotonic()
        return resident

    def done(self, resident: Resident) -> None:
        """Count a request out."""
        resident.in_flight -= 1
        if not resident.in_flight:
            self._idle.set()
            self._idle = asyncio.Event()

    async def ensure(
        self, name: str, folder: Path, *, keep: Collection[str] = (), wait: float, prove: bool = False
    ) -> None:
        """Have a revision in the engine; `keep` names those that should stay if others can go.

        Raises:
            LoadFailed: the engine refused it, or with `prove` its first token was no number.
            NoSlot: no slot became free within `wait` seconds.
        """
        if self._is_there(name):
            return
        try:
            async with asyncio.timeout(wait):
                await self._turn.acquire()
        except TimeoutError:
            raise NoSlot(f"no slot of the engine became free for '{name}' within {wait:g} s") from None
        try:
            await self._settle(name, folder, keep, wait, prove)
        finally:
            self._turn.release()

    async def _settle(self, name: str, folder: Path, keep: Collection[str], wait: float, prove: bool) -> None:
        resident = self._residents.get(name)
        if resident is not None and not (resident.entering or resident.removing):
            resident.leaving = False  # it is wanted again before it left
            return
        if resident is not None:
            await self._remove(name)
        while len(self._residents) >= self._slots:
            await self._remove(await self._drained(keep, wait))
        await self._load(name, folder, wait, prove)

    def _is_there(self, name: str) -> bool:
        resident = self._residents.get(name)
        return resident is not None and not resident.draining

    async def _wrong(self, name: str, engine_name: str, wait: float) -> str | None:
        """What is wrong with its first token, if anything is."""
        try:
            async with asyncio.timeout(wait):
                return await self._engine.try_out(engine_name)
        except TimeoutError:
            await self._remove(name)
            raise NoSlot(f"the engine was too busy to try '{name}' out within {wait:g} s") from None

    async def _load(self, name: str, folder: Path, wait: float, prove: bool) -> None:
        count = self._loads.get(name, 0)
        self._loads[name] = count + 1
        engine_name = name if count == 0 else f"{name}#{count + 1}"
        await self._engine.load(engine_name, folder)
        resident = self._residents[name] = Resident(name, engine_name, entering=True)
        if prove and (wrong := await self._wrong(name, engine_name, wait)):
            await self._remove(name)
            raise LoadFailed(wrong)
        resident.entering = False

    def _victim(self, names: Collection[str], keep: Collection[str]) -> Resident:
        """The least recently used: of the idle ones first those that leave anyway, then those that nobody wants kept;
        of the busy ones first those that don't, for these come to rest by themselves."""

        def order(resident: Resident) -> tuple[bool, bool, bool, float]:
            busy = resident.in_flight > 0
            return busy, resident.leaving == busy, resident.name in keep, resident.used

        return min((self._residents[name] for name in names), key=order)

    async def _drained(self, keep: Collection[str], wait: float) -> str:
        """One that answers nothing any more. New requests are kept from the one that is waited for, but another that
        comes to rest before it is as good."""
        chosen = self._victim(self._residents, keep)
        chosen.waited_for = True
        try:
            async with asyncio.timeout(wait):
                while not (idle := [name for name, resident in self._residents.items() if not resident.in_flight]):
                    await self._idle.wait()
        except TimeoutError:
            raise NoSlot(f"every adapter in the engine was still answering after {wait:g} s") from None
        finally:
            chosen.waited_for = False
        return self._victim(idle, keep).name

    async def leave(self, name: str) -> None:
        """Remove a revision after its last request, however long that takes, unless it is wanted again before."""
        resident = self._residents.get(name)
        if resident is None:
            return
        resident.leaving = True
        while resident.leaving and resident.in_flight:
            await self._idle.wait()
        async with self._turn:
            if self._residents.get(name) is resident and resident.leaving:
                await self._remove(name)

    async def _remove(self, name: str) -> None:
        resident = self._residents[name]
        resident.removing = True
        await self._engine.remove(resident.engine_name)
        del self._residents[name]
