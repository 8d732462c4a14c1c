"""As much of vLLM as the gateway sees of it over HTTP, without a model: for faults, and for what an engine may lack."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from lorakit.server.supervision.listener import public_server
from lorakit.server.supervision.supervisor import listen
from tests.server.fake_engine import WEIGHTS, fingerprint_of

ROUTES = ("/v1/completions", "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/models", "/version")


class FakeVllm:
    """Answers with the fingerprint of the weights that a name was loaded with.

    Args:
        removes: whether it was started with VLLM_SERVER_DEV_MODE=1.
        cpu: whether its metrics are those of a CPU.
    """

    def __init__(
        self, base: Path, *, slots: int = 4, version: str = "0.32.0", removes: bool = False, cpu: bool = False
    ) -> None:
        self.base, self.slots, self.version, self.removes, self.cpu = base, slots, version, removes, cpu
        self.name = "base"
        self.routes = ROUTES
        self.key = ""
        self.named: dict[str, tuple[int, str, str]] = {}  # number, path, what it answers
        self.inside: list[int] = []
        self.running: list[str] = []  # the names that requests are there for, as its metrics say
        self.count = 0
        self.asked: list[dict[str, Any]] = []  # scopes
        self.disconnected = asyncio.Event()
        self.gate = asyncio.Event()
        self.sent = 0

    def put(self, name: str, path: str, says: str) -> None:
        self.count += 1
        self.named[name] = (self.count, path, says)
        self.inside.append(self.count)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.asked.append(scope)
        body, message = b"", {"more_body": True}
        while message.get("more_body"):
            message = await receive()
            body += message.get("body", b"")
        given = dict(scope["headers"]).get(b"authorization", b"").decode()
        if self.key and scope["path"].startswith("/v1") and given != f"Bearer {self.key}":
            await _send(send, 401, {"error": "Unauthorized"})
            return
        match scope["path"]:
            case "/health":
                await _send(send, 200, None)
            case "/openapi.json":
                more = ["/collective_rpc"] if self.removes else []
                await _send(send, 200, {"paths": {route: {} for route in [*self.routes, *more]}})
            case "/version":
                await _send(send, 200, {"version": self.version})
            case "/metrics":
                await _send(send, 200, self.metrics())
            case "/v1/models":
                cards = [{"id": self.name, "root": str(self.base), "parent": None}]
                cards += [{"id": name, "root": path, "parent": self.name} for name, (_, path, _) in self.named.items()]
                await _send(send, 200, {"object": "list", "data": cards})
            case "/v1/load_lora_adapter":
                await self.load(json.loads(body), send)
            case "/v1/unload_lora_adapter":
                del self.named[json.loads(body)["lora_name"]]
                await _send(send, 200, "Success")
            case "/collective_rpc" if self.removes:
                asked = json.loads(body)
                if asked["method"] == "remove_lora":
                    self.inside.remove(asked["args"][0])
                await _send(send, 200, {"results": [str(set(self.inside))]})
            case "/v1/completions":
                await self.complete(json.loads(body), receive, send)
            case "/endless" | "/cut" | "/first":
                await self.stream(scope["path"], receive, send)
            case _:
                await _send(send, 404, {"detail": "Not Found"})

    def metrics(self) -> str:
        cache, running = "1073741824" if self.cpu else "None", ",".join(self.running)
        return (
            f'vllm:cache_config_info{{engine="0",kv_cache_memory_bytes="{cache}"}} 1.0\n'
            f'vllm:num_requests_running{{engine="0"}} {len(self.running)}.0\n'
            f'vllm:lora_requests_info{{max_lora="{self.slots}",running_lora_adapters="{running}"}} 1.7e+09\n'
        )

    async def load(self, asked: dict[str, Any], send: Any) -> None:
        name, folder = asked["lora_name"], Path(asked["lora_path"])
        assert name not in self.named, f"the name {name} is given a second time"
        if not (folder / WEIGHTS).is_file():
            self.inside.append(self.count + 1)  # as vLLM, which leaves the number behind
            self.count += 1
            await _send(send, 500, {"error": {"message": f"No adapter found for {folder}"}})
            return
        self.put(name, str(folder), fingerprint_of(folder))
        if self.cpu and not self.version.startswith("0.33"):
            assert len(self.inside) < self.slots, "the last slot, which the base's rows read, is filled"
        await _send(send, 200, "Success")

    async def complete(self, asked: dict[str, Any], receive: Any, send: Any) -> None:
        model = asked["model"]
        if model != self.name and model not in self.named:
            await _send(send, 404, {"error": {"message": f"The model `{model}` does not exist"}})
            return
        said = "base" if model == self.name else self.named[model][2]
        choice = {"text": said, "logprobs": {"token_logprobs": [-0.5]}}
        await _send(send, 200, {"model": model, "choices": [choice]})

    async def stream(self, path: str, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-encoding", b"odd")]})
        gone = asyncio.create_task(self.until_gone(receive))
        try:
            for _ in range(100_000):
                await send({"type": "http.response.body", "body": b"x" * 4096, "more_body": True})
                self.sent += 4096
                await asyncio.sleep(0)
                if path == "/first":
                    await asyncio.wait({asyncio.create_task(self.gate.wait()), gone}, return_when="FIRST_COMPLETED")
                    break
                if path == "/cut":
                    raise ConnectionError
                if gone.done():
                    return
            await send({"type": "http.response.body", "body": b"last"})
        finally:
            gone.cancel()

    async def until_gone(self, receive: Any) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.disconnected.set()


async def _send(send: Any, status: int, value: Any) -> None:
    body = value.encode() if isinstance(value, str) else json.dumps(value).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


@asynccontextmanager
async def listening(app: Any, port: int = 0, path: Path | None = None) -> AsyncIterator[str]:
    """An app at an address of its own: its URL; or on a socket at a path."""
    if path is None:
        public = listen("127.0.0.1", port)
        port = public.getsockname()[1]
    else:
        public = socket.socket(socket.AF_UNIX)
        public.bind(str(path))
        public.listen()
    server = public_server(app, drain=1)
    running = asyncio.create_task(server.serve(sockets=[public]))
    try:
        yield f"http://127.0.0.1:{port}" if path is None else f"unix:{path}"
    finally:
        server.should_exit = server.force_exit = True
        await running
        public.close()


@contextmanager
def answering(app: Any) -> Iterator[str]:
    """An app at an address of its own, for who has no event loop."""
    begun: Future[tuple[str, asyncio.AbstractEventLoop]] = Future()
    ends = asyncio.Event()

    async def run() -> None:
        async with listening(app) as url:
            begun.set_result((url, asyncio.get_running_loop()))
            await ends.wait()

    thread = threading.Thread(target=lambda: asyncio.run(run()))
    thread.start()
    url, loop = begun.result(60)
    try:
        yield url
    finally:
        loop.call_soon_threadsafe(ends.set)
        thread.join(60)
