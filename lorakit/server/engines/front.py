"""The gateway in front of an engine that somebody else started: an app of its own, and the server that runs it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Callable, Coroutine
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from lorakit.errors import LorakitError
from lorakit.server.engines.remote import LOOK, Http, RemoteEngine
from lorakit.server.gateway import Gateway
from lorakit.server.requests.answers import unavailable
from lorakit.server.settings import Settings
from lorakit.server.sight.logs import log, log_to_stderr
from lorakit.server.supervision.listener import public_server

KEY = "LORAKIT_ENGINE_KEY"


Beside = Callable[[Gateway, RemoteEngine], Coroutine[Any, Any, None]]


class Front:
    """Says 503 while the engine does not answer, and begins anew when it has been started anew: what was loaded there
    is gone then, and comes back from the store. `beside` runs for as long as a gateway does."""

    def __init__(
        self, http: Http, settings: Settings, *, base_path: str, max_rank: int,
        kind: type[RemoteEngine] = RemoteEngine, beside: Beside | None = None,
    ) -> None:  # fmt: skip
        self._http = http
        self._settings = settings
        self._base_path = base_path
        self._max_rank = max_rank
        self._kind = kind
        self._beside = beside
        self._gateway: Gateway | None = None
        self._reason = "the gateway is starting"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._gateway is not None:
            await self._gateway(scope, receive, send)
        elif scope["type"] == "http":
            await unavailable(self._reason)(scope, receive, send)

    async def run(self) -> None:
        """For ever.

        Raises:
            LorakitError: the engine can't be used, which it could not from the first.
        """
        served = False
        while True:
            await self._answers()
            gateway = Gateway(no_sockets, self._settings)
            try:
                engine = await self._connected()
                await gateway.begin(engine, self._settings)
            except LorakitError as error:
                await gateway.stop()
                if not served:
                    raise
                self._say(f"the engine can't be used: {error}")
                await asyncio.sleep(LOOK)
                continue
            served = True
            await self._serve(gateway, engine)

    async def _connected(self) -> RemoteEngine:
        return await self._kind.connect(
            self._http, self._settings.store_home, base_path=self._base_path, slots=self._settings.max_loras,
            max_rank=self._max_rank,
        )  # fmt: skip

    async def _answers(self) -> None:
        """Until there is somebody."""
        self._http.failures = 0
        while (await self._http.call("GET", "/health", None))[0] != 200:
            self._say(f"the engine at {self._http.url} does not answer")
            await asyncio.sleep(LOOK)

    async def _serve(self, gateway: Gateway, engine: RemoteEngine) -> None:
        """Until the engine was started anew."""
        tasks: list[asyncio.Task[None]] = [asyncio.create_task(engine.watch(self._settings.silent_limit))]
        if self._beside is not None:
            tasks.append(asyncio.create_task(self._beside(gateway, engine)))
        self._gateway = gateway
        try:
            await engine.lost.wait()
            self._say("the engine was started anew: what was served is loaded again")
        finally:
            self._gateway = None
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await gateway.stop()
            with contextlib.suppress(LorakitError):
                await engine.close()

    def _say(self, reason: str) -> None:
        if reason != self._reason:
            log.warning("%s", reason)
        self._reason = reason


async def no_sockets(scope: Scope, receive: Receive, send: Send) -> None:
    """What the gateway hands on past its engine: WebSockets, which have no way through here."""
    await receive()
    await send({"type": "websocket.close", "code": 1011, "reason": "lorakit passes no WebSocket on over HTTP"})


async def serve_in_front(
    url: str, public: socket.socket, settings: Settings, *, base_path: str, max_rank: int,
    kind: type[RemoteEngine] = RemoteEngine, beside: Beside | None = None,
) -> int:  # fmt: skip
    """Serve the engine at `url` on a socket until SIGINT or SIGTERM: the exit code.

    Raises:
        LorakitError: the engine can't be used.
    """
    http = Http(url, os.environ.get(KEY, ""))
    front = Front(http, settings, base_path=base_path, max_rank=max_rank, kind=kind, beside=beside)
    try:
        return await serve_beside(front, front.run(), public, settings)
    finally:
        await http.close()


async def serve_beside(app: ASGIApp, run: Coroutine[Any, Any, None], public: socket.socket, settings: Settings) -> int:
    """Serve an app on a socket, beside what it needs to run, until SIGINT or SIGTERM: the exit code.

    Raises:
        LorakitError: what it needs to run ended with it.
    """
    log_to_stderr(settings.log_format)
    server = public_server(app, settings.drain, settings.certificate)
    codes: list[int] = []

    def stop(number: int) -> None:
        server.force_exit = bool(codes)  # a second one waits for nothing
        server.should_exit = True
        codes.append(130 if number == signal.SIGINT else 0)

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop, number)
    running = asyncio.create_task(run)
    serving = asyncio.create_task(server.serve(sockets=[public]))
    try:
        await asyncio.wait({running, serving}, return_when=asyncio.FIRST_COMPLETED)
        server.should_exit = True
        await serving
        if running.done():
            running.result()
    finally:
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError, LorakitError):
            await running
    return codes[-1] if codes else 0
