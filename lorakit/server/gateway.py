"""The only thing that clients talk to: an ASGI app that knows which revision a `model` means.

Inside vLLM's API process it is a middleware (`--middleware lorakit.server.Gateway`): a request is resolved, its `model`
replaced, and handed on in the same process; what comes back passes through unread.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable
from typing import Any

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lorakit.errors import EngineFailed
from lorakit.server.access.at_start import KEY
from lorakit.server.access.keyring import Keyring
from lorakit.server.access.rights import NO_ADMIN, NONE, OPEN_TO_ALL, RIGHTS
from lorakit.server.dialects.lorax.request import GENERATE
from lorakit.server.engines.engine import Answering, Unreached
from lorakit.server.file_work import file_work
from lorakit.server.following.mirror import Mirror, opened_store
from lorakit.server.following.reconciler import Reconciler
from lorakit.server.following.residency import Residence, Residency
from lorakit.server.lifespan import once_started
from lorakit.server.page.door import Page, is_page
from lorakit.server.requests.answers import error_response, unavailable
from lorakit.server.requests.asking import MODEL_ROUTES, Asking
from lorakit.server.requests.limits import TooMany
from lorakit.server.requests.stored_responses import is_of_stored
from lorakit.server.settings import Settings, from_environment
from lorakit.server.sight.logs import log_answered, log_to_stderr
from lorakit.server.sight.metrics import Metrics
from lorakit.server.sight.request_id import identified
from lorakit.server.sight.tracing import Tracing, configured_tracing, traced
from lorakit.server.supervision.listener import Supervised, supervised

OWN = frozenset(
    {"/ready", "/metrics", "/v1/models", "/v1/adapters", "/v1/mixes", "/v1/events", "/v1/load_lora_adapter",
     "/v1/unload_lora_adapter", "/v1/fine_tuning/jobs", "/v1/comparisons", "/v1/key", "/info", "/openapi.json"}
)  # fmt: skip
ASKS = MODEL_ROUTES | GENERATE  # what asks a model


def _is_own(path: str) -> bool:
    return path in OWN or path.startswith(("/v1/adapters/", "/v1/mixes/", "/v1/models/", "/v1/fine_tuning/"))


class Gateway:
    """`app` is what it stands in front of: vLLM's own app, minus this middleware."""

    def __init__(self, app: ASGIApp, settings: Settings | None = None) -> None:
        self._inner = app
        self._settings = settings
        self._reconciler: Reconciler | None = None
        self._routes: ASGIApp | None = None
        self._asking: Asking | None = None
        self._keyring: Keyring | None = None
        self._tasks: list[asyncio.Task[Any]] = []
        self._supervised: Supervised | None = None
        self._held = contextlib.ExitStack()
        self._tracing: Tracing | None = None
        self._mirror: Mirror | None = None
        self._page = Page(self)

    @property
    def reconciler(self) -> Reconciler:
        if self._reconciler is None:
            raise EngineFailed("the engine has not started yet")
        return self._reconciler

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(scope, receive, send)
        elif scope["type"] == "http":
            scope, send = identified(scope, send)
            with traced(self._tracing, scope) as scope:
                await self._http(scope, receive, send)
        else:
            await self._websocket(scope, receive, send)

    # life

    async def _lifespan(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def ending() -> Message:
            message = await receive()
            if message["type"] == "lifespan.shutdown":
                await self.stop()
            return message

        await self._inner(scope, ending, once_started(scope, send, self._start))

    async def _start(self, app: Any) -> None:
        """vLLM is up, and about to listen: find out what it is, then listen where the supervisor listens."""
        from lorakit.server.engines.inside import InsideEngine

        settings = self._settings or from_environment()
        engine = InsideEngine(self._inner, app, settings.max_loras)
        await engine.read_card()
        self._supervised = supervised(settings)
        if self._supervised is not None:
            await self._supervised.may_begin()
        await self.begin(engine, settings)
        if self._supervised is not None:
            self._tasks.append(asyncio.create_task(self._supervised.run(app, self)))

    async def begin(
        self, engine: Answering, settings: Settings, residency_of: Callable[..., Residence] = Residency
    ) -> None:
        """Start to serve on an engine that answers, or on several behind one."""
        from lorakit.merge.base import read_base
        from lorakit.server.routes import routes_for
        from lorakit.store.remote.shared import SharedStore
        from lorakit.store.serving import serving

        log_to_stderr(settings.log_format)
        if wrong := await engine.try_out(engine.limits.base):  # the first request pays for what is compiled lazily
            raise EngineFailed(f"the base does not answer: {wrong}")
        base = await file_work(read_base, engine.limits.base_path)
        store = await file_work(opened_store, settings, base.identity)
        reconciler = Reconciler(settings, engine, store, base, residency_of)
        if store.unwritable is None:
            self._held.enter_context(serving(settings.store_home, base.identity))
        else:
            reconciler.events.tell("failed", f"{store.unwritable}; what is in it is served, and nothing new")
        await reconciler.recall()
        if isinstance(store, SharedStore):
            self._mirror = Mirror(reconciler, store)
            await self._mirror.begin()
            self._tasks.append(asyncio.create_task(self._mirror.run()))
        self._tracing = configured_tracing()
        reconciler.observers += [log_answered, *([self._tracing.answered] if self._tracing else [])]
        self._keyring = await Keyring.opened(settings.store_home, os.environ.get(KEY, ""))
        reconciler.observers.append(self._keyring.answered)
        self._tasks.append(asyncio.create_task(self._keyring.run()))
        asking = self._asking = Asking(reconciler, self._keyring.spend)
        self._reconciler, self._routes = reconciler, routes_for(reconciler, Metrics(reconciler), asking, self._keyring)
        self._tasks.append(asyncio.create_task(self._reconciler.run()))
        if settings.watch or settings.adapters:
            self._tasks.append(asyncio.create_task(self._reconciler.wake_on_events()))

    async def stop(self) -> None:
        """End what `begin` started; the engine is someone else's."""
        await self._page.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._asking is not None:
            await self._asking.close()
        if self._mirror is not None:
            await self._mirror.close()
        if self._reconciler is not None:
            await self._reconciler.close()
        if self._keyring is not None:
            await self._keyring.close()
        if self._tracing is not None:
            await asyncio.to_thread(self._tracing.close)
        self._held.close()

    # requests

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        path: str = scope["path"].removeprefix(scope.get("root_path", ""))
        known, routes, asking, keyring = self._reconciler, self._routes, self._asking, self._keyring
        if known is None or routes is None or asking is None or keyring is None:
            await unavailable("the engine does not answer")(scope, receive, send)
            return
        if is_page(path):
            await self._page(scope, receive, send)
            return
        scope, refusal = _admitted(scope, path, keyring)
        if refusal is not None:
            pass
        elif not await known.engine.alive():
            refusal = unavailable("the engine does not answer")
        elif known.engine.goes_around(path):
            refusal = error_response(404, "NotFoundError", f"lorakit does not serve {path}", None)
        elif known.held and scope["method"] not in ("GET", "HEAD", "OPTIONS") and _is_own(path):
            refusal = unavailable("another server is taking over; ask again")
        elif _is_own(path) or path in GENERATE:
            await routes(scope, receive, send)
        elif path in MODEL_ROUTES and not known.engine.serves(path):
            refusal = error_response(404, "NotFoundError", f"the base that is served here has no {path}", None)
        elif asking.takes(scope, path):
            await asking.answer(scope, receive, send, path)
        else:
            try:
                await known.engine.answer(scope, receive, send)
            except Unreached as error:
                refusal = unavailable(str(error))
        if refusal is not None:
            await refusal(scope, receive, send)

    async def _websocket(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The page's; and vLLM's only one, for speech, which takes the base's name and no adapter's."""
        if is_page(scope["path"].removeprefix(scope.get("root_path", ""))):
            await self._page(scope, receive, send)
            return
        code, reason, keyring = 0, "", self._keyring
        if self._reconciler is None or keyring is None or not await self._reconciler.engine.alive():
            code, reason = 1013, "the engine does not answer"
        elif (rights := keyring.rights_for(scope)) is None:
            code, reason = 1008, "the API key is missing or wrong"
        elif not rights.allowance.base:
            code, reason = 1008, "this key may not ask the base"
        else:
            try:
                keyring.admit(rights, spends=True)
            except TooMany as error:
                code, reason = 1013, str(error)
        if code:
            await receive()
            await send({"type": "websocket.close", "code": code, "reason": reason})
        else:
            await self._inner(scope, receive, send)


def _admitted(scope: Scope, path: str, keyring: Keyring) -> tuple[Scope, Response | None]:
    """The same request with the rights of its key, or why it may not come in: which is the same whatever there is
    behind its path."""
    rights = keyring.rights_for(scope)
    if scope["method"] == "OPTIONS" or path in OPEN_TO_ALL:
        return {**scope, RIGHTS: rights or NONE}, None
    if rights is None:
        return scope, error_response(401, "AuthenticationError", "the API key is missing or wrong")
    spends = scope["method"] == "POST" and path in ASKS
    try:
        keyring.admit(rights, spends=spends)
    except TooMany as error:
        return scope, error_response(429, "RateLimitError", str(error), after=error.after)
    if not rights.may(scope["method"], path, own=_is_own(path), asks=spends or is_of_stored(path)):
        return scope, error_response(403, "PermissionDeniedError", NO_ADMIN)
    return {**scope, RIGHTS: rights}, None
