"""What happened, kept for a while, for `/v1/events` and for the log."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

log = logging.getLogger("lorakit")


@dataclass(frozen=True, slots=True)
class Event:
    number: int
    kind: str
    at: float
    data: dict[str, Any]

    def as_sse(self) -> str:
        """One message of a text/event-stream."""
        body = {"type": self.kind, "created": self.at, **self.data}
        return f"id: {self.number}\nevent: {self.kind}\ndata: {json.dumps(body)}\n\n"


def log_to_stderr() -> None:
    """Show lorakit's own lines beside the engine's, unless the program that this runs in has set up logging for it."""
    if not log.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("lorakit: %(message)s"))
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        log.propagate = False


class Events:
    """The last thousand events, and a way to wait for more."""

    def __init__(self) -> None:
        self._kept: deque[Event] = deque(maxlen=1000)
        self._count = 0
        self._more = asyncio.Event()

    def tell(self, kind: str, message: str, **data: Any) -> None:
        """Record an event, and log its message in one line."""
        self._count += 1
        self._kept.append(Event(self._count, kind, time.time(), {"message": message, **data}))
        log.log(logging.WARNING if kind in ("refused", "stalled", "failed") else logging.INFO, "%s", message)
        self._more.set()
        self._more = asyncio.Event()

    async def since(self, number: int) -> AsyncIterator[Event | None]:
        """Events after `number`, for ever; None every 15 s in which nothing happens. A number that is still to come is
        of an engine that has ended: then it is all that are kept."""
        number = 0 if number > self._count else number
        while True:
            waiting = self._more
            for event in [event for event in self._kept if event.number > number]:
                number = event.number
                yield event
            try:
                async with asyncio.timeout(15):
                    await waiting.wait()
            except TimeoutError:
                yield None
