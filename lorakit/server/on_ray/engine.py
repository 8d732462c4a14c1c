"""All replicas as one engine, as the gateway sees them: a request goes to the one that Ray chooses for its adapter."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from dataclasses import replace
from typing import Any, Protocol

from starlette.types import Message, Receive, Scope, Send

from lorakit.errors import EngineFailed
from lorakit.server.engines.engine import Limits, Unreached
from lorakit.server.engines.vllm import (
    COMPLETIONS,
    OF_DEVELOPERS,
    WAYS_AROUND,
    described,
    templated_over_http,
    wrong_with_first_token,
)
from lorakit.server.following.residency import NoSlot
from lorakit.server.on_ray.hosted import Piece
from lorakit.server.on_ray.messages import Adapter, Described, Outcome, Question
from lorakit.server.on_ray.roster import Roster
from lorakit.server.requests.models import ClientLeft, read_body
from lorakit.server.requests.naming import REVISION_HEADER

PROFILING = ("/start_profile", "/stop_profile")  # of one replica, which nobody can choose
UNREACHED = 599  # the status of what had no answer


class ReplicaDied(Exception):
    """The replica that a request had been given to is dead; `actor` is Ray's id of its process, where it is known."""

    def __init__(self, actor: str | None) -> None:
        super().__init__(actor or "a replica")
        self.actor = actor


class Replicas(Protocol):
    """One of the replicas, which Ray chooses. All raise ReplicaDied, and NoSlot where too much waits for them."""

    def answer(self, question: Question, adapter: Adapter | None, wait: float) -> AsyncGenerator[Piece, None]: ...

    async def call(
        self, method: str, path: str, body: Any, adapter: Adapter | None, wait: float
    ) -> tuple[int, bytes] | Outcome: ...


class RayEngine:
    """`wait`: seconds that a request waits for its adapter in a replica. `max_body`: bytes of one."""

    def __init__(
        self, replicas: Replicas, described: Described, roster: Roster, *, wait: float = 60.0, max_body: int = 2**28
    ) -> None:
        self._replicas = replicas
        self._described = described
        self._wait = wait
        self._max_body = max_body
        self.roster = roster

    def holding(self, adapter: Adapter) -> HeldEngine:
        """The same, for requests about an adapter."""
        return HeldEngine(self, adapter)

    @property
    def limits(self) -> Limits:
        """Of all replicas together."""
        one, count = self._described.offered.limits, len(self.roster.members)
        if count < 2:
            return replace(one, memory=self._described.places)
        name = f"{count} x {one.engine}"
        return replace(one, slots=one.slots * count, memory=self._described.places * count, engine=name)

    async def try_out(self, name: str) -> str | None:
        return await wrong_with_first_token(self.call, name) if self.serves(COMPLETIONS) else None

    async def call(self, method: str, path: str, body: Any) -> tuple[int, bytes]:
        return await self.call_for(method, path, body, None)

    async def call_for(self, method: str, path: str, body: Any, adapter: Adapter | None) -> tuple[int, bytes]:
        """As `call`, about an adapter; 599 with the reason where there was no answer."""
        try:
            answer = await self._replicas.call(method, path, body, adapter, self._wait)
        except ReplicaDied as died:
            self._is_dead(died)
            answer = Outcome("unreached", "the replica is gone that was asked")
        except NoSlot as error:
            answer = Outcome("no slot", str(error))
        return (UNREACHED, answer.words.encode()) if isinstance(answer, Outcome) else answer

    async def alive(self, *, now: bool = False) -> bool:
        return bool(self.roster.members)

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.answer_for(scope, receive, send, None)

    async def answer_for(self, scope: Scope, receive: Receive, send: Send, adapter: Adapter | None) -> None:
        """Hand a request on; where the client leaves, it ends in the replica too.

        Raises:
            Unreached: no replica began to answer it.
            NoSlot: its adapter could not come in.
            EngineFailed: the replica died while it answered: what is cut off there is cut off here.
        """
        try:
            body = await read_body(scope, receive, self._max_body)
        except ClientLeft:
            return
        begun = asyncio.Event()
        exchange = asyncio.create_task(self._exchange(_question(scope, body), adapter, send, begun))
        left, nobody = asyncio.create_task(_left(receive)), asyncio.create_task(self.roster.nobody())
        try:
            await asyncio.wait({exchange, left, nobody}, return_when=asyncio.FIRST_COMPLETED)
            if nobody.done() and begun.is_set():
                await asyncio.wait({exchange, left}, return_when=asyncio.FIRST_COMPLETED)
            if exchange.done():
                exchange.result()
            elif nobody.done() and not left.done():
                raise Unreached("no engine answers")
        finally:
            for task in (exchange, left, nobody):
                task.cancel()
            await asyncio.gather(exchange, left, nobody, return_exceptions=True)

    async def _exchange(self, question: Question, adapter: Adapter | None, send: Send, begun: asyncio.Event) -> None:
        answer = self._replicas.answer(question, adapter, self._wait)
        try:
            async for pieces in answer:
                if isinstance(pieces, Outcome):
                    _raise(pieces)
                    return
                for message in pieces:
                    begun.set()
                    await send(_unnamed(message))
        except ReplicaDied as died:
            self._is_dead(died)
            if begun.is_set():
                raise EngineFailed("the replica died while it answered") from None
            raise Unreached("the replica is gone that was asked") from None
        finally:
            await answer.aclose()

    def _is_dead(self, died: ReplicaDied) -> None:
        if died.actor is not None:
            self.roster.died(died.actor)

    def model_card(self) -> dict[str, Any]:
        return dict(self._described.offered.card)

    def serves(self, path: str) -> bool:
        return path in self._described.offered.paths

    def goes_around(self, path: str) -> bool:
        return path.startswith((*WAYS_AROUND, *OF_DEVELOPERS, *PROFILING))

    def templated(self, path: str, said: Mapping[str, Any], template: str) -> dict[str, Any]:
        return templated_over_http(path, said, template)

    async def metrics(self) -> bytes:
        return await self.roster.metrics()

    async def describe(self) -> dict[str, Any]:
        return await described(self.call)


class HeldEngine:
    """Those replicas that have an adapter, or can have it: what a request for it is answered by."""

    def __init__(self, engine: RayEngine, adapter: Adapter) -> None:
        self._engine = engine
        self._adapter = adapter

    @property
    def limits(self) -> Limits:
        return self._engine.limits

    async def try_out(self, name: str) -> str | None:
        """As an engine's, but that a replica which ends meanwhile says nothing of the adapter: another is asked."""
        statuses: list[int] = []

        async def call(method: str, path: str, body: Any) -> tuple[int, bytes]:
            status, said = await self.call(method, path, body)
            statuses.append(status)
            return status, said

        for _ in range(2):
            wrong = await wrong_with_first_token(call, name) if self.serves(COMPLETIONS) else None
            if wrong is None or statuses[-1] != UNREACHED:
                return wrong
        return None

    async def call(self, method: str, path: str, body: Any) -> tuple[int, bytes]:
        return await self._engine.call_for(method, path, body, self._adapter)

    async def alive(self, *, now: bool = False) -> bool:
        return await self._engine.alive(now=now)

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._engine.answer_for(scope, receive, send, self._adapter)

    def model_card(self) -> dict[str, Any]:
        return self._engine.model_card()

    def serves(self, path: str) -> bool:
        return self._engine.serves(path)

    def goes_around(self, path: str) -> bool:
        return self._engine.goes_around(path)

    def templated(self, path: str, said: Mapping[str, Any], template: str) -> dict[str, Any]:
        return self._engine.templated(path, said, template)

    async def metrics(self) -> bytes:
        return await self._engine.metrics()

    async def describe(self) -> dict[str, Any]:
        return await self._engine.describe()


def _question(scope: Scope, body: bytes) -> Question:
    path: str = scope["path"].removeprefix(scope.get("root_path", ""))
    headers = tuple((name, value) for name, value in scope["headers"])
    return Question(scope["method"], path, scope.get("query_string", b""), headers, body)


def _raise(outcome: Outcome) -> None:
    """What the replica said instead of an answer. It was proven elsewhere, so what one refuses is no fault of it."""
    if outcome.kind == "unreached":
        raise Unreached(outcome.words)
    raise NoSlot(outcome.words)


def _unnamed(message: Message) -> Message:
    """Without the name that the replica gave it, which the gateway knows better."""
    if message["type"] != "http.response.start":
        return message
    return {**message, "headers": [(name, value) for name, value in message["headers"] if name != REVISION_HEADER]}


async def _left(receive: Receive) -> None:
    """Until the client goes away."""
    while (await receive())["type"] != "http.disconnect":
        pass
