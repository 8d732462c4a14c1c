"""The engine's end of the supervisor: the inherited public socket, and a line to say and hear when to use it.

Lines of JSON over a socket pair. Engine: `up` (it would answer), then `alive` every second. Supervisor: `listen` (it
has stopped accepting), `stop` (finish what is in flight, and end). Its end closing means that the supervisor is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import uvicorn
from starlette.types import ASGIApp

if TYPE_CHECKING:
    from lorakit.server.gateway import Gateway

LISTEN_FD = "LORAKIT_LISTEN_FD"
CONTROL_FD = "LORAKIT_CONTROL_FD"
HEARTBEAT = 1.0  # seconds


class QuietServer(uvicorn.Server):
    """A uvicorn server that leaves signals to whoever had them before."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def public_server(app: ASGIApp, drain: float) -> QuietServer:
    """Serve `app` over a socket that is there, without a lifespan of its own."""
    config = uvicorn.Config(
        app,
        interface="asgi3",
        lifespan="off",
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=max(1, round(drain)),
        timeout_keep_alive=30,
    )
    return QuietServer(config)


def supervised(drain: float) -> Supervised | None:
    """The line to the supervisor, when a supervisor started this process."""
    if CONTROL_FD not in os.environ or LISTEN_FD not in os.environ:
        return None
    control, public = int(os.environ[CONTROL_FD]), int(os.environ[LISTEN_FD])
    for handle in (control, public):
        os.set_inheritable(handle, False)  # no worker of the engine's keeps the address
    return Supervised(socket.socket(fileno=control), socket.socket(fileno=public), drain)


class Supervised:
    """What runs inside the engine's API process for the supervisor."""

    def __init__(self, control: socket.socket, public: socket.socket, drain: float) -> None:
        self._control = control
        self._public = public
        self._drain = drain

    async def run(self, app: ASGIApp, gateway: Gateway) -> None:
        """Take the public socket over, serve on it, and end with the supervisor or when it says so."""
        self._control.setblocking(False)
        reader, writer = await asyncio.open_connection(sock=self._control)
        await say(writer, "up")
        server = public_server(app, self._drain)
        serving: asyncio.Task[None] | None = None
        beating = asyncio.create_task(self._beat(writer, gateway))
        try:
            async for word in words(reader):
                if word["say"] == "listen" and serving is None:
                    serving = asyncio.create_task(server.serve(sockets=[self._public]))
                elif word["say"] == "stop":
                    break
        finally:
            beating.cancel()
            server.should_exit = True
            if serving is not None:
                with contextlib.suppress(asyncio.CancelledError):
                    await serving
            os.kill(os.getpid(), signal.SIGTERM)  # vLLM ends its workers, then itself

    async def _beat(self, writer: asyncio.StreamWriter, gateway: Gateway) -> None:
        with contextlib.suppress(OSError):
            while await gateway.reconciler.engine.alive():
                await say(writer, "alive")
                await asyncio.sleep(HEARTBEAT)


async def say(writer: asyncio.StreamWriter, word: str, **more: Any) -> None:
    writer.write(json.dumps({"say": word, **more}).encode() + b"\n")
    await writer.drain()


async def words(reader: asyncio.StreamReader) -> Any:
    """What the other end says, until it is gone."""
    while True:
        try:
            line = await reader.readline()
        except OSError:
            return
        if not line:
            return
        yield json.loads(line)
