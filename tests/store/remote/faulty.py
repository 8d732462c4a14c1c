"""A proxy before the S3 server, which can be told to fail; and which takes writes one at a time, as S3 does and moto,
which looks at a condition and writes after it, does not.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from io import BytesIO

import aiohttp
from aiohttp import web

_HOP = {"transfer-encoding", "connection", "expect", "keep-alive", "content-length", "date", "server"}


class Faulty:
    """`refuse`: a status to answer instead, by method and path; `spoil`: what arrives instead of a body, by path and
    body, with None for a connection that ends in the middle of it. `away`: nothing is answered at all."""

    def __init__(self) -> None:
        self.url = ""
        self.heal()

    def heal(self) -> None:
        """All goes well from now on, and nothing was asked."""
        self.away = False
        self.asked: list[tuple[str, str]] = []
        self.refuse: Callable[[str, str], int | None] = lambda method, path: None
        self.spoil: Callable[[str, bytes], bytes | None] = lambda path, body: body
        self.lose: Callable[[str, str], bool] = lambda method, path: False  # done, and answered to nobody

    async def serve(self, to: str, begun: Future[None], ends: asyncio.Event) -> None:
        writing = asyncio.Lock()
        async with aiohttp.ClientSession(auto_decompress=False) as session:

            async def forward(request: web.Request) -> web.StreamResponse:
                method, path = request.method, request.path
                body = await request.read()
                self.asked.append((method, path))
                if self.away:
                    request.transport.abort()  # type: ignore[union-attr]
                    return web.Response()
                if status := self.refuse(method, path):
                    return web.Response(status=status)
                headers = {name: value for name, value in request.headers.items() if name.lower() not in _HOP}
                url, more = f"{to}{request.raw_path}", {"skip_auto_headers": ["Content-Type"]}
                turn = writing if method in ("PUT", "POST", "DELETE") else nullcontext()
                async with turn, session.request(method, url, data=BytesIO(body), headers=headers, **more) as answer:
                    found = await answer.read()
                if self.lose(method, path):
                    request.transport.abort()  # type: ignore[union-attr]
                    return web.Response()
                kept = {name: value for name, value in answer.headers.items() if name.lower() not in _HOP}
                said = self.spoil(path, found) if method == "GET" and answer.status in (200, 206) else found
                if said is None:
                    kept["Content-Length"] = str(len(found))
                    cut = web.StreamResponse(status=answer.status, headers=kept)
                    await cut.prepare(request)
                    await cut.write(found[: len(found) // 2])
                    request.transport.abort()  # type: ignore[union-attr]
                    return cut
                if method == "HEAD":
                    kept["Content-Length"] = answer.headers.get("Content-Length", "0")
                return web.Response(status=answer.status, headers=kept, body=said)

            app = web.Application(client_max_size=1 << 30)
            app.router.add_route("*", "/{path:.*}", forward)
            server = web.AppRunner(app)
            await server.setup()
            site = web.TCPSite(server, "127.0.0.1", 0)
            await site.start()
            self.url = f"http://127.0.0.1:{server.addresses[0][1]}"
            begun.set_result(None)
            await ends.wait()
            await server.cleanup()


@contextmanager
def faulty(to: str) -> Iterator[Faulty]:
    proxy, begun, ends = Faulty(), Future[None](), asyncio.Event()
    loop = asyncio.new_event_loop()

    def run() -> None:
        try:
            loop.run_until_complete(proxy.serve(to, begun, ends))
        except BaseException as error:
            if begun.done():
                raise
            begun.set_exception(error)
        finally:
            loop.close()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        begun.result(30)
        yield proxy
    finally:
        loop.call_soon_threadsafe(ends.set)
        thread.join(30)
