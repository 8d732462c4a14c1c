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
from collections.abc import Awaitable, Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lorakit.errors import EngineFailed
from lorakit.server.certificate import Certificate
from lorakit.server.engines.canary import Canary
from lorakit.server.engines.engine import Answering
from lorakit.server.requests.answers import unavailable
from lorakit.server.settings import Settings
from lorakit.server.supervision.line import Line, Word

if TYPE_CHECKING:
    from lorakit.server.gateway import Gateway

CONTROL_FD = "LORAKIT_CONTROL_FD"
HEARTBEAT = 1.0  # seconds
MOMENT = 0.1  # seconds in which what a client sends at once has come
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


class Asked(Protocol):
    """What clients, or a gateway elsewhere, ask; it is told whether they would wait in vain."""

    stuck: bool


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

    async def run(self, app: ASGIApp, gateway: Gateway, *, elsewhere: bool = False) -> None:
        """Take the public socket over, serve on it, and end with the supervisor or when it says so. `elsewhere`: its
        engines are other processes, and that they answer is not told here."""
        public = Public(app)
        server = public_server(public, self._settings.drain, self._settings.certificate)
        serving: asyncio.Task[None] | None = None
        engine = None if elsewhere else gateway.reconciler.engine
        telling = asyncio.create_task(self._tell(engine, public, lambda: gateway.reconciler.converged))
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
                    await self._accept_no_more(server, public)
                    break
        finally:
            telling.cancel()
            server.should_exit = True
            if serving is not None:
                with contextlib.suppress(asyncio.CancelledError):
                    await serving
            os.kill(os.getpid(), signal.SIGTERM)  # vLLM ends its workers, then itself

    async def run_alone(self, engine: Answering, asked: Asked) -> None:
        """Of an engine that is asked by a gateway elsewhere: tell how it is, and end with the supervisor or when it
        says so."""
        telling = asyncio.create_task(self._tell(engine, asked, lambda: True))
        try:
            while (word := await self._line.hear()) and word.say != "stop":
                pass
        finally:
            telling.cancel()
            os.kill(os.getpid(), signal.SIGTERM)

    async def _leave(self, server: uvicorn.Server, public: Public) -> None:
        """Accept no more; requests over connections that are open are answered, the last one with a word to go."""
        await self._accept_no_more(server, public)
        idle_until, ends = time.monotonic() + self._settings.drain, time.monotonic() + LEAVING
        while server.server_state.connections and time.monotonic() < ends:  # uvicorn has no event for it
            if not public.in_flight and time.monotonic() > idle_until:
                return
            await asyncio.sleep(0.05)

    async def _accept_no_more(self, server: uvicorn.Server, public: Public) -> None:
        """A request is answered whose connection was accepted a moment ago: uvicorn would reset it."""
        public.leaving = True
        if server.started:
            for listening in server.servers:
                listening.close()
            await asyncio.sleep(MOMENT)

    async def _tell(self, engine: Answering | None, asked: Asked, converged: Callable[[], bool]) -> None:
        """How it is, until it is not well any more; without an engine, that this process is."""
        canary = Canary(engine, self._settings.canary) if engine is not None else None
        asking = asyncio.create_task(canary.run()) if canary is not None else None
        ready = False
        with contextlib.suppress(OSError):
            try:
                await self._line.say("up")
                while (canary is None or canary.wrong is None) and (engine is None or await engine.alive()):
                    stuck = canary.stuck if canary is not None else 0.0
                    asked.stuck = stuck > self._settings.silent_limit
                    await self._line.say("alive", stuck=stuck)
                    if not ready and converged():
                        ready = True
                        await self._line.say("ready")
                    await asyncio.sleep(0.1 if not ready else HEARTBEAT)
                wrong = canary.wrong if canary is not None else None
                await self._line.say("failed", reason=wrong or "its own health check says that it is dead")
            finally:
                if asking is not None:
                    asking.cancel()


def tell_of_ended(gateway: Any, word: Word) -> None:
    """Hand down to those who ask this engine for events what the ones before it said last."""
    for ended in word.data.get("ended", ()):
        gateway.reconciler.events.tell("engine", f"the engine before this one ended: {ended['how']}", **ended)
