"""Which adapters are in the replicas, as the gateway counts: it stands where `Residency` stands on one machine.

Each replica has a `Residency` of its own, which alone loads, removes, and makes whom wait. What is proven in one is
served from here on: a replica that has it not yet loads it when the first request for it comes there.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from lorakit.errors import LorakitError
from lorakit.server.engines.engine import LoadFailed
from lorakit.server.following.residency import Counted, NoSlot, nobody
from lorakit.server.following.turns import Resident
from lorakit.server.on_ray.engine import RayEngine
from lorakit.server.on_ray.messages import Adapter, Outcome
from lorakit.server.on_ray.roster import Member

YOUNG = 5.0  # seconds in which a replica that has an adapter may not have said so yet
GRACE = 2.0  # seconds that an order may take besides its own limit
LOOK = 1.0  # seconds between two looks for what is nowhere any more
LETTING_GO = 60.0  # seconds that replicas have to let go of what nobody asks any more


class Residence:
    """What the methods do is said in `Residency`. `fair_wait` holds in the replicas."""

    def __init__(
        self, engine: RayEngine, *, kept: Callable[[str], bool] = nobody, pinned: Callable[[str], bool] = nobody,
        fair_wait: float = 1.0,
    ) -> None:  # fmt: skip
        self._engine = engine
        self._roster = engine.roster
        self._kept = kept
        self._residents: dict[Path, Resident] = {}
        self._names: dict[str, Resident] = {}
        self._coming: dict[Path, tuple[Adapter, asyncio.Task[Outcome]]] = {}
        self._waiting = 0
        self._looked = 0.0
        self._idle = asyncio.Event()  # set, and replaced, when something is not busy any more
        self._roster.stays = lambda name: (kept(name), pinned(name))
        self._roster.came = self._came
        self._roster.heard = self._heard

    # what there is

    def find(self, name: str) -> Resident | None:
        return self._names.get(name)

    @property
    def names(self) -> Sequence[str]:
        return tuple(self._names)

    @property
    def residents(self) -> Sequence[Resident]:
        return tuple(self._residents.values())

    @property
    def places(self) -> int:
        return sum(member.told.described.places for member in self._roster.members)

    @property
    def has_room(self) -> bool:
        return not self._coming and any(member.told.has_room for member in self._roster.members)

    @property
    def waiting(self) -> int:
        return self._waiting + sum(member.told.waiting for member in self._roster.members)

    @property
    def counted(self) -> Counted:
        return Counted(self._roster.loads, self._roster.removes)

    # requests

    def use(self, name: str) -> Resident | None:
        resident = self._names.get(name)
        if resident is None or resident.leaving:
            return None
        resident.in_flight += 1
        resident.used = time.monotonic()
        return resident

    def done(self, resident: Resident) -> None:
        resident.in_flight -= 1
        resident.used = time.monotonic()
        if not resident.busy:
            self._wake()

    async def ensure(
        self, name: str, folder: Path, *, wait: float, urgent: bool = False, rank: int = 1,
        instead_of: Path | None = None,
    ) -> None:  # fmt: skip
        resident = self._residents.get(folder)
        if resident is not None and not resident.leaving:
            self._name(resident, name)
            return
        adapter, outcome = await self._brought(name, folder, wait, urgent=urgent, instead_of=instead_of)
        if outcome.kind == "refused":
            raise LoadFailed(outcome.words)
        if outcome.kind != "there":
            raise NoSlot(outcome.words)
        resident = self._residents.get(folder)
        if resident is None or resident.leaving:
            engine = self._engine.holding(adapter)
            resident = Resident(adapter.name, adapter.placeholder, folder, engine, seconds=outcome.seconds)
            self._residents[folder] = resident
        self._name(resident, name)

    async def _brought(
        self, name: str, folder: Path, wait: float, *, urgent: bool, instead_of: Path | None
    ) -> tuple[Adapter, Outcome]:
        """What came of it in the first replica that was told to bring it in; under the name of who asked first."""
        if folder not in self._coming:
            adapter = Adapter(name, folder, f"lorakit-{secrets.token_hex(16)}")
            coming = asyncio.create_task(self._bring(adapter, wait, urgent=urgent, instead_of=instead_of))
            self._coming[folder] = adapter, coming
            coming.add_done_callback(lambda _: self._coming.pop(folder, None))
        adapter, coming = self._coming[folder]
        self._waiting += 1
        try:
            async with asyncio.timeout(wait + GRACE):
                return adapter, await asyncio.shield(coming)
        except TimeoutError:
            return adapter, Outcome("no slot", f"no replica had '{name}' in its engine within {wait:g} s")
        finally:
            self._waiting -= 1

    async def _bring(self, adapter: Adapter, wait: float, *, urgent: bool, instead_of: Path | None) -> Outcome:
        members = self._roster.members
        chosen = _chosen(members, self._residents[instead_of].names if instead_of in self._residents else ())
        if not chosen:
            return Outcome("no slot", f"no engine answers, so '{adapter.name}' was not loaded")
        waits = {self._roster.bring(member, adapter, wait=wait, urgent=urgent) for member in chosen}
        outcome = Outcome("no slot", f"no replica had '{adapter.name}' in its engine")
        while waits:
            settled, waits = await asyncio.wait(waits, timeout=wait + GRACE, return_when=asyncio.FIRST_COMPLETED)
            if not settled:  # the order, or what came of it, was lost on its way
                break
            for one in settled:
                outcome = one.result()
                if outcome.kind == "there":
                    return outcome
        return outcome

    def _name(self, resident: Resident, name: str) -> None:
        resident.names.add(name)
        resident.used = time.monotonic()
        self._names[name] = resident

    # leaving

    async def leave(self, name: str) -> None:
        resident = self._names.pop(name, None)
        if resident is None:
            return
        resident.names.discard(name)
        if resident.names:
            return
        resident.leaving = True
        while resident.busy:
            await self._idle.wait()
        if waits := self._roster.let_go(resident.name):
            settled, late = await asyncio.wait(waits, timeout=LETTING_GO)
            kept = [one.result().words for one in settled if one.result().words and one.result().kind == "no slot"]
            if late or kept:
                why = f"{len(late)} did not within {LETTING_GO:g} s" if late else kept[0]
                raise LorakitError(f"the replicas did not let go of '{name}': {why}")
        if self._residents.get(resident.folder) is resident:
            del self._residents[resident.folder]

    async def close(self) -> None:
        tasks = [task for _, task in self._coming.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _wake(self) -> None:
        self._idle.set()
        self._looked = 0.0
        self._idle = asyncio.Event()

    # replicas

    def _came(self, member: Member) -> None:
        """What is served comes into a new one without a hand: what names mean first, then what was asked for last."""
        order = sorted(self.residents, key=lambda one: (not any(map(self._kept, one.names)), -one.used))
        for resident in [one for one in order if not one.leaving][: member.told.described.places]:
            adapter = Adapter(resident.name, resident.folder, resident.engine_name)
            self._roster.bring(member, adapter, wait=LETTING_GO, if_room=True)

    def _heard(self) -> None:
        """What made place for others everywhere is in the store alone."""
        if time.monotonic() - self._looked < LOOK:
            return
        self._looked = time.monotonic()
        inside = {name for member in self._roster.members for name in member.told.adapters}
        for resident in self.residents:
            is_young = time.monotonic() - resident.used < YOUNG
            if not (resident.busy or resident.leaving or is_young or resident.name in inside):
                del self._residents[resident.folder]
                for name in resident.names:
                    self._names.pop(name, None)


def _chosen(members: Sequence[Member], before: Iterable[str]) -> list[Member]:
    """Which replicas bring an adapter in: those that have what a name meant before, else the one with the fewest. One
    that may be dead is asked only where there is no other."""
    names, well = set(before), [member for member in members if not member.is_silent] or members
    if following := [member for member in well if names & member.told.adapters]:
        return following
    return sorted(well, key=lambda one: (not one.told.has_room, len(one.told.adapters), one.told.in_flight))[:1]
