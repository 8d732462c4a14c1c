"""Beside an engine whose clients ask it themselves: its adapters are kept in step, and nothing leaves under a request.

Such clients name what the engine knows, a revision under a name that was never given before; which one an alias means
at the moment is said in a file.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lorakit.errors import LorakitError
from lorakit.server.engines.engine import LoadFailed
from lorakit.server.engines.unattended import LOOK, UnattendedEngine
from lorakit.server.file_work import file_work
from lorakit.server.following.residency import NoSlot
from lorakit.server.following.served import Served
from lorakit.server.following.turns import Resident
from lorakit.server.views import aliases_of
from lorakit.store.catalog import Revision


class Syncing:
    """Counts in what reaches the engine past lorakit, as far as its metrics tell, and what may: a revision that was
    asked for, or that a name meant, less than `linger` seconds ago does not leave."""

    def __init__(self, known: Served, engine: UnattendedEngine, *, linger: float, names: Path | None) -> None:
        self._known = known
        self._engine = engine
        self._linger = linger
        self._names = names
        self._wanted: dict[Resident, float] = {}  # when each was asked for, or meant, last
        self._held: set[Resident] = set()
        self._told: dict[str, Any] | None = None
        self._trouble = ""

    async def run(self) -> None:
        """For ever; what was held is let go of at the end."""
        try:
            while True:
                try:
                    await self._look()
                    self._trouble = ""
                except (LorakitError, OSError) as error:
                    self._tell_once(str(error))
                await asyncio.sleep(LOOK)
        finally:
            for resident in self._held:
                self._known.residency.done(resident)

    async def _look(self) -> None:
        if not await self._engine.alive():
            return
        asked = await self._engine.asked()
        meant = list(self._meant())
        self._hold(asked, self._worth(meant))
        await self._bring_in(revision for _, revision in meant)
        if self._known.converged:
            await self._engine.clear_up()
        await self._say_names()

    def _hold(self, asked: frozenset[str], worth: Mapping[str, int]) -> None:
        now, residency = time.monotonic(), self._known.residency
        there = residency.residents
        self._wanted = {resident: when for resident, when in self._wanted.items() if resident in there}
        self._held &= set(there)
        in_flight = {resident for resident in there if resident.engine_name in asked}
        meant = {resident: worth[name] for resident in there for name in resident.names if name in worth}
        self._wanted |= dict.fromkeys((*in_flight, *meant), now)
        lingering = {resident for resident, when in self._wanted.items() if now - when < self._linger} - meant.keys()
        keeps = in_flight | lingering | meant.keys()
        if residency.waiting and not lingering:  # no time will free a place: what is least worth makes it
            least = min(meant.values(), default=0)
            keeps -= {resident for resident, value in meant.items() if value == least} - in_flight
        for resident in there:
            if resident not in keeps:
                self._let_go(resident)
            elif resident not in self._held and residency.use(resident.name) is not None:
                self._held.add(resident)

    def _let_go(self, resident: Resident) -> None:
        if resident in self._held:
            self._held.discard(resident)
            self._known.residency.done(resident)

    async def _bring_in(self, meant: Iterable[Revision]) -> None:
        """What aliases mean, as far as there is place: nobody's request does."""
        for revision in meant:
            if self._known.residency.find(revision.name) is None and self._known.residency.has_room:
                with contextlib.suppress(LoadFailed, NoSlot):
                    await self._known.bring_in(revision)

    def _worth(self, meant: Iterable[tuple[str, Revision]]) -> dict[str, int]:
        """Of each revision that a name means: 2 for what a run or a mix means by itself, 1 for an alias that a person
        set, 0 for the others."""
        runs, worth = self._known.runs, dict[str, int]()
        for name, revision in meant:
            run, _, alias = name.partition("@")
            value = 2 if not alias else 1 if run in runs and alias in runs[run].aliases else 0
            worth[revision.name] = max(value, worth.get(revision.name, 0))
        return worth

    def _meant(self) -> Iterator[tuple[str, Revision]]:
        """Each name with what it means, those of runs and mixes before those of aliases."""
        runs = [(name, aliases_of(self._known, run)) for name, run in sorted(self._known.runs.items())]
        yield from ((name, aliases[""]) for name, aliases in runs if "" in aliases)
        yield from self._known.mixes.targets().items()
        for name, aliases in runs:
            yield from ((f"{name}@{alias}", revision) for alias, revision in aliases.items() if alias)

    async def _say_names(self) -> None:
        """Into the file: what is to be asked for in the place of each name, of those that the engine has."""
        if self._names is None:
            return
        residents = {name: self._known.residency.find(revision.name) for name, revision in self._meant()}
        names = {name: found.engine_name for name, found in residents.items() if found is not None and found.proven}
        told = {"base": self._known.engine.limits.base, "names": names}
        if told != self._told:
            await file_work(_write, self._names, json.dumps(told, indent=2) + "\n")
            self._told = told

    def _tell_once(self, trouble: str) -> None:
        if trouble != self._trouble:
            self._known.events.tell("failed", f"will be tried again: {trouble}")
        self._trouble = trouble


def _write(file: Path, text: str) -> None:
    """Whole, or not at all."""
    beside = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with beside.open("w") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        beside.replace(file)
    finally:
        beside.unlink(missing_ok=True)
