"""Which revisions are in the engine, and who is using them.

An adapter leaves the engine only after its last request, and before another takes its slot: on a CPU, vLLM puts a new
adapter into the first free slot, so more than `slots` at any moment would reach the one that must stay empty.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path

from lorakit.errors import LorakitError
from lorakit.server.engine import Engine, LoadFailed


class NoSlot(LorakitError):
    """Every slot of the engine stayed in use for as long as a request may wait."""


@dataclass(slots=True)
class Resident:
    """An adapter in the engine, under a name that the engine was never given before."""

    digest: str
    engine_name: str
    in_flight: int = 0
    draining: bool = False
    used: float = field(default_factory=time.monotonic)


class Residency:
    """The adapters in one engine. All methods run on the event loop; loads and removals are one at a time."""

    def __init__(self, engine: Engine, on_change: Callable[[], None] = lambda: None) -> None:
        self._engine = engine
        self._slots = engine.limits.slots
        self._residents: dict[str, Resident] = {}
        self._loads: dict[str, int] = {}
        self._turn = asyncio.Lock()
        self._changed = asyncio.Condition()
        self._on_change = on_change

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

    async def done(self, resident: Resident) -> None:
        """Count a request out."""
        resident.in_flight -= 1
        if resident.draining and not resident.in_flight:
            async with self._changed:
                self._changed.notify_all()

    async def ensure(
        self, name: str, digest: str, folder: Path, *, keep: Collection[str] = (), wait: float, prove: bool = False
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
            if not self._is_there(name):
                await self._free_slot(name, keep, wait)
                await self._load(name, digest, folder, prove)
        finally:
            self._turn.release()

    def _is_there(self, name: str) -> bool:
        resident = self._residents.get(name)
        return resident is not None and not resident.draining

    async def _load(self, name: str, digest: str, folder: Path, prove: bool) -> None:
        count = self._loads.get(name, 0)
        self._loads[name] = count + 1
        engine_name = name if count == 0 else f"{name}#{count + 1}"
        await self._engine.load(engine_name, folder)
        if prove and (wrong := await self._engine.try_out(engine_name)):
            await self._engine.remove(engine_name)
            raise LoadFailed(wrong)
        self._residents[name] = Resident(digest, engine_name)
        self._on_change()

    async def _free_slot(self, name: str, keep: Collection[str], wait: float) -> None:
        if name in self._residents:  # on its way out: let it go first
            await self._drain(name, wait)
        while len(self._residents) >= self._slots:
            await self._drain(self._victim(keep), wait)

    def _victim(self, keep: Collection[str]) -> str:
        """The least recently used: of the idle ones that nobody wants kept, else of the idle ones, else of all."""
        return min(
            self._residents,
            key=lambda name: (
                self._residents[name].in_flight > 0,
                name in keep,
                self._residents[name].used,
            ),
        )

    async def drain(self, name: str, wait: float) -> None:
        """Remove a revision after its last request; nothing when it is not there."""
        async with self._turn:
            if name in self._residents:
                await self._drain(name, wait)

    async def _drain(self, name: str, wait: float) -> None:
        resident = self._residents[name]
        resident.draining = True
        self._on_change()
        try:
            async with asyncio.timeout(wait), self._changed:
                await self._changed.wait_for(lambda: resident.in_flight == 0)
        except TimeoutError:
            resident.draining = False
            self._on_change()
            raise NoSlot(
                f"'{name}' was still answering after {wait:g} s, so its slot could not be given away"
            ) from None
        await self._engine.remove(resident.engine_name)
        del self._residents[name]
        self._on_change()
