"""Changes of what is served: one at a time for each name, those of different names together, and none while held."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from weakref import WeakValueDictionary


class Changes:
    """A change never waits for an engine, so no other has to wait for long."""

    def __init__(self) -> None:
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._under_way = 0
        self._none_left = asyncio.Event()
        self._allowed = asyncio.Event()
        self._allowed.set()

    @property
    def held(self) -> bool:
        return not self._allowed.is_set()

    @asynccontextmanager
    async def of(self, name: str) -> AsyncIterator[None]:
        """Nothing else of this name changes meanwhile."""
        turn = self._turns.setdefault(name, asyncio.Lock())
        async with turn:
            while self.held:
                await self._allowed.wait()
            self._under_way += 1
            try:
                yield
            finally:
                self._under_way -= 1
                self._none_left.set()

    async def hold(self) -> None:
        """Let no change begin, and wait for those under way."""
        self._allowed.clear()
        while self._under_way:
            self._none_left.clear()
            await self._none_left.wait()

    def resume(self) -> None:
        self._allowed.set()
