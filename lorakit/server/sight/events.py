"""What happened, kept for a while, for `/v1/events` and for the log."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

from lorakit.server.sight.logs import log

STILL = 15.0  # seconds


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


class Events:
    """The last thousand events, and a way to wait for more; `listeners` are told each at once, on the event loop."""

    def __init__(self) -> None:
        self.listeners: list[Callable[[Event], None]] = []
        self._kept: deque[Event] = deque(maxlen=1000)
        self._count = 0
        self._more = asyncio.Event()

    def tell(self, kind: str, message: str, **data: Any) -> None:
        """Record an event, and log its message in one line."""
        self._count += 1
        event = Event(self._count, kind, time.time(), {"message": message, **data})
        self._kept.append(event)
        level = logging.WARNING if kind in ("refused", "stalled", "failed") else logging.INFO
        log.log(level, "%s", message, extra={"fields": {"event": kind, **data}})
        self._more.set()
        self._more = asyncio.Event()
        for listener in self.listeners:
            listener(event)

    @property
    def kept(self) -> tuple[Event, ...]:
        return tuple(self._kept)

    async def since(
        self, number: int, is_wanted: Callable[[Event], bool] = lambda event: True
    ) -> AsyncIterator[Event | None]:
        """Events after `number`, for ever; None every 15 s in which nothing happens that is wanted. A number that is
        still to come is of an engine that has ended: then it is all that are kept."""
        number = 0 if number > self._count else number
        clock = asyncio.get_running_loop().time
        still = clock() + STILL
        while True:
            waiting = self._more
            for event in [event for event in self._kept if event.number > number]:
                number = event.number
                if is_wanted(event):
                    yield event
                    still = clock() + STILL
            try:
                async with asyncio.timeout_at(still):
                    await waiting.wait()
            except TimeoutError:
                yield None
                still = clock() + STILL
