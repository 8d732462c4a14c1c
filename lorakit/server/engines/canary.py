"""One token of the base, now and then: an engine may run, call itself healthy, and answer nothing."""

from __future__ import annotations

import asyncio
import time

from lorakit.server.engines.engine import Answering
from lorakit.server.engines.vllm import tokens_counted

ENOUGH = 3  # wrong answers in a row


class Canary:
    """`interval` in seconds; 0 asks nothing."""

    def __init__(self, engine: Answering, interval: float) -> None:
        self._engine = engine
        self._interval = interval
        self._moved: float | None = None
        self._wrong: list[str] = []

    @property
    def stuck(self) -> float:
        """Seconds for which it has been out while the engine made no token for anybody; 0 when it is not out."""
        return time.monotonic() - self._moved if self._moved is not None else 0.0

    @property
    def wrong(self) -> str | None:
        """What was wrong with its answers, when several in a row were."""
        return self._wrong[-1] if len(self._wrong) >= ENOUGH else None

    async def run(self) -> None:
        """For ever."""
        while self._interval:
            await asyncio.sleep(self._interval)
            wrong = await self._ask()
            self._wrong = [*self._wrong, wrong] if wrong else []

    async def _ask(self) -> str | None:
        """What is wrong, if anything. A busy engine answers it late: what it counts meanwhile is a sign of life too."""
        self._moved = time.monotonic()
        asked = asyncio.create_task(self._engine.try_out(self._engine.limits.base))
        try:
            counted = None
            while not (await asyncio.wait({asked}, timeout=self._interval))[0]:
                before, counted = counted, tokens_counted(await self._engine.metrics())
                if counted != before:
                    self._moved = time.monotonic()
            return asked.result()
        finally:
            asked.cancel()
            self._moved = None
