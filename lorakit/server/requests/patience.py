"""A limit on the time of a request: its client is told, and the engine sees a client that went away."""

from __future__ import annotations

import asyncio
import json
from types import TracebackType
from typing import Any

from starlette.types import Message, Receive, Send

from lorakit.server.requests.answers import error_response
from lorakit.server.requests.exchange import Exchange

_ERROR = "TimeoutError"


class Patience:
    """Stands between an exchange and the engine for as long as the block lasts; 0 seconds are no limit.

    What answers is not cancelled: vLLM would go on in tasks of its own, on an adapter that nobody counts any more.
    """

    def __init__(self, seconds: float, exchange: Exchange) -> None:
        self.over = False
        self.path = exchange.path
        self._seconds = seconds
        self._exchange = exchange
        self._ended = asyncio.Event()
        self._watching: asyncio.Task[None] | None = None
        # a stream sends often, so what does nothing does not stand in its way
        self.receive: Receive = self._receive if seconds else exchange.receive
        self.send: Send = self._send if seconds else exchange.send

    async def __aenter__(self) -> Patience:
        if self._seconds:
            self._watching = asyncio.create_task(self._watch())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._watching is not None:
            if not self.over:
                self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)

    async def _receive(self) -> Message:
        waits: list[asyncio.Task[Any]] = [
            asyncio.create_task(self._exchange.receive()), asyncio.create_task(self._ended.wait())
        ]  # fmt: skip
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            message: Message = {"type": "http.disconnect"} if self.over else waits[0].result()
        finally:
            for wait in waits:
                wait.cancel()
        return message

    async def _send(self, message: Message) -> None:
        if not self.over:
            await self._exchange.send(message)

    async def _watch(self) -> None:
        await asyncio.sleep(self._seconds)
        exchange = self._exchange
        if exchange.ended:
            return
        self.over = True
        self._ended.set()
        said = f"the answer was not complete within {self._seconds:g} s, the limit of this server (--request-timeout)"
        if not exchange.started:
            await exchange.refuse(error_response(504, _ERROR, said))
        elif exchange.streams:
            error = {"error": {"message": said, "type": _ERROR, "param": None, "code": 504}}
            body = f"data: {json.dumps(error)}\n\n".encode()
            await exchange.send({"type": "http.response.body", "body": body, "more_body": False})
