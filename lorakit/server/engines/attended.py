"""What stands in a vLLM that lorakit started for a gateway elsewhere: it tells the supervisor how the engine is, and
the gateway too when the engine hangs, of which vLLM's own health check knows nothing.

--middleware lorakit.server.Attended
"""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from lorakit.server.engines.inside import InsideEngine
from lorakit.server.lifespan import once_started
from lorakit.server.requests.answers import unavailable
from lorakit.server.settings import from_environment
from lorakit.server.sight.logs import log_to_stderr
from lorakit.server.supervision.listener import supervised


class Attended:
    """`app` is vLLM's own; what is asked of it passes through."""

    def __init__(self, app: ASGIApp) -> None:
        self._inner = app
        self._running: asyncio.Task[None] | None = None
        self.stuck = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._inner(scope, receive, once_started(scope, send, self._start))
        elif self.stuck and scope["type"] == "http" and scope["path"] == "/health":
            await unavailable("the engine does not answer")(scope, receive, send)
        else:
            await self._inner(scope, receive, send)

    async def _start(self, app: Any) -> None:
        settings = from_environment()
        log_to_stderr(settings.log_format)
        engine = InsideEngine(self._inner, app)
        line = supervised(settings)
        if line is not None:
            await line.may_begin()
            self._running = asyncio.create_task(line.run_alone(engine, self))
