"""Revisions that answer as well, for nobody: after the client has its answer, so that they neither change nor delay it.

They take what room is left: no more than `AT_ONCE` are asked, none waits for a slot that others want, and what there is
no room for is dropped, and counted.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from starlette.types import Message, Receive, Scope, Send

from lorakit.errors import LorakitError
from lorakit.server.engines.engine import LoadFailed
from lorakit.server.following.guard import failed
from lorakit.server.following.residency import NoSlot
from lorakit.server.following.served import Served
from lorakit.server.following.turns import Resident
from lorakit.server.requests.answered import Answered, Shadowed
from lorakit.server.requests.exchange import Exchange
from lorakit.server.requests.patience import Patience
from lorakit.server.requests.usage import asking_for_usage
from lorakit.server.sharing.texts import Texts, agreement_of, texts_in
from lorakit.server.sight.request_id import HEADER as REQUEST_ID
from lorakit.store.catalog import Revision

if TYPE_CHECKING:
    from lorakit.server.requests.models import Asked

PATHS = frozenset({"/v1/completions", "/v1/chat/completions", "/v1/messages"})  # what is asked twice and does no harm
AT_ONCE = 8
LARGEST = 1 << 20  # bytes of a request that is kept for them
HEARD = 1 << 18  # bytes of an answer that is kept to be compared
PATIENCE = 300.0  # seconds that an answer may take, where requests have no limit

Members = Callable[[str, "Asked", Revision, Resident], Awaitable[dict[str, Any]]]


class Heard:
    """An answer as it passes, kept as far as it can be compared."""

    def __init__(self) -> None:
        self._parts: list[bytes] | None = []
        self._left = HEARD

    def hearing(self, send: Send) -> Send:
        async def heard(message: Message) -> None:
            body = message.get("body", b"")
            if self._parts is not None and body:
                self._left -= len(body)
                self._parts.append(body)
                self._parts = self._parts if self._left >= 0 else None
            await send(message)

        return heard

    @property
    def texts(self) -> Texts | None:
        """None where they are not known, or too long."""
        return texts_in(b"".join(self._parts)) if self._parts is not None else None


@dataclass(frozen=True, slots=True)
class Mirrored:
    """A request that shadows are to answer as well, and what its client is answered."""

    scope: Scope
    asked: Asked
    exchange: Exchange
    shadows: tuple[Revision, ...]
    heard: Heard = field(default_factory=Heard)


class Shadows:
    """`members` says what to put into a request for a revision."""

    def __init__(self, known: Served, members: Members) -> None:
        self._known = known
        self._members = members
        self._under_way: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        for task in self._under_way:
            task.cancel()
        await asyncio.gather(*self._under_way, return_exceptions=True)

    def mirrored(self, scope: Scope, exchange: Exchange, asked: Asked, size: int) -> Mirrored | None:
        """A request of so many bytes, where there are shadows for it; None for most."""
        found = self._known.split_of(exchange.model)
        if found is None or not found[2].shadows or exchange.path not in PATHS:
            return None
        run, _, split = found
        shadows = tuple(run.revisions[id] for id in split.shadows if id in run.revisions)
        if size > LARGEST:
            self._drop(exchange.model, shadows)
            return None
        return Mirrored(scope, asked, exchange, shadows)

    def begin(self, mirrored: Mirrored) -> None:
        """Its client has been answered: ask the shadows, if that went well."""
        if not mirrored.exchange.ended or failed(mirrored.exchange.answered()) is not False:
            return
        for revision in mirrored.shadows:
            if len(self._under_way) >= AT_ONCE:
                self._drop(mirrored.exchange.model, [revision])
                continue
            task = asyncio.create_task(self._ask(mirrored, revision))
            self._under_way.add(task)
            task.add_done_callback(self._under_way.discard)

    async def _ask(self, mirrored: Mirrored, revision: Revision) -> None:
        model, heard = mirrored.exchange.model, Heard()
        resident = await self._resident(revision)
        if resident is None:
            self._drop(model, [revision])
            return
        try:
            answer = await self._answer(mirrored, revision, resident, heard)
        except (LorakitError, OSError):  # a template that the engine does not take, or that is gone
            self._drop(model, [revision])
            return
        finally:
            self._known.residency.done(resident)
        agreement, bad = None, failed(answer)
        if bad and not await resident.engine.alive(now=True):  # which says nothing of the revision
            self._drop(model, [revision])
            return
        if bad is False:
            told, said = mirrored.heard.texts, heard.texts
            agreement = agreement_of(said, told) if said is not None and told is not None else None
        self._tell(Shadowed(model, revision, answer, agreement))

    async def _resident(self, revision: Revision) -> Resident | None:
        """Where it is, counted in; None where it has no place, or would have to take another's."""
        known = self._known
        if known.residency.find(revision.name) is None and known.residency.has_room and known.is_known(revision):
            with suppress(LoadFailed, NoSlot):
                await known.bring_in(revision)
        return known.residency.use(revision.name)

    async def _answer(self, mirrored: Mirrored, revision: Revision, resident: Resident, heard: Heard) -> Answered:
        known, path, asked = self._known, mirrored.exchange.path, mirrored.asked
        members = await self._members(path, asked, revision, resident)
        body = asked.naming({**members, **asking_for_usage(path, asked)})
        scope = _again(mirrored.scope, mirrored.exchange.request_id, len(body))
        exchange = Exchange(scope, _once(body), heard.hearing(_nowhere), path)
        exchange.model, exchange.revision = mirrored.exchange.model, revision
        async with Patience(known.settings.request_timeout or PATIENCE, exchange) as patience:
            with suppress(Exception):  # of the engine's own: what has no end counts as an error
                await resident.engine.answer(scope, patience.receive, patience.send)
        return exchange.answered() if exchange.ended else replace(exchange.answered(), broke=True)

    def _drop(self, model: str, revisions: Iterable[Revision]) -> None:
        for revision in revisions:
            self._tell(Shadowed(model, revision))

    def _tell(self, shadowed: Shadowed) -> None:
        for observer in self._known.shadow_observers:
            observer(shadowed)


_NOT_ITS_OWN = (b"content-length", b"transfer-encoding", b"traceparent", b"tracestate", REQUEST_ID)


def _again(scope: Scope, request_id: str, length: int) -> Scope:
    """The same request, asked once more under an id of its own and with another body."""
    own = [(b"content-length", str(length).encode()), (REQUEST_ID, f"{request_id}-{uuid.uuid4().hex[:8]}".encode())]
    kept = [(name, value) for name, value in scope["headers"] if name not in _NOT_ITS_OWN]
    return {**scope, "headers": [*kept, *own], "state": dict(scope.get("state", {}))}


def _once(body: bytes) -> Receive:
    """The body, and then a client that neither says more nor goes away."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        return messages.pop() if messages else await asyncio.get_running_loop().create_future()

    return receive


async def _nowhere(message: Message) -> None:
    pass
