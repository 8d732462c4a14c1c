"""The engine's end of the supervisor: a line to say how it is, and to be given the public socket.

Engine: `here` (vLLM answers), `up` (the gateway stands), `ready` (all adapters named at start, and all aliases of
before, answer), `alive` every second (with `stuck`: seconds since a canary went out in vain), `failed` (with the
reason). Supervisor: `begin`, `listen` (with the socket, and how engines before it ended), `hold` and `resume` (another
server takes over), `leave` (finish what comes over connections that are open, and end), `stop` (finish what is in
flight, and end). The line's end means that the supervisor is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import time
from collections.abc import Awaitable, Iterator
from typing import TYPE_CHECKING, Any

import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lorakit.errors import EngineFailed
from lorakit.server.certificate import Certificate
from lorakit.server.engines.canary import Canary
from lorakit.server.requests.answers import unavailable
from lorakit.server.settings import Settings
from lorakit.server.supervision.line import Line, Word

if TYPE_CHECKING:
    from lorakit.server.gateway import Gateway

CONTROL_FD = "LORAKIT_CONTROL_FD"
HEARTBEAT = 1.0  # seconds
LEAVING = 3600.0  # seconds that requests may take to end when another server has taken over


class QuietServer(uvicorn.Server):
    """A uvicorn server that leaves signals to whoever had them before."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def public_server(app: ASGIApp, drain: float, certificate: Certificate | None = None) -> QuietServer:
    """Serve `app` over a socket that is there, without a lifespan of its own; over https with a certificate."""
    config = uvicorn.Config(
        app,
        ssl_certfile=(certificate and certificate.file) or None,
        ssl_keyfile=(certificate and certificate.key) or None,
        interface="asgi3",
        lifespan="off",
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=max(1, round(drain)),
        timeout_keep_alive=30,
    )
    return QuietServer(config)


def supervised(settings: Settings) -> Supervised | None:
    """The line to the supervisor, when a supervisor started this process."""
    if CONTROL_FD not in os.environ:
        return None
    control = int(os.environ[CONTROL_FD])
    os.set_inheritable(control, False)
    return Supervised(Line(socket.socket(fileno=control)), settings)


class Public:
    """An app that counts its requests; that asks each client to connect anew once it is `leaving`; and that says 503
    while it is `stuck`, as whoever asks then would wait in vain."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self.leaving = self.stuck = False
        self.in_flight = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.stuck and scope["type"] == "http":
            await unavailable("the engine does not answer")(scope, receive, send)
            return
        counted = scope["type"] == "http" and scope["path"] != "/v1/events"  # that one never ends
        self.in_flight += counted

        def last(message: Message) -> Awaitable[None]:
            if self.leaving and message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", []), (b"connection", b"close")]}
            return send(message)

        try:
            await self._app(scope, receive, last)
        finally:
            self.in_flight -= counted


class Supervised:
    """What runs inside the engine's API process for the supervisor."""

    def __init__(self, line: Line, settings: Settings) -> None:
        self._line = line
        self._settings = settings

    async def may_begin(self) -> None:
        """vLLM answers: wait until the gateway may start, which a server that is taken over has to allow.

        Raises:
            EngineFailed: the supervisor is gone.
        """
        with contextlib.suppress(OSError):
            await self._line.say("here")
        word = await self._line.hear()
        if word is None or word.say != "begin":
            raise EngineFailed("the supervisor does not want this engine any more")

    async def run(self, app: ASGIApp, gateway: Gateway) -> None:
        """Take the public socket over, serve on it, and end with the supervisor or when it says so."""
        public = Public(app)
        server = public_server(public, self._settings.drain, self._settings.certificate)
        serving: asyncio.Task[None] | None = None
        telling = asyncio.create_task(self._tell(gateway, public))
        try:
            while word := await self._line.hear():
                if word.say == "listen" and serving is None:
                    tell_of_ended(gateway, word)
                    serving = asyncio.create_task(server.serve(sockets=[socket.socket(fileno=word.handles[0])]))
                elif word.say == "hold":
                    await gateway.reconciler.hold()
                    await self._line.say("hold")
                elif word.say == "resume":
                    gateway.reconciler.resume()
                elif word.say == "leave":
                    await self._leave(server, public)
                    break
                elif word.say == "stop":
                    break
        finally:
            telling.cancel()
            server.should_exit = True
            if serving is not None:
                with contextlib.suppress(asyncio.CancelledError):
                    await serving
            os.kill(os.getpid(), signal.SIGTERM)  # vLLM ends its workers, then itself

    async def _leave(self, server: uvicorn.Server, public: Public) -> None:
        """Accept no more; requests over connections that are open are answered, the last one with a word to go."""
        public.leaving = True
        for listening in server.servers:
            listening.close()
        idle_until, ends = time.monotonic() + self._settings.drain, time.monotonic() + LEAVING
        while server.server_state.connections and time.monotonic() < ends:  # uvicorn has no event for it
            if not public.in_flight and time.monotonic() > idle_until:
                return
            await asyncio.sleep(0.05)

    async def _tell(self, gateway: Gateway, public: Public) -> None:
        """How it is, until it is not well any more."""
        known = gateway.reconciler
        canary = Canary(known.engine, self._settings.canary)
        asking = asyncio.create_task(canary.run())
        ready = False
        with contextlib.suppress(OSError):
            try:
                await self._line.say("up")
                while canary.wrong is None and await known.engine.alive():
                    public.stuck = canary.stuck > self._settings.silent_limit
                    await self._line.say("alive", stuck=canary.stuck)
                    if not ready and known.converged:
                        ready = True
                        await self._line.say("ready")
                    await asyncio.sleep(0.1 if not ready else HEARTBEAT)
                await self._line.say("failed", reason=canary.wrong or "its own health check says that it is dead")
            finally:
                asking.cancel()


def tell_of_ended(gateway: Any, word: Word) -> None:
    """Hand down to those who ask this engine for events what the ones before it said last."""
    for ended in word.data.get("ended", ()):
        gateway.reconciler.events.tell("engine", f"the engine before this one ended: {ended['how']}", **ended)
