"""The only thing that clients talk to: an ASGI app that knows which revision a `model` means.

Inside vLLM's API process it is a middleware (`--middleware lorakit.server.Gateway`): a request is resolved, its `model`
replaced, and handed on in the same process; what comes back passes through unread.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import os
import sys
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lorakit.errors import EngineFailed, LorakitError, NotFound
from lorakit.server.answers import error_response, unavailable
from lorakit.server.engine import Engine, LoadFailed
from lorakit.server.events import log_to_stderr
from lorakit.server.listener import Supervised, supervised
from lorakit.server.reconciler import Reconciler
from lorakit.server.residency import NoSlot, Resident
from lorakit.server.settings import Settings, from_environment
from lorakit.store.catalog import Revision

# What has to name a model in its JSON body; elsewhere it may, and what names none is handed on as it is.
WITH_MODEL = frozenset(
    {
        "/v1/completions", "/v1/completions/render", "/v1/chat/completions", "/v1/chat/completions/batch",
        "/v1/chat/completions/render", "/v1/responses", "/v1/responses/render", "/v1/embeddings", "/v1/messages",
        "/v1/messages/count_tokens", "/v1/messages/render", "/v1/score", "/v1/rerank", "/pooling", "/classify",
        "/score", "/rerank", "/v2/rerank", "/generative_scoring", "/inference/v1/generate", "/v1/systemone",
    }
)  # fmt: skip
# The same, but the base is meant where none is named.
BASE_IF_NONE = frozenset({"/tokenize", "/detokenize"})
OPEN_TO_ALL = ("/health", "/ready", "/ping", "/version", "/docs", "/redoc", "/openapi.json")
REVISION_HEADER = b"x-lorakit-revision"
MAX_BODY = 256 * 2**20  # bytes


class Gateway:
    """`app` is what it stands in front of: vLLM's own app, minus this middleware."""

    def __init__(self, app: ASGIApp, settings: Settings | None = None) -> None:
        self._inner = app
        self._settings = settings
        self._reconciler: Reconciler | None = None
        self._routes: ASGIApp | None = None
        self._key = os.environ.get("LORAKIT_API_KEY", "")
        self._tasks: list[asyncio.Task[Any]] = []
        self._supervised: Supervised | None = None
        self._held = contextlib.ExitStack()

    @property
    def reconciler(self) -> Reconciler:
        if self._reconciler is None:
            raise EngineFailed("the engine has not started yet")
        return self._reconciler

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(scope, receive, send)
        elif scope["type"] == "http":
            await self._http(scope, receive, send)
        elif scope["type"] == "websocket" and not self._allowed(scope, scope["path"]):
            await receive()
            await send({"type": "websocket.close", "code": 1008, "reason": "the API key is missing or wrong"})
        else:
            await self._inner(scope, receive, send)

    # life

    async def _lifespan(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def started(message: Message) -> None:
            if message["type"] == "lifespan.startup.complete":
                try:
                    await self._start(scope["app"])
                except LorakitError as error:
                    await send({"type": "lifespan.startup.failed", "message": f"lorakit: {error}"})
                    raise
            await send(message)

        async def ending() -> Message:
            message = await receive()
            if message["type"] == "lifespan.shutdown":
                await self.stop()
            return message

        await self._inner(scope, ending, started)

    async def _start(self, app: Any) -> None:
        """vLLM is up, and about to listen: find out what it is, then listen where the supervisor listens."""
        from lorakit.server.vllm import InsideEngine

        settings = self._settings or from_environment()
        engine = InsideEngine(self._inner, app, settings.max_loras)
        await engine.read_card()
        await self.begin(engine, settings)
        self._supervised = supervised(settings.drain)
        if self._supervised is not None:
            self._tasks.append(asyncio.create_task(self._supervised.run(app, self)))

    async def begin(self, engine: Engine, settings: Settings) -> None:
        """Start to serve on an engine that answers."""
        from lorakit.merge.base import read_base
        from lorakit.server.routes import routes_for
        from lorakit.store.serving import serving
        from lorakit.store.store import Store

        log_to_stderr()
        # A busy event loop gives the interpreter away after 5 ms, and a thread that touches the disk asks for it after
        # each call: at that rate a checkpoint would take seconds to come in.
        sys.setswitchinterval(min(sys.getswitchinterval(), 0.0005))
        if wrong := await engine.try_out(engine.limits.base):  # the first request pays for what is compiled lazily
            raise EngineFailed(f"the base does not answer: {wrong}")
        base = await asyncio.to_thread(read_base, engine.limits.base_path)
        store = await asyncio.to_thread(Store, settings.store_home, base.identity)
        self._held.enter_context(serving(settings.store_home, base.identity))
        reconciler = Reconciler(settings, engine, store, base)
        await reconciler.recall()
        self._reconciler, self._routes = reconciler, routes_for(reconciler)
        self._tasks.append(asyncio.create_task(self._reconciler.run()))
        if settings.watch or settings.adapters:
            self._tasks.append(asyncio.create_task(self._reconciler.wake_on_events()))

    async def stop(self) -> None:
        """End what `begin` started; the engine is someone else's."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._reconciler is not None:
            await self._reconciler.close()
        self._held.close()

    # requests

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        path: str = scope["path"].removeprefix(scope.get("root_path", ""))
        if not self._allowed(scope, path):
            await error_response(401, "AuthenticationError", "the API key is missing or wrong", None)(
                scope, receive, send
            )
        elif self._reconciler is None or self._routes is None or not await self._reconciler.engine.alive():
            await unavailable("the engine does not answer")(scope, receive, send)
        elif self._reconciler.engine.goes_around(path):
            await error_response(404, "NotFoundError", f"lorakit does not serve {path}", None)(scope, receive, send)
        elif path in OWN or path.startswith(("/v1/adapters/", "/v1/models/")):
            await self._routes(scope, receive, send)
        elif path in WITH_MODEL and not self._reconciler.engine.serves(path):
            await error_response(404, "NotFoundError", f"the base that is served here has no {path}", None)(
                scope, receive, send
            )
        elif scope["method"] == "POST" and (path in WITH_MODEL or _is_json(scope)):
            await self._ask(scope, receive, send, path)
        else:
            await self._reconciler.engine.answer(scope, receive, send)

    def _allowed(self, scope: Scope, path: str) -> bool:
        if not self._key or scope.get("method") == "OPTIONS" or path in OPEN_TO_ALL:
            return True
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        return hmac.compare_digest(given, f"Bearer {self._key}".encode())

    async def _ask(self, scope: Scope, receive: Receive, send: Send, path: str) -> None:
        """A request for a model: find the revision, count it in, hand the request on under the engine's name."""
        body = await _read_body(receive)
        if body is None:
            await error_response(413, "BadRequestError", f"the body is larger than {MAX_BODY} bytes", None)(
                scope, receive, send
            )
            return
        try:
            request = json.loads(body)
        except (ValueError, RecursionError):
            await error_response(400, "BadRequestError", "the body is no JSON", None)(scope, receive, send)
            return
        model = request.get("model") if isinstance(request, dict) else None
        if model is None and path not in WITH_MODEL and path not in BASE_IF_NONE:
            await self.reconciler.engine.answer(scope, _replayed(body, receive), send)
            return
        if model is None and isinstance(request, dict) and path in BASE_IF_NONE:
            model = self.reconciler.engine.limits.base
        if not isinstance(model, str) or not model:
            await error_response(
                400, "BadRequestError", "the body has to be a JSON object with a string `model`", "model"
            )(scope, receive, send)
            return
        try:
            revision, resident = await self._acquire(model)
        except NotFound as error:
            await error_response(404, "NotFoundError", str(error), "model")(scope, receive, send)
            return
        except NoSlot as error:
            await unavailable(str(error))(scope, receive, send)
            return
        try:
            await self._hand_on(scope, receive, send, request, revision, resident)
        finally:
            if resident is not None:
                self.reconciler.residency.done(resident)

    async def _acquire(self, model: str) -> tuple[Revision | None, Resident | None]:
        """The revision that a model means now, counted in: between the two nothing else runs.

        Raises:
            NotFound: there is none.
            NoSlot: it is not in the engine, and no slot became free.
        """
        reconciler = self.reconciler
        while True:
            revision = reconciler.resolve(model)
            if revision is None:
                return None, None
            resident = reconciler.residency.use(revision.name)
            if resident is not None:
                reconciler.requests[revision.id] = reconciler.requests.get(revision.id, 0) + 1
                return revision, resident
            with contextlib.suppress(LoadFailed):  # it counts no more: look again
                await reconciler.bring_in(revision)

    async def _hand_on(
        self, scope: Scope, receive: Receive, send: Send, request: dict[str, Any],
        revision: Revision | None, resident: Resident | None,
    ) -> None:  # fmt: skip
        base = self.reconciler.engine.limits.base
        name = revision.name if revision else base
        request["model"] = resident.engine_name if resident else base
        try:
            raw = json.dumps(request).encode()
        except RecursionError:  # what nests deeply may be read, but not written
            await error_response(400, "BadRequestError", "the body nests too deeply", None)(scope, receive, send)
            return
        headers = [
            (key, value) for key, value in scope["headers"] if key not in (b"content-length", b"transfer-encoding")
        ]
        headers.append((b"content-length", str(len(raw)).encode()))
        answer = named_answer(send, name, request["model"])
        await self.reconciler.engine.answer({**scope, "headers": headers}, _replayed(raw, receive), answer)


OWN = frozenset(
    {"/ready", "/v1/models", "/v1/adapters", "/v1/events", "/v1/load_lora_adapter", "/v1/unload_lora_adapter",
     "/openapi.json"}
)  # fmt: skip


def _is_json(scope: Scope) -> bool:
    kind = next((value for name, value in scope["headers"] if name == b"content-type"), b"")
    return kind.partition(b";")[0].strip().lower() == b"application/json"


async def _read_body(receive: Receive) -> bytes | None:
    """The whole body; None when it is too large."""
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return b""
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > MAX_BODY:
            return None
        if not message.get("more_body", False):
            return b"".join(parts)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """The body once, then what the client does next: a disconnect has to reach the engine."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def named_answer(send: Send, name: str, engine_name: str) -> Callable[[Message], Awaitable[None]]:
    """Adds the revision's header; where the engine knows it by another name, puts the right one into the body."""
    if name == engine_name:

        async def passed_through(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", []), (REVISION_HEADER, name.encode())]}
            await send(message)

        return passed_through

    told, said = f'"model":"{engine_name}"'.encode(), f'"model":"{name}"'.encode()
    held: Message | None = None

    async def renamed(message: Message) -> None:
        nonlocal held
        if message["type"] == "http.response.start":
            held = message
            return
        body = message.get("body", b"").replace(told, said)
        if held is not None:
            headers = [(key, value) for key, value in held.get("headers", []) if key != b"content-length"]
            if not message.get("more_body", False):
                headers.append((b"content-length", str(len(body)).encode()))
            await send({**held, "headers": [*headers, (REVISION_HEADER, name.encode())]})
            held = None
        await send({**message, "body": body})

    return renamed
