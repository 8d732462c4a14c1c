"""Requests to an ASGI app of the same process, whose answers come as they are made."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
from starlette.types import ASGIApp, Message, Scope


class Within(httpx.AsyncBaseTransport):
    """httpx' own transport for ASGI gives an answer when it is whole, and `/v1/events` never is."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Raises whatever the app does before it answers."""
        answer = _Answer(await request.aread())
        answer.begin(self._app, _scope_of(request))
        start = await answer.next()
        return httpx.Response(start["status"], headers=start["headers"], stream=answer)


class _Answer(httpx.AsyncByteStream):
    """What an app sends, until it has, or until nobody wants it any more."""

    def __init__(self, body: bytes) -> None:
        self._body: bytes | None = body
        self._sent: asyncio.Queue[Message | BaseException] = asyncio.Queue()
        self._left = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def begin(self, app: ASGIApp, scope: Scope) -> None:
        self._task = asyncio.create_task(self._run(app, scope))

    async def _run(self, app: ASGIApp, scope: Scope) -> None:
        try:
            await app(scope, self._receive, self._send)
            self._sent.put_nowait({"type": "http.response.body", "more_body": False})  # an app may end without one
        except Exception as error:  # it belongs to whoever asked
            self._sent.put_nowait(error)

    async def _receive(self) -> Message:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        if not self._left.is_set():
            self._sent.put_nowait(message)

    async def next(self) -> Message:
        try:
            message = await self._sent.get()
        except asyncio.CancelledError:
            await self.aclose()
            raise
        if isinstance(message, BaseException):
            raise message
        return message

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while True:
            message = await self.next()
            if body := message.get("body", b""):
                yield body
            if not message.get("more_body", False):
                return

    async def aclose(self) -> None:
        """The app sees a client that went away, and ends by itself."""
        self._left.set()


def _scope_of(request: httpx.Request) -> Scope:
    scope: dict[str, Any] = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},  # from 2.4 on, a client that left is an error in `send`
        "http_version": "1.1",
        "method": request.method,
        "headers": [(name.lower(), value) for name, value in request.headers.raw],
        "scheme": request.url.scheme,
        "path": request.url.path,
        "raw_path": request.url.raw_path.partition(b"?")[0],
        "query_string": request.url.query,
        "server": (request.url.host, 80),
        "client": ("127.0.0.1", 0),
        "root_path": "",
    }
    return scope
