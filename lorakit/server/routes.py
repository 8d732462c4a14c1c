"""lorakit's own routes, and the few of vLLM's that it answers itself."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable
from typing import Annotated, Any

from fastapi import FastAPI, Header, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictStr, model_validator
from starlette.exceptions import HTTPException

from lorakit import __version__
from lorakit.errors import Conflict, LorakitError, NotFound, Refused
from lorakit.files.addresses import without_secrets
from lorakit.server.access.fetching import Fetching, NotFetched, is_address
from lorakit.server.access.given import Administered, Known
from lorakit.server.access.keyring import Keyring
from lorakit.server.access.rights import Forbidden, rights_of
from lorakit.server.access.told import key_router
from lorakit.server.comparisons import Comparisons, comparison_router
from lorakit.server.described import EVERYWHERE, errors, whole_description
from lorakit.server.dialects.fine_tuning import fine_tuning_router
from lorakit.server.dialects.lorax.routes import Lorax, lorax_router
from lorakit.server.engines.engine import LoadFailed
from lorakit.server.file_work import file_work
from lorakit.server.following.reconciler import Reconciler
from lorakit.server.following.residency import NoSlot
from lorakit.server.following.splitting import MOST_SHADOWS, MOST_SHARES, NewSplit
from lorakit.server.losses import Logs, loss_router
from lorakit.server.mixes.making import MixNotMade, MixRefused
from lorakit.server.mixes.routes import mix_router
from lorakit.server.requests.answers import PlainJSON, error_response
from lorakit.server.requests.asking import Asking
from lorakit.server.roots import permitted
from lorakit.server.sight.metrics import CONTENT_TYPE, Metrics
from lorakit.server.views import adapter_view, model_cards
from lorakit.store.remote.objects import Unreachable

STATUS: tuple[tuple[type[LorakitError], int, str], ...] = (
    (NotFound, 404, "NotFoundError"),
    (Forbidden, 403, "PermissionDeniedError"),
    (MixRefused, 422, "UnprocessableEntityError"),
    (MixNotMade, 503, "ServiceUnavailableError"),
    (Refused, 400, "BadRequestError"),
    (LoadFailed, 400, "BadRequestError"),
    (NotFetched, 502, "BadGatewayError"),
    (Conflict, 409, "ConflictError"),
    (NoSlot, 503, "ServiceUnavailableError"),
    (Unreachable, 503, "ServiceUnavailableError"),
    (LorakitError, 500, "InternalServerError"),
)


Most = Annotated[int, Query(ge=0, le=1_000_000)]
NOT_READY = {"description": "The engine, or an adapter, is being loaded", "content": {"application/json": {}}}


class Exposition(Response):
    """Prometheus' text format."""

    media_type = CONTENT_TYPE


class EventStream(StreamingResponse):
    """Server-sent events."""

    media_type = "text/event-stream"


class NewAdapter(BaseModel):
    """An adapter to serve: a folder under one of the server's roots, or an https address on one of its hosts."""

    model_config = ConfigDict(extra="forbid")
    name: StrictStr
    source: StrictStr


class Share(BaseModel):
    """A revision, and its share of the requests: 0.05 of 1."""

    model_config = ConfigDict(extra="forbid")
    revision: StrictStr
    share: float = Field(strict=True, gt=0, le=1, allow_inf_nan=False)


class NewTarget(BaseModel):
    """Whatever names a revision: `step-500`, a digest, `latest`, `best`; or several, with their shares. Those in
    `shadow` answer as well, for nobody. Another `seed` has other users meet each of them."""

    model_config = ConfigDict(extra="forbid")
    revision: StrictStr | None = None
    shares: list[Share] | None = Field(default=None, min_length=2, max_length=MOST_SHARES)
    shadow: list[StrictStr] = Field(default=[], max_length=MOST_SHADOWS)
    seed: int | None = Field(default=None, strict=True, ge=0, lt=2**53)

    @model_validator(mode="after")
    def _names_one_or_several(self) -> NewTarget:
        if (self.revision is None) == (self.shares is None):
            raise ValueError("give either `revision` or `shares`")
        return self


class LoadRequest(BaseModel):
    """vLLM's own: a name that exists gets a new revision, whatever `load_inplace` says."""

    lora_name: StrictStr
    lora_path: StrictStr
    load_inplace: StrictBool = False


class UnloadRequest(BaseModel):
    """vLLM's own."""

    lora_name: StrictStr
    lora_int_id: int | None = None


def routes_for(reconciler: Reconciler, metrics: Metrics, asking: Asking, keyring: Keyring) -> FastAPI:
    """The app that answers lorakit's routes."""
    app = FastAPI(
        title="lorakit", version=__version__, docs_url=None, redoc_url=None, openapi_url=None,
        default_response_class=PlainJSON,
    )  # fmt: skip
    app.add_middleware(CORSMiddleware, allow_origins=["*"], allow_methods=["*"], allow_headers=["*"])
    app.add_exception_handler(LorakitError, _failed)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    app.state.reconciler, app.state.metrics, app.state.keyring = reconciler, metrics, keyring
    app.state.lorax = Lorax(reconciler, asking)
    app.state.fetching = Fetching(reconciler.settings)
    app.state.comparisons, app.state.logs = Comparisons(), Logs()
    app.include_router(_router())
    app.include_router(mix_router())
    app.include_router(fine_tuning_router())
    app.include_router(lorax_router())
    for router in (key_router(), comparison_router(), loss_router()):
        app.include_router(router)
    return app


def _router() -> Any:
    from fastapi import APIRouter

    router = APIRouter(tags=["lorakit"])

    def add(path: str, endpoint: Callable[..., Any], *statuses: int, method: str = "GET", **more: Any) -> None:
        """With the statuses that its errors may have, besides those that any may have."""
        router.add_api_route(path, endpoint, methods=[method], responses=EVERYWHERE | errors(*statuses), **more)

    router.add_api_route("/ready", ready, methods=["GET"], responses={503: NOT_READY})
    add("/metrics", metrics, response_class=Exposition)
    add("/v1/models", models)
    add("/v1/models/{model:path}", model, 404)
    add("/v1/adapters", adapters, 400)
    add("/v1/adapters", add_adapter, 400, 404, 409, method="POST", status_code=201)
    add("/v1/adapters/{name}", adapter, 400, 404)
    add("/v1/adapters/{name}", remove_adapter, 404, method="DELETE")
    add("/v1/adapters/{name}/aliases/{alias}", set_alias, 400, 404, 409, method="PUT")
    add("/v1/adapters/{name}/comparison", comparison, 404)
    add("/v1/adapters/{name}/rollback", rollback, 400, 404, 409, method="POST")
    add("/v1/events", events, response_class=EventStream)
    add("/v1/load_lora_adapter", load_lora_adapter, 400, 404, 409, method="POST", response_class=PlainTextResponse)
    add("/v1/unload_lora_adapter", unload_lora_adapter, 400, 404, method="POST", response_class=PlainTextResponse)
    router.add_api_route("/openapi.json", openapi, methods=["GET"], include_in_schema=False)
    return router


async def ready(known: Known) -> JSONResponse:
    """200 when every adapter named at start is loaded or refused, and every alias of before a restart answers."""
    if not known.converged:
        reason = "adapters are being loaded" if known.caught_up else "the shared store was not looked at yet"
        return PlainJSON({"status": "starting", "reason": reason}, 503, {"Retry-After": "1"})
    refused = sorted({waiting.candidate.run for waiting in known.waiting.values() if waiting.state == "refused"})
    return PlainJSON({"status": "ready", "adapters": sorted(known.runs), "refused": refused})


async def metrics(request: Request) -> Response:
    """The engine's own metrics and lorakit's, in Prometheus' text format."""
    return Exposition(await request.app.state.metrics.exposition())


async def models(known: Known) -> dict[str, Any]:
    """The base first, then every alias and every revision that a request may name."""
    return {"object": "list", "data": model_cards(known)}


async def model(known: Known, model: str) -> dict[str, Any]:
    """One model by any of its names."""
    revision = known.resolve(model)
    cards = {card["id"]: card for card in model_cards(known)}
    if model in cards:
        return cards[model]
    assert revision is not None  # the base is among the cards
    return {**cards[revision.name], "id": model}


async def adapters(known: Known, revisions: Most | None = None) -> dict[str, Any]:
    """Every name: its revisions, or so many of the newest, their state and what is known of them."""
    names = sorted({*known.runs, *(waiting.candidate.run for waiting in known.waiting.values())})
    return {"object": "list", "data": [adapter_view(known, name, revisions) for name in names]}


async def adapter(known: Known, name: str, revisions: Most | None = None, skip: Most = 0) -> dict[str, Any]:
    """One name, and what a rollback of it would lead to; all of its revisions, or so many of the newest, but for the
    very newest `skip`."""
    if name not in known.runs and all(waiting.candidate.run != name for waiting in known.waiting.values()):
        raise NotFound(f"there is no adapter '{name}'")
    previous = await known.rolled_back(known.runs[name]) if name in known.runs else None
    return {**adapter_view(known, name, revisions, skip), "previous": previous.name if previous else None}


async def add_adapter(request: Request, whole: Administered, new: NewAdapter) -> dict[str, Any]:
    """Take an adapter in and point the name at it; a name that exists gets a new revision."""
    rights_of(request.scope).refuse_name(new.name)
    if is_address(new.source):
        async with request.app.state.fetching.fetched(new.source) as folder:
            await whole.load(new.name, folder, shown=without_secrets(new.source))
    else:
        await whole.load(new.name, await file_work(permitted, whole.settings, new.source, rights_of(request.scope)))
    return adapter_view(whole, new.name)


async def remove_adapter(known: Known, whole: Administered, name: str) -> dict[str, Any]:
    """Serve a name no longer; what is in flight is finished first."""
    known.run_named(name)
    await whole.unload(name)
    return {"id": name, "object": "adapter", "deleted": True}


async def set_alias(known: Known, whole: Administered, name: str, alias: str, target: NewTarget) -> dict[str, Any]:
    """Point an alias at a revision, or have several share it, for the next request on."""
    known.run_named(name)
    if target.revision is not None and not target.shadow:
        await whole.set_alias(name, alias, target.revision)
    else:
        shares = [(one.revision, one.share) for one in target.shares or ()] or [(target.revision or "", 1.0)]
        await whole.splitting.set(name, alias, NewSplit(shares, target.shadow, target.seed))
    return adapter_view(known, name)


async def comparison(request: Request, known: Known, name: str) -> dict[str, Any]:
    """How the revisions that share a name answer, and its shadows: latency, errors, lengths, agreement; without a
    split, those that answered lately."""
    run = known.run_named(name)
    return {"object": "comparison", "name": name, "revisions": request.app.state.reconciler.comparison.of(run)}


async def rollback(known: Known, whole: Administered, name: str) -> dict[str, Any]:
    """Point the name at what it pointed at before, and keep it there."""
    known.run_named(name)
    await whole.rollback(name)
    return adapter_view(known, name)


async def events(request: Request, known: Known, last_event_id: Annotated[str | None, Header()] = None) -> EventStream:
    """What happens, as server-sent events; `Last-Event-ID` takes up where a connection broke."""
    keyring, rights = request.app.state.keyring, rights_of(request.scope)
    number = int(last_event_id) if last_event_id and re.fullmatch("[0-9]{1,15}", last_event_id) else 0

    async def stream() -> AsyncIterator[str]:
        async for event in known.events.since(number):
            if not keyring.counts(rights):  # this answer has no end of its own
                return
            yield event.as_sse() if event else ": still here\n\n"

    return EventStream(stream(), headers={"Cache-Control": "no-cache"})


async def load_lora_adapter(request: Request, whole: Administered, asked: LoadRequest) -> Response:
    """As vLLM's, but a name that exists gets a new revision, and no answer is ever half of each."""
    name, path = asked.lora_name, asked.lora_path
    if not name or not path:
        return error_response(400, "InvalidUserInput", "Both 'lora_name' and 'lora_path' must be provided.")
    rights_of(request.scope).refuse_name(name)
    folder = await file_work(permitted, whole.settings, path, rights_of(request.scope))
    if not await file_work(folder.is_dir):
        return error_response(404, "NotFoundError", f"Loading lora {name} failed: No adapter found for {path}")
    await whole.load(name, folder)
    return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")


async def unload_lora_adapter(known: Known, whole: Administered, request: UnloadRequest) -> Response:
    """As vLLM's, but it frees the engine."""
    name = request.lora_name
    if not name:
        return error_response(400, "InvalidUserInput", "'lora_name' needs to be provided to unload a LoRA adapter.")
    if name not in known.runs:
        return error_response(404, "NotFoundError", f"The lora adapter '{name}' cannot be found.")
    await whole.unload(name)
    return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")


async def openapi(request: Request, known: Known) -> dict[str, Any]:
    """The engine's own description with lorakit's routes in it, for `/docs`."""
    own = whole_description(request.app.openapi())
    theirs = await known.engine.describe()
    if not theirs.get("paths"):
        return own
    schemas = {
        **theirs.get("components", {}).get("schemas", {}),
        **own.get("components", {}).get("schemas", {}),
    }
    return {
        **theirs,
        "paths": {**theirs.get("paths", {}), **own["paths"]},
        "components": {**theirs.get("components", {}), "schemas": schemas},
    }


async def _failed(_: Request, error: Exception) -> JSONResponse:
    status, kind = next((status, kind) for type_, status, kind in STATUS if isinstance(error, type_))
    return error_response(status, kind, str(error))


async def _invalid(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    return error_response(400, "BadRequestError", f"{place}: {first['msg']}", place)


async def _http_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    kind = "NotFoundError" if error.status_code == 404 else "BadRequestError"
    return error_response(error.status_code, kind, error.detail)
