"""An engine without a model, for faults and orders of events that a real one can't be made to show.

It answers with the digest of the weights that it read when it loaded a name, and holds lorakit to what an engine relies
on: a name is never given twice, never more than its slots inside, loads and removals one at a time, and nothing removed
while it answers.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
from starlette.types import Receive, Scope, Send

from lorakit.files.digests import file_digest
from lorakit.server.engines.engine import Limits, LoadFailed
from lorakit.server.following.reconciler import Reconciler
from lorakit.server.gateway import Gateway
from lorakit.server.requests.answered import Answered
from lorakit.server.settings import Settings
from tests.folders import factors, linear_modules, write_adapter

WEIGHTS = "adapter_model.safetensors"


class FakeEngine:
    """`refuses`, `broken` and `fails` hold fingerprints of weights: not loadable, without a finite first token, and
    answering nothing but errors."""

    def __init__(self, base: Path, *, slots: int = 4, max_rank: int = 16, memory: int = 0) -> None:
        self.limits = Limits(base.name, str(base), slots, max_rank, "fake 1", honours_patterns=True, memory=memory)
        self.inside: dict[str, str] = {}
        self.loads: list[str] = []
        self.removes: list[str] = []
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[bytes, bytes]] = []
        self.disconnected = 0
        self.refuses: set[str] = set()
        self.broken: set[str] = set()
        self.fails: set[str] = set()
        self.load_seconds = 0.0
        self.answer_seconds = 0.0
        self.dead = False
        self.full: str | None = None
        self.base_is_broken = False
        self.told_metrics = b""
        self.gates: dict[str, asyncio.Event] = {}
        self.responses: dict[str, dict[str, Any]] = {}
        self.behind: list[asyncio.Task[None]] = []
        self._answering: Counter[str] = Counter()
        self._working = False

    @contextmanager
    def _alone(self) -> Iterator[None]:
        assert not self._working, "loads and removals overlap"
        self._working = True
        try:
            yield
        finally:
            self._working = False

    async def load(self, name: str, folder: Path) -> None:
        with self._alone():
            assert name not in self.loads, f"the name {name} is given a second time"
            self.loads.append(name)
            places = max(self.limits.slots, self.limits.memory)
            assert len(self.inside) < places, f"{name} goes beyond the {places} places"
            await asyncio.sleep(self.load_seconds)
            if self.dead:
                raise LoadFailed("EngineDeadError")
            if not (folder / WEIGHTS).is_file():
                raise LoadFailed(f"No adapter found for {folder}")
            fingerprint = fingerprint_of(folder)
            if fingerprint in self.refuses:
                raise LoadFailed("these weights are not loaded here")
            self.inside[name] = fingerprint

    def no_place_for(self, name: str) -> str | None:
        return self.full

    async def remove(self, name: str) -> None:
        with self._alone():
            assert name in self.inside, f"{name} is removed, but is not there"
            assert not self._answering[name], f"{name} is removed while it answers"
            await asyncio.sleep(0)
            assert not self._answering[name], f"{name} was given a request while it was removed"
            self.removes.append(name)
            del self.inside[name]

    async def try_out(self, name: str) -> str | None:
        if name == self.limits.base:
            return "its first token has the logprob [nan]" if self.base_is_broken else None
        assert name in self.inside
        return "its first token has the logprob [nan]" if self.inside[name] in self.broken else None

    async def call(self, method: str, path: str, body: Any) -> tuple[int, bytes]:
        raw, sent = json.dumps(body).encode(), list[dict[str, Any]]()

        async def receive() -> Any:
            return {"type": "http.request", "body": raw, "more_body": False}

        async def send(message: Any) -> None:
            sent.append(message)

        await self.answer({"type": "http", "method": method, "path": path, "headers": []}, receive, send)
        return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:])

    async def alive(self, *, now: bool = False) -> bool:
        return not self.dead

    def model_card(self) -> dict[str, Any]:
        return {"id": "whatever", "object": "model", "owned_by": "fake", "max_model_len": 64}

    def serves(self, path: str) -> bool:
        return path != "/v1/embeddings"

    def goes_around(self, path: str) -> bool:
        return path.startswith(("/adapters", "/invocations"))

    async def metrics(self) -> bytes:
        return self.told_metrics

    def templated(self, path: str, said: Mapping[str, Any], template: str) -> dict[str, Any]:
        return {"chat_template": template} if "messages" in said else {}

    async def describe(self) -> dict[str, Any]:
        return {"openapi": "3.1.0", "info": {"title": "fake", "version": "1"}, "paths": {"/v1/completions": {}}}

    def gate(self, name: str) -> asyncio.Event:
        """Requests with this `hold` wait until it is set."""
        return self.gates.setdefault(name, asyncio.Event())

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        lengths = [int(value) for name, value in scope["headers"] if name == b"content-length"]
        assert lengths in ([], [len(body)]), "the content-length is not the body's"
        if scope["path"].startswith("/v1/responses/"):
            stored = self.responses.get(scope["path"].rpartition("/")[2])
            await _send_json(send, 200 if stored else 404, stored or {"error": {"message": "no such response"}})
            return
        if scope["path"] == "/v1/audio/transcriptions":
            self.asked.append({"body": body})
            await _send_json(send, 200, {"text": "said"})
            return
        if scope["path"] not in ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/tokenize"):
            await _send_json(send, 404, {"detail": "Not Found"})
            return
        request = json.loads(body)
        self.asked.append(request)
        self.headers.append(dict(scope["headers"]))
        model = request["model"]
        if model != self.limits.base and model not in self.inside:
            await _send_json(send, 404, {"error": {"message": f"The model `{model}` does not exist"}})
            return
        self._answering[model] += 1
        in_slots = {name for name, count in self._answering.items() if count and name != self.limits.base}
        assert len(in_slots) <= self.limits.slots, f"{model} is answered beyond the {self.limits.slots} slots"
        try:
            await self._say(request, model, receive, send)
        finally:
            self._answering[model] -= 1

    async def _say(self, request: dict[str, Any], model: str, receive: Receive, send: Send) -> None:
        if "hold" in request:
            gate = asyncio.create_task(self.gate(request["hold"]).wait())
            gone = asyncio.ensure_future(receive())
            await asyncio.wait({gate, gone}, return_when=asyncio.FIRST_COMPLETED)
            if gone.done() and gone.result()["type"] == "http.disconnect":
                gate.cancel()
                self.disconnected += 1
                return
            gone.cancel()
        if request.get("background"):
            await self._say_later(request, model, send)
            return
        await asyncio.sleep(self.answer_seconds)
        said = "base" if model == self.limits.base else self.inside[model]
        if said in self.fails:
            await _send_json(
                send, 500, {"error": {"message": "out of range float values", "type": "InternalServerError"}}
            )
        elif request.get("boom"):
            await _send_json(send, 400, {"error": {"message": "boom", "type": "BadRequestError"}})
        elif not request.get("stream"):
            usage = {"prompt_tokens": 3, "total_tokens": 8, "completion_tokens": 5}
            await _send_json(send, 200, {"id": "1", "model": model, "choices": [{"text": said}], "usage": usage})
        else:
            await send(_start(200, b"text/event-stream"))
            for number in range(3):
                chunk = json.dumps({"model": model, "choices": [{"text": said[number]}]}, separators=(",", ":"))
                await send({"type": "http.response.body", "body": f"data: {chunk}\n\n".encode(), "more_body": True})
                await asyncio.sleep(0)
            if (request.get("stream_options") or {}).get("include_usage"):
                usage = {"prompt_tokens": 3, "total_tokens": 8, "completion_tokens": 5}
                chunk = json.dumps({"model": model, "choices": [], "usage": usage}, separators=(",", ":"))
                await send({"type": "http.response.body", "body": f"data: {chunk}\n\n".encode(), "more_body": True})
            await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _say_later(self, request: dict[str, Any], model: str, send: Send) -> None:
        """As vLLM does: in a task of its own, which uses the adapter after the request is answered."""
        response: dict[str, Any] = {"id": f"resp_{len(self.responses)}", "status": "queued", "model": model}
        self.responses[response["id"]] = response

        async def work() -> None:
            self._answering[model] += 1
            await self.gate(request["later"]).wait()
            self._answering[model] -= 1
            response.update(status="completed", usage={"input_tokens": 3, "output_tokens": 5, "total_tokens": 8})

        self.behind.append(asyncio.create_task(work()))
        await _send_json(send, 200, response)


def _start(status: int, kind: bytes, *more: tuple[bytes, bytes]) -> dict[str, Any]:
    return {"type": "http.response.start", "status": status, "headers": [(b"content-type", kind), *more]}


async def _send_json(send: Send, status: int, value: Any) -> None:
    body = json.dumps(value, separators=(",", ":")).encode()
    await send(_start(status, b"application/json", (b"content-length", str(len(body)).encode())))
    await send({"type": "http.response.body", "body": body})


# what trainers write


def put_adapter(folder: Path, seed: int = 1, **config: Any) -> Path:
    """An adapter without any marker: its writer may still be at it."""
    rank = config.pop("rank", 2)
    return write_adapter(folder, factors(linear_modules(), rank, seed), rank=rank, **config)


def trainer_state(step: int, eval_loss: float | None = None, eval_step: int | None = None) -> str:
    log: list[dict[str, Any]] = [{"step": step, "epoch": 1.0, "loss": 1.5}]
    if eval_loss is not None:
        log.append({"step": step if eval_step is None else eval_step, "epoch": 1.0, "eval_loss": eval_loss})
    return json.dumps({"global_step": step, "epoch": 1.0, "log_history": log})


def put_checkpoint(
    run: Path, step: int, seed: int | None = None, eval_loss: float | None = None, eval_step: int | None = None,
    **config: Any,
) -> Path:  # fmt: skip
    """What transformers' Trainer leaves, its last file last."""
    folder = put_adapter(run / f"checkpoint-{step}", step if seed is None else seed, **config)
    (folder / "trainer_state.json").write_text(trainer_state(step, eval_loss, eval_step))
    return folder


def overwrite(folder: Path, seed: int, eval_loss: float | None = None) -> Path:
    """The same checkpoint written again with other numbers, in place, as safetensors up to 0.7 does."""
    other = put_adapter(folder.parent / f".tmp-{seed}", seed)
    with (folder / WEIGHTS).open("r+b") as stream:
        stream.write((other / WEIGHTS).read_bytes())
        stream.truncate()
    for path in other.iterdir():
        path.unlink()
    other.rmdir()
    state = folder / "trainer_state.json"
    if state.exists():
        state.write_text(trainer_state(int(folder.name.partition("-")[2]), eval_loss))
        later = max(path.stat().st_mtime_ns for path in folder.iterdir()) + 1000
        os.utime(state, ns=(later, later))
    return folder


def fingerprint_of(folder: Path) -> str:
    return file_digest(folder / WEIGHTS)[:16]


# servers


def settings_for(folder: Path, **more: Any) -> Settings:
    """A store in `folder/home`, `folder/runs` watched, and no waiting."""
    (folder / "runs").mkdir(exist_ok=True)
    quick: dict[str, Any] = {
        "home": str(folder / "home"), "watch": (str(folder / "runs"),), "poll": 0.02, "quiet": 0.05, "load_wait": 20.0,
        "debounce": 0.0,
    }  # fmt: skip
    return replace(Settings(), **{**quick, **more})


class Served:
    """A gateway over a fake engine, and a client of it."""

    def __init__(self, gateway: Gateway, engine: FakeEngine, client: httpx.AsyncClient) -> None:
        self.gateway, self.engine, self.client = gateway, engine, client

    @property
    def reconciler(self) -> Reconciler:
        return self.gateway.reconciler

    def heard(self) -> list[Answered]:
        """What is told of answers from now on."""
        told: list[Answered] = []
        self.reconciler.observers.append(told.append)
        return told

    async def ask(self, model: Any, **more: Any) -> httpx.Response:
        return await self.client.post("/v1/completions", json={"model": model, "prompt": "a", **more})

    async def revision_of(self, model: str) -> str | None:
        """The revision that answers, None for 404."""
        answer = await self.ask(model)
        if answer.status_code == 404:
            return None
        assert answer.status_code == 200, answer.text
        assert answer.json()["model"] == answer.headers["x-lorakit-revision"]
        return str(answer.headers["x-lorakit-revision"])

    async def until(self, condition: Any, seconds: float = 60.0) -> Any:
        """Ask again until there is an answer that counts."""
        async with asyncio.timeout(seconds):
            while True:
                found = condition()
                if asyncio.iscoroutine(found):
                    found = await found
                if found:
                    return found
                await asyncio.sleep(0.01)

    async def until_ready(self) -> None:
        async def ready() -> bool:
            return (await self.client.get("/ready")).status_code == 200

        await self.until(ready)


async def nothing(scope: Scope, receive: Receive, send: Send) -> None:
    raise AssertionError("the gateway asked the app behind it rather than its engine")


@asynccontextmanager
async def serving(
    folder: Path, base: Path, *, engine: FakeEngine | None = None, headers: Mapping[str, str] | None = None,
    ready: bool = True, slots: int = 4, **more: Any,
) -> AsyncIterator[Served]:  # fmt: skip
    """A running gateway over `folder/runs`, the store in `folder/home`."""
    engine = engine or FakeEngine(base, slots=slots)
    gateway = Gateway(nothing)
    await gateway.begin(engine, settings_for(folder, **more))
    transport = httpx.ASGITransport(gateway, raise_app_exceptions=True)
    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://lorakit", headers=headers) as client:
            served = Served(gateway, engine, client)
            if ready:
                await served.until_ready()
            yield served
    finally:
        await gateway.stop()
