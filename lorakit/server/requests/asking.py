"""The way of a request for a model: read once, admitted, resolved, counted in, handed on, named, and counted out."""

from __future__ import annotations

from collections.abc import Awaitable
from contextlib import ExitStack, suppress
from typing import Any

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from lorakit.errors import LorakitError, NotFound, Refused
from lorakit.server.access.rights import rights_of
from lorakit.server.access.seen import seen_by
from lorakit.server.engines.engine import Answering, LoadFailed, Unreached
from lorakit.server.following.reconciler import Reconciler
from lorakit.server.following.residency import NoSlot
from lorakit.server.following.served import Served
from lorakit.server.following.turns import Resident
from lorakit.server.mixes.making import MixNotMade, MixRefused
from lorakit.server.mixes.text import OPENS
from lorakit.server.requests.answers import error_response, unavailable
from lorakit.server.requests.exchange import Exchange, header
from lorakit.server.requests.limits import InFlight, TooMany
from lorakit.server.requests.models import (
    Asked,
    BadBody,
    ClientLeft,
    NoModel,
    NoObject,
    TooLarge,
    is_form,
    is_json,
    read_body,
    read_form,
    read_json,
)
from lorakit.server.requests.naming import named_answer, with_mix_error
from lorakit.server.requests.patience import Patience
from lorakit.server.requests.stored_responses import PATH as RESPONSES
from lorakit.server.requests.stored_responses import NoResponse, Spend, StoredResponses, is_of_stored
from lorakit.server.requests.templates import OwnTemplates
from lorakit.server.requests.usage import asking_for_usage
from lorakit.server.sharing.choosing import asker_of
from lorakit.server.sharing.shadows import Shadows
from lorakit.store.catalog import Revision
from lorakit.store.mixes import RUN as MIXES
from lorakit.store.names import split_model

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
BASE_IF_NONE = frozenset({"/tokenize", "/detokenize", "/v1/audio/transcriptions", "/v1/audio/translations"})

MODEL_ROUTES = WITH_MODEL | BASE_IF_NONE

REFUSALS: tuple[tuple[type[LorakitError], int, str, str | None], ...] = (
    (NoResponse, 404, "NotFoundError", None),
    (NotFound, 404, "NotFoundError", "model"),
    (TooLarge, 413, "BadRequestError", None),
    (TooMany, 429, "RateLimitError", None),
    (NoSlot, 503, "ServiceUnavailableError", None),
    (Unreached, 503, "ServiceUnavailableError", None),
    (MixNotMade, 503, "ServiceUnavailableError", None),
    (MixRefused, 422, "UnprocessableEntityError", "model"),
    (Refused, 400, "BadRequestError", "model"),
    (NoModel, 400, "BadRequestError", "model"),
    (BadBody, 400, "BadRequestError", None),
)  # fmt: skip


REFUSED = tuple(type_ for type_, *_ in REFUSALS)


class Asking:
    """Answers what names a model, or might. `spend` is told what a key used after its request had ended."""

    def __init__(self, reconciler: Reconciler, spend: Spend) -> None:
        settings = reconciler.settings
        self._reconciler = reconciler
        self._engine = reconciler.engine
        self._in_flight = InFlight(
            settings.max_requests, settings.max_requests_per_key, settings.max_requests_per_adapter
        )
        self._stored = StoredResponses(reconciler.engine, spend)
        self._templates = OwnTemplates()
        self._shadows = Shadows(reconciler, self._members)

    async def close(self) -> None:
        await self._shadows.close()
        await self._stored.close()

    def takes(self, scope: Scope, path: str) -> bool:
        """Whether a request may name a model, or is about an answer of one."""
        if is_of_stored(path):
            return bool(scope["method"] != "OPTIONS")
        return scope["method"] == "POST" and (path in WITH_MODEL or is_json(scope) or is_form(scope))

    async def answer(self, scope: Scope, receive: Receive, send: Send, path: str) -> None:
        """Answer one request, and tell what is known of it when that has ended."""
        if is_of_stored(path):
            try:
                await self._stored.answer(scope, receive, send, path)
            except Unreached as error:
                await _refusal(error)(scope, receive, send)
            return
        exchange = Exchange(scope, receive, send, path)
        try:
            async with Patience(self._reconciler.settings.request_timeout, exchange) as patience:
                try:
                    await self._answer(scope, exchange, patience)
                except ClientLeft:
                    pass
                except REFUSED as error:
                    await _refusal(error)(scope, patience.receive, patience.send)
        finally:
            self._reconciler.answered(exchange.answered())

    async def _answer(self, scope: Scope, exchange: Exchange, patience: Patience) -> None:
        rights = rights_of(scope)
        known = seen_by(self._reconciler, rights)
        with ExitStack() as leaving:
            # where lorakit has no keys, something before it may have some
            client = rights.key or header(scope, b"authorization").decode("latin-1")
            leaving.enter_context(self._in_flight.from_client(client))
            body = await read_body(scope, patience.receive, self._reconciler.settings.max_body * 2**20)
            asked = _read(scope, body, exchange.path)
            if asked is not None and not self._reconciler.settings.trust_request_chat_template:
                refuse_template(asked)
            if asked is None or (model := self._model_of(asked, exchange.path)) is None:
                await self._engine.answer(scope, replayed(body, patience.receive), patience.send)
                return
            exchange.model = model
            if exchange.path == RESPONSES:
                self._stored.refuse_others(asked.said.get("previous_response_id"), rights)
            adapter = MIXES if model.startswith(OPENS) else split_model(model)[0]
            if adapter == MIXES or known.has(adapter):  # of others nobody is to learn how busy they are
                leaving.enter_context(self._in_flight.to_adapter(adapter))
            asker = known.asker_for(model, asker_of(exchange.path, asked.said, rights.key))
            question = [asked]
            del asked, body  # large ones are not kept for as long as the answer takes
            for again in (True, False):
                held = leaving.enter_context(ExitStack())
                try:
                    await self._hand_on(scope, exchange, patience, question, known, asker, leaving, held)
                    return
                except Unreached:
                    if not (again and question):
                        raise
                    held.close()  # another engine may have it, or can have it

    async def _hand_on(
        self, scope: Scope, exchange: Exchange, patience: Patience, question: list[Asked], known: Served,
        asker: str | int | None, leaving: ExitStack, held: ExitStack,
    ) -> None:  # fmt: skip
        """To an engine that can answer it. `question` is emptied when the answer begins; `held` is what is counted for
        this engine, and in `leaving`, which is all that is counted for the request.

        Raises:
            Unreached: that engine is gone.
        """
        asked, rights, begun = question[0], rights_of(scope), exchange.seconds
        revision, resident = await self._acquire(exchange.model, known, asker)
        if resident is not None:
            held.callback(self._reconciler.residency.done, resident)
        engine = resident.engine if resident is not None else self._engine
        exchange.revision, exchange.waited = revision, exchange.seconds - begun
        members = await self._members(exchange.path, asked, revision, resident)
        if rights.allowance.tokens and (usage := asking_for_usage(exchange.path, asked)):
            exchange.hide_usage()
            members |= usage
        body = asked.naming(members)
        background = bool(asked.said.get("background"))
        receive = replayed(body, patience.receive)
        scope = with_length(scope, len(body))
        mirrored = self._shadows.mirrored(scope, exchange, asked, len(body))
        del asked, body
        if not patience.over:
            send, found = self._named(patience, engine, revision, resident, rights.key)
            send = send if mirrored is None else mirrored.heard.hearing(send)
            try:
                await engine.answer(scope, receive, emptying(question, send))
                if exchange.went_wrong and not await engine.alive(now=True):
                    exchange.engine_ended = True
            finally:
                if found and background:
                    self._stored.hold(found[0], leaving.pop_all())
        if mirrored is not None:
            self._shadows.begin(mirrored)

    def _model_of(self, asked: Asked, path: str) -> str | None:
        """None where it names none, and need not.

        Raises:
            NoModel: it has to.
        """
        model = asked.model
        if model is None and path in BASE_IF_NONE:
            return self._engine.limits.base
        if model is None and path not in WITH_MODEL:
            return None
        if not isinstance(model, str) or not model:
            raise NoModel("the body has to be a JSON object with a string `model`")
        return model

    async def _acquire(
        self, model: str, known: Served, asker: str | int | None
    ) -> tuple[Revision | None, Resident | None]:
        """The revision that a model means now to who asks and sees `known`, counted in: between them nothing else runs.

        Raises:
            NotFound: there is none.
            NoSlot: it is not in the engine, and no slot became free.
            Refused: a mix that can't be read; MixRefused one that can't be served.
        """
        reconciler = self._reconciler
        while True:
            mixed = model.startswith(OPENS)
            revision = await known.mixes.revision_for(model) if mixed else known.resolve(model, asker)
            if revision is None:
                return None, None
            resident = reconciler.residency.use(revision.name)
            if resident is not None:
                reconciler.requests[revision.id] = reconciler.requests.get(revision.id, 0) + 1
                return revision, resident
            with suppress(LoadFailed):  # it counts no more: look again
                await reconciler.bring_in(revision)

    async def _members(
        self, path: str, asked: Asked, revision: Revision | None, resident: Resident | None
    ) -> dict[str, Any]:
        """What is not handed on as it came: the engine's name, and a chat template where the adapter has its own."""
        if revision is None or resident is None:
            return {"model": self._engine.limits.base}
        template = await self._templates.of(revision, tools=bool(asked.said.get("tools")))
        own = {} if template is None else resident.engine.templated(path, asked.said, template)
        return {"model": resident.engine_name, **own}

    def _named(
        self, patience: Patience, engine: Answering, revision: Revision | None, resident: Resident | None, key: str
    ) -> tuple[Send, list[str]]:
        """The way of the answer; for one that is stored, its id as soon as it has said it."""
        base = self._engine.limits.base
        name, engine_name = revision.name if revision else base, resident.engine_name if resident else base
        send = with_mix_error(_or_unavailable(engine, patience.send), self._reconciler.mixes.error_of(revision))
        send = named_answer(send, name, engine_name)
        if patience.path != RESPONSES:
            return send, []
        return self._stored.listening(send, engine, name, engine_name, key)


_OF_THE_BODY = (b"content-length", b"transfer-encoding")


def with_length(scope: Scope, length: int) -> Scope:
    """The same request with a body of another length."""
    headers = [(key, value) for key, value in scope["headers"] if key not in _OF_THE_BODY]
    return {**scope, "headers": [*headers, (b"content-length", str(length).encode())]}


def _read(scope: Scope, body: bytes, path: str) -> Asked | None:
    """What a body says; None where it can't name a model, and need not.

    Raises:
        BadBody: it can't be read.
    """
    if path in WITH_MODEL or not is_form(scope):
        try:
            return None if path not in WITH_MODEL and not body else read_json(body)
        except NoObject:
            if path in WITH_MODEL or path in BASE_IF_NONE:
                raise
            return None
    return read_form(scope, body)


def refuse_template(asked: Asked) -> None:
    """Raises BadBody where a client brings a chat template, which is a program."""
    inside = asked.said.get("chat_template_kwargs")
    if asked.said.get("chat_template") or (isinstance(inside, dict) and inside.get("chat_template")):
        raise BadBody(
            "a chat template of a client's own is not taken here, unless the server is started with "
            "-- --trust-request-chat-template"
        )


def _refusal(error: LorakitError) -> Response:
    _, status, kind, param = next(refusal for refusal in REFUSALS if isinstance(error, refusal[0]))
    return error_response(status, kind, str(error), param, after=error.after if isinstance(error, TooMany) else None)


def replayed(body: bytes, receive: Receive) -> Receive:
    """The body once, then what the client does next: a disconnect has to reach the engine."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay


def emptying(question: list[Asked], send: Send) -> Send:
    """Lets go of what was asked as soon as it is being answered."""

    def sent(message: Message) -> Awaitable[None]:
        question.clear()
        return send(message)

    return sent


def _or_unavailable(engine: Answering, send: Send) -> Send:
    """Says 503 in place of the 500 of an engine that ended meanwhile: to ask again is right."""
    ended = False

    async def failed(message: Message) -> None:
        nonlocal ended
        if await engine.alive(now=True):
            await send(message)
            return
        ended = True
        await unavailable("the engine ended while it answered")({"type": "http"}, _nothing, send)

    def sent(message: Message) -> Awaitable[None]:
        if message["type"] == "http.response.start" and message["status"] >= 500:
            return failed(message)
        return _dropped() if ended else send(message)

    return sent


async def _dropped() -> None:
    """What is left of an answer that another took the place of."""


async def _nothing() -> Message:
    raise RuntimeError("an error reads no body")
