"""A gateway over a fake engine that answers on a real port, for what asks it from outside."""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.server.sight.logs import log
from lorakit.server.supervision.listener import public_server
from tests.server.fake_engine import FakeEngine, Served, serving


@dataclass(frozen=True)
class Running:
    """`served` belongs to another thread's event loop: what changes it goes through `do`."""

    url: str
    served: Served
    loop: asyncio.AbstractEventLoop

    @property
    def engine(self) -> FakeEngine:
        return self.served.engine

    def do(self, asked: Any) -> Any:
        """Await something over there."""
        return asyncio.run_coroutine_threadsafe(asked, self.loop).result(60)


@contextmanager
def running(folder: Path, base: Path, **more: Any) -> Iterator[Running]:
    """Served from `folder/runs`, the store in `folder/home`, ready; ended with the block."""
    begun: Future[Running] = Future()
    ends = asyncio.Event()

    async def serve() -> None:
        with socket.create_server(("127.0.0.1", 0)) as public:
            async with serving(folder, base, **more) as served:
                server = public_server(served.gateway, drain=1)
                answering = asyncio.create_task(server.serve(sockets=[public]))
                url = f"http://127.0.0.1:{public.getsockname()[1]}"
                begun.set_result(Running(url, served, asyncio.get_running_loop()))
                await ends.wait()
                server.should_exit = True
                await answering

    def run() -> None:
        try:
            asyncio.run(serve())
        except BaseException as error:
            if begun.done():
                raise
            begun.set_exception(error)

    thread = threading.Thread(target=run)
    shown, log.handlers = log.handlers, [logging.NullHandler()]  # stderr is for what asks it
    thread.start()
    try:
        there = begun.result(60)
        yield there
        there.loop.call_soon_threadsafe(ends.set)
    except BaseException:
        if begun.done() and not begun.exception():
            begun.result().loop.call_soon_threadsafe(ends.set)
        raise
    finally:
        thread.join(60)
        log.handlers = shown
