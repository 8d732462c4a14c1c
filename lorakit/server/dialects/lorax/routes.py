"""`/`, `/generate`, `/generate_stream` and `/info`, as LoRAX's clients ask them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from lorakit import __version__
from lorakit.errors import LorakitError
from lorakit.server.access.rights import rights_of
from lorakit.server.access.seen import seen_by
from lorakit.server.described import EVERYWHERE, Answers, errors
from lorakit.server.dialects.lorax.answer import Failed, invalid
from lorakit.server.dialects.lorax.request import COMPLETIONS, MOST_OF, Generate, Invalid, as_openai, path_of
from lorakit.server.dialects.lorax.sources import Sources
from lorakit.server.dialects.lorax.telling import Telling
from lorakit.server.dialects.lorax.vocabulary import Vocabulary, read_vocabulary
from lorakit.server.following.reconciler import Reconciler
from lorakit.server.following.residency import NoSlot
from lorakit.server.mixes.making import MixNotMade
from lorakit.server.requests.answers import PlainJSON
from lorakit.server.requests.asking import Asking, replayed, with_length
from lorakit.server.requests.exchange import CLIENT_LEFT
from lorakit.server.requests.models import ClientLeft, read_body


class Lorax:
    """Puts each request to `asking` as OpenAI's would be, and sends LoRAX's answer back."""

    def __init__(self, reconciler: Reconciler, asking: Asking) -> None:
        self.reconciler = reconciler
        self._asking = asking
        self._sources = Sources(reconciler)
        self._vocabulary: asyncio.Task[Vocabulary] | None = None

    async def answer(
        self, request: Generate, scope: Scope, receive: Receive, send: Send, *, stream: bool, many: bool
    ) -> None:
        """`many`: in a list."""
        given, base = request.parameters, self.reconciler.engine.limits.base
        try:
            if stream:
                request.refuse_in_stream()
            vocabulary = await self._vocabulary_of_base()
            if given.return_k_alternatives and not vocabulary.reads:
                raise Invalid("`return_k_alternatives`: the base has no tokenizer.json to read them by")
            rights = rights_of(scope)
            seen = seen_by(self.reconciler, rights)
            model = await self._sources.model_of(seen, given, rights)
            asked = as_openai(request, model, await self._most(request), stream=stream)
        except LorakitError as error:
            await error_answer(error)(scope, receive, send)
            return
        body = json.dumps(asked.body).encode()
        inner = {
            **with_length(scope, len(body)), "path": asked.path, "raw_path": asked.path.encode(), "query_string": b"",
            "root_path": "",
        }  # fmt: skip
        telling = Telling(request, vocabulary, base, send, stream=stream, many=many)
        await self._asking.answer(inner, replayed(body, receive), telling.send, asked.path)

    async def _most(self, request: Generate) -> int | None:
        """The tokens that an answer may have; where nothing is said, all that there is room for: None where that is
        vLLM's own default.

        Raises:
            Invalid: there is room for none.
            Failed: the engine does not count.
        """
        given = request.parameters
        if given.max_new_tokens is not None or path_of(request) != COMPLETIONS:
            return given.max_new_tokens
        engine = self.reconciler.engine
        status, body = await engine.call("POST", "/tokenize", {"model": engine.limits.base, "prompt": request.inputs})
        try:
            told = json.loads(body)
            count, room = int(told["count"]), int(told["max_model_len"])
        except (ValueError, LookupError, TypeError):
            raise Failed(f"the tokens of `inputs` could not be counted: status {status}", 424, "generation") from None
        left = room - min(count, given.truncate or count)
        if left < 1:
            raise Invalid(f"`inputs` has {count} tokens, and with the answer there is room for {room}")
        return left

    async def _vocabulary_of_base(self) -> Vocabulary:
        """Read once, for all who ask meanwhile."""
        if self._vocabulary is None:
            self._vocabulary = asyncio.create_task(asyncio.to_thread(read_vocabulary, self.reconciler.base.folder))
        return await asyncio.shield(self._vocabulary)


def error_answer(error: LorakitError) -> Response:
    """In LoRAX's shape; a server that has no place for it now says when to ask again."""
    if isinstance(error, (NoSlot, MixNotMade)):
        error = Failed(str(error), 503, "overloaded")
    elif not isinstance(error, Failed):
        error = invalid(str(error))
    return PlainJSON(error.as_dict(), error.status, {"Retry-After": "2"} if error.status == 503 else None)


class LoraxRoute(APIRoute):
    """A route that reads no more of a body than the server allows, and whose errors are LoRAX's."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handled(request: Request) -> Response:
            most = request.app.state.reconciler.settings.max_body * 2**20
            try:
                body = await read_body(request.scope, request.receive, most)
                return await handle(Request(request.scope, replayed(body, request.receive)))
            except ClientLeft:
                return Response(status_code=CLIENT_LEFT)
            except RequestValidationError as error:
                return error_answer(invalid(_first_of(error)))
            except HTTPException as error:
                return error_answer(invalid(str(error.detail)))
            except LorakitError as error:
                return error_answer(error)

        return handled


def _first_of(error: RequestValidationError) -> str:
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"][1:])
    message = str(first["msg"]).removeprefix("Value error, ")
    return f"`{place}`: {message}" if place and first["type"] != "json_invalid" else message


class _Answer(Response):
    """One that is sent as it is made."""

    def __init__(self, lorax: Lorax, asked: Generate, *, stream: bool, many: bool) -> None:
        super().__init__()
        self._lorax, self._asked = lorax, asked
        self._stream, self._many = stream, many

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._lorax.answer(self._asked, scope, receive, send, stream=self._stream, many=self._many)


def _lorax(request: Request) -> Lorax:
    found: Lorax = request.app.state.lorax
    return found


Known = Annotated[Lorax, Depends(_lorax)]


class LoraxError(BaseModel):
    """What was wrong, and of which kind: validation, generation, overloaded or incomplete_generation."""

    error: str
    error_type: str


_EVENTS: dict[str, Any] = {"text/event-stream": {}}
_GENERATED = {"type": "object", "required": ["generated_text"]}
_TEXT = {"application/json": {"schema": _GENERATED}}
_TEXTS = {"application/json": {"schema": {"type": "array", "items": _GENERATED}}}
ERRORS: Answers = {
    **errors(401, 403),
    422: {"model": LoraxError, "description": "The request can't be answered as it is"},
    424: {"model": LoraxError, "description": "The engine failed"},
    429: {"description": "There are more requests than may be", "content": {"application/json": {}}},
    500: {"model": LoraxError, "description": "The answer broke off"},
    503: {"description": "No engine answers, or none has a place", "content": {"application/json": {}}},
}


def lorax_router() -> APIRouter:
    router = APIRouter(tags=["LoRAX"], route_class=LoraxRoute)

    def add(path: str, endpoint: Callable[..., Any], content: dict[str, Any]) -> None:
        answers: Answers = {200: {"description": "What was generated", "content": content}, **ERRORS}
        router.add_api_route(path, endpoint, methods=["POST"], response_class=Response, responses=answers)

    add("/", generate_either, {**_TEXTS, **_EVENTS})
    add("/generate", generate, _TEXT)
    add("/generate_stream", generate_stream, _EVENTS)
    router.add_api_route("/info", info, methods=["GET"], responses=EVERYWHERE)
    return router


async def generate_either(lorax: Known, asked: Generate) -> Response:
    """LoRAX's: with `stream` token by token, else a list of one text."""
    return _Answer(lorax, asked, stream=asked.stream, many=True)


async def generate(lorax: Known, asked: Generate) -> Response:
    """LoRAX's: one text."""
    return _Answer(lorax, asked, stream=False, many=False)


async def generate_stream(lorax: Known, asked: Generate) -> Response:
    """LoRAX's: token by token, as server-sent events."""
    return _Answer(lorax, asked, stream=True, many=False)


async def info(lorax: Known) -> dict[str, Any]:
    """What is served, in LoRAX's words; null is what has no meaning here."""
    known = lorax.reconciler
    room = known.engine.model_card().get("max_model_len")
    config = known.base.config
    return {
        "model_id": known.engine.limits.base,
        "model_sha": None,
        "model_dtype": config.get("dtype") or config.get("torch_dtype"),
        "model_device_type": None,
        "model_pipeline_tag": "text-generation",
        "max_concurrent_requests": known.settings.max_requests or None,
        "max_best_of": MOST_OF,
        "max_stop_sequences": None,
        "max_input_length": room - 1 if isinstance(room, int) else None,
        "max_total_tokens": room,
        "waiting_served_ratio": None,
        "max_batch_total_tokens": None,
        "max_waiting_tokens": None,
        "validation_workers": None,
        "eager_prefill": None,
        "version": f"lorakit {__version__}, {known.engine.limits.engine}",
        "sha": None,
        "docker_label": None,
        "request_logger_url": None,
        "embedding_model": False,
    }
