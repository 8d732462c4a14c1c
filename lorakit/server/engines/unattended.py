"""An engine that its clients ask themselves, past lorakit: what its requests are for, its metrics alone tell."""

from __future__ import annotations

import asyncio
from pathlib import Path

from lorakit.server.engines.remote import Http, RemoteEngine
from lorakit.server.engines.vllm import Offered, adapters_asked

LOOK = 0.5  # seconds between two looks at what is asked there
_QUIET = 3  # looks in a row without a request for an adapter: one may have come between two of them


class UnattendedEngine(RemoteEngine):
    """What it was given stays there when lorakit goes, and is known again when it comes back: its clients go on
    meanwhile."""

    def __init__(self, http: Http, offers: Offered, store: Path) -> None:
        super().__init__(http, offers, store)
        self._unclaimed: set[str] = set()  # left there by an earlier lorakit, and not yet wanted again

    async def asked(self) -> frozenset[str]:
        """The adapters that requests are in the engine for now."""
        return adapters_asked(await self.metrics())

    async def load(self, name: str, folder: Path) -> None:
        self._unclaimed.discard(name)
        while self._unclaimed and len(self._named) >= self.limits.slots and name not in self._named:
            await self.remove(self._unclaimed.pop())
        await super().load(name, folder)

    async def close(self) -> None:
        pass

    async def _take_up(self, ours: list[str]) -> None:
        self._named = set(ours)
        self._unclaimed = set(ours)

    async def clear_up(self) -> None:
        """Take out what was left there, and is not wanted any more."""
        while self._unclaimed:
            await self.remove(self._unclaimed.pop())

    async def _ended(self, name: str) -> None:
        """No new ones come: the name is gone. Those that are there finish first."""
        quiet = 0
        while quiet < _QUIET and not self.lost.is_set():
            quiet = 0 if name in await self.asked() else quiet + 1
            await asyncio.sleep(LOOK)
