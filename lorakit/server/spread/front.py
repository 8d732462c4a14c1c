"""The gateway in front of several engines, in a process of its own: `python -m lorakit.server.spread.front`.

The supervisor starts it, with the engines beside it, and lends it the public socket; for engines that somebody else
runs, `lorakit serve` is this process itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
from collections.abc import Mapping
from typing import Any

from starlette.types import Receive, Scope, Send

from lorakit.errors import LorakitError
from lorakit.server.engines.engine import Engine
from lorakit.server.engines.front import KEY, no_sockets, serve_beside
from lorakit.server.gateway import Gateway
from lorakit.server.requests.answers import unavailable
from lorakit.server.settings import Settings, from_environment
from lorakit.server.sight.events import Events
from lorakit.server.sight.logs import log, log_to_stderr
from lorakit.server.spread.fleet import Fleet
from lorakit.server.spread.joining import Address, Joining
from lorakit.server.spread.placing import Placing
from lorakit.server.spread.told import ENGINES
from lorakit.server.supervision.listener import Supervised, supervised


class Told:
    """Says in the events which engines come and go."""

    def __init__(self, events: Events) -> None:
        self._events = events

    def came(self, name: str, engine: Engine) -> None:
        limits = engine.limits
        said = f"engine '{name}' has joined: {limits.engine}, with {limits.slots} slots"
        self._events.tell("engine", said, replica=name)

    def fell_ill(self, name: str) -> None:
        self._events.tell("engine", f"engine '{name}' does not answer: the others are asked", replica=name)

    async def went(self, name: str) -> None:
        self._events.tell("engine", f"engine '{name}' is gone, and what it had is asked of the others", replica=name)


class SpreadFront:
    """Says 503 until the first engine has joined; from then on the gateway says what there is to say."""

    def __init__(
        self, engines: Mapping[str, str], settings: Settings, *, base_path: str, max_rank: int, memory: int = 0,
        kept: bool = False, key: str = "",
    ) -> None:  # fmt: skip
        self._settings = settings
        self._fleet = Fleet()
        addresses = [Address(name, url) for name, url in engines.items()]
        self._joining = Joining(
            self._fleet, addresses, settings, base_path=base_path, max_rank=max_rank, memory=memory, kept=kept, key=key
        )
        self._gateway: Gateway | None = None
        self.begun = asyncio.Event()

    @property
    def gateway(self) -> Gateway:
        assert self._gateway is not None, "it has not begun"
        return self._gateway

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._gateway is not None:
            await self._gateway(scope, receive, send)
        elif scope["type"] == "http":
            await unavailable(self._joining.reason)(scope, receive, send)

    async def run(self) -> None:
        """For ever.

        Raises:
            LorakitError: an engine can't be used before any could, or the store can't.
        """
        joining = asyncio.create_task(self._joining.run())
        gateway = Gateway(no_sockets, self._settings)
        try:
            first = asyncio.create_task(self._joining.first())
            await asyncio.wait({joining, first}, return_when=asyncio.FIRST_COMPLETED)
            first.cancel()
            if joining.done():
                joining.result()
            await gateway.begin(self._fleet, self._settings, Placing)
            self._fleet.follow(Told(gateway.reconciler.events))
            self._gateway = gateway
            self.begun.set()
            await joining
        finally:
            self._gateway = None
            joining.cancel()
            await gateway.stop()
            await asyncio.gather(joining, return_exceptions=True)


async def serve_in_front_of(
    engines: Mapping[str, str], public: socket.socket, settings: Settings, *, base_path: str, max_rank: int
) -> int:
    """Serve engines that somebody else runs on a socket until SIGINT or SIGTERM: the exit code.

    Raises:
        LorakitError: one can't be used.
    """
    front = SpreadFront(engines, settings, base_path=base_path, max_rank=max_rank, key=os.environ.get(KEY, ""))
    return await serve_beside(front, front.run(), public, settings)


async def serve_supervised(line: Supervised, settings: Settings, said: Mapping[str, Any]) -> None:
    """Until the supervisor says so, or is gone.

    Raises:
        LorakitError: it can't begin.
    """
    ending = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):  # the line's end, or the supervisor's
        asyncio.get_running_loop().add_signal_handler(number, ending.set)
    front = SpreadFront(
        said["engines"], settings, base_path=said["base_path"], max_rank=said["max_rank"], memory=said["memory"],
        kept=True,
    )  # fmt: skip
    await line.may_begin()
    running = asyncio.create_task(front.run())
    begun, ended = asyncio.create_task(front.begun.wait()), asyncio.create_task(ending.wait())
    try:
        await asyncio.wait({running, begun, ended}, return_when=asyncio.FIRST_COMPLETED)
        if front.begun.is_set():
            listening = asyncio.create_task(line.run(front, front.gateway, elsewhere=True))
            await asyncio.wait({running, listening, ended}, return_when=asyncio.FIRST_COMPLETED)
            listening.cancel()
            await asyncio.gather(listening, return_exceptions=True)
        if running.done():
            running.result()
    finally:
        for task in (running, begun, ended):
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running


def main() -> int:
    settings = from_environment()
    log_to_stderr(settings.log_format)
    line = supervised(settings)
    if line is None or ENGINES not in os.environ:
        print("lorakit: this is started by `lorakit serve --replicas`", file=sys.stderr)
        return 2
    try:
        asyncio.run(serve_supervised(line, settings, json.loads(os.environ[ENGINES])))
    except LorakitError as error:
        log.error("%s", error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
