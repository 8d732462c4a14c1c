"""One replica's engine with its adapters: what requests and orders do there. Nothing of Ray is needed for it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

from starlette.types import Message, Receive, Scope

from lorakit.errors import LorakitError
from lorakit.server.engines.engine import Engine, LoadFailed, Unreached
from lorakit.server.following.residency import NoSlot, Residency
from lorakit.server.following.turns import Resident
from lorakit.server.on_ray.messages import (
    REPLICA_HEADER,
    Adapter,
    Bring,
    Described,
    Leave,
    Orders,
    Outcome,
    Question,
    Told,
)
from lorakit.server.requests.naming import named_answer

AHEAD = 64  # messages of an answer that wait to be taken

_ENDED = Outcome("unreached", "the engine has ended")

Register = Callable[[str], Awaitable[None]]  # says that requests for an adapter may come here
Piece = list[Message] | Outcome  # of an answer; an outcome, where there is no answer


class Hosted:
    """All methods run on one event loop. `name` is the replica's, `actor` Ray's id of its process."""

    def __init__(
        self, engine: Engine, described: Described, register: Register, *, name: str, actor: str, fair_wait: float = 1.0
    ) -> None:
        self._engine = engine
        self._described = described
        self._register = register
        self.name, self._actor = name, actor
        self._kept: frozenset[str] = frozenset()
        self._pinned: frozenset[str] = frozenset()
        self.residency = Residency(
            engine, kept=lambda one: one in self._kept, pinned=lambda one: one in self._pinned, fair_wait=fair_wait
        )
        self._settled: list[tuple[int, Outcome]] = []
        self._metrics: bytes | None = None
        self._aside: set[asyncio.Task[None]] = set()
        self.in_flight = 0
        self.changed = asyncio.Event()  # there is something to tell

    async def close(self) -> None:
        for task in self._aside:
            task.cancel()
        await asyncio.gather(*self._aside, return_exceptions=True)
        await self.residency.close()

    # requests

    async def answer(self, question: Question, adapter: Adapter | None, wait: float) -> AsyncGenerator[Piece, None]:
        """The messages of an answer, as many at a time as are there. To stop taking them ends the request."""
        self.in_flight += 1
        try:
            try:
                resident = None if adapter is None else await self._counted_in(adapter, wait)
            except LorakitError as error:
                yield _outcome_of(error)
                return
            try:
                async for pieces in self._answered(question, adapter, resident):
                    yield pieces
            finally:
                if resident is not None:
                    self.residency.done(resident)
        finally:
            self.in_flight -= 1

    async def call(
        self, method: str, path: str, body: Any, adapter: Adapter | None, wait: float
    ) -> tuple[int, bytes] | Outcome:
        """Ask one of the engine's own routes, about an adapter where its placeholder is the model."""
        if adapter is None:
            return await self._called(method, path, body)
        try:
            resident = await self._counted_in(adapter, wait)
        except LorakitError as error:
            return _outcome_of(error)
        try:
            if isinstance(body, dict) and body.get("model") == adapter.placeholder:
                body = {**body, "model": resident.engine_name}
            return await self._called(method, path, body)
        finally:
            self.residency.done(resident)

    async def _called(self, method: str, path: str, body: Any) -> tuple[int, bytes] | Outcome:
        status, said = await self._engine.call(method, path, body)
        return _ENDED if status >= 500 and await self._has_ended() else (status, said)

    async def _has_ended(self) -> bool:
        """Whether what answers with an error is an engine that has come to its end, which says nothing of a request."""
        if not await self._engine.alive():
            return True
        return (await self._engine.call("GET", "/health", None))[0] in (503, 599)

    async def _counted_in(self, adapter: Adapter, wait: float) -> Resident:
        """An adapter that is not here yet is loaded first.

        Raises:
            LoadFailed, NoSlot: as `Residency.ensure`.
        """
        await self._register(adapter.id)
        ends = time.monotonic() + wait
        while (resident := self.residency.use(adapter.name)) is None:
            await self.residency.ensure(adapter.name, adapter.folder, wait=max(0.0, ends - time.monotonic()))
        return resident

    async def _answered(
        self, question: Question, adapter: Adapter | None, resident: Resident | None
    ) -> AsyncGenerator[Piece, None]:
        body = question.body
        ready: asyncio.Queue[Message] = asyncio.Queue(AHEAD)
        send: Callable[[Message], Awaitable[None]] = ready.put
        if adapter is not None and resident is not None:
            body = body.replace(adapter.placeholder.encode(), resident.engine_name.encode(), 1)
            send = named_answer(ready.put, adapter.placeholder, resident.engine_name)
        scope = _scope_of(question, len(body))
        answering = asyncio.create_task(self._engine.answer(scope, _asked_once(body), send))
        try:
            while (pieces := await _next(ready, answering)) is not None:
                if pieces[0].get("status", 200) >= 500 and await self._has_ended():
                    yield _ENDED
                    return
                yield [self._signed(piece) for piece in pieces]
            try:
                answering.result()
            except Unreached as error:
                yield _outcome_of(error)
        finally:  # where nobody takes it any more, the connection to the engine is closed, which ends it there too
            answering.cancel()
            await asyncio.gather(answering, return_exceptions=True)

    def _signed(self, message: Message) -> Message:
        if message["type"] != "http.response.start":
            return message
        return {**message, "headers": [*message.get("headers", ()), (REPLICA_HEADER, self.name.encode())]}

    # orders

    def obey(self, orders: Orders) -> None:
        """Begin what is to be done; what comes of it is told."""
        self._kept, self._pinned = orders.kept, orders.pinned
        for bring in orders.bring:
            self._begin(self._bring(bring))
        for leave in orders.leave:
            self._begin(self._let_go(leave))
        if orders.metrics:
            self._begin(self._read_metrics())

    async def _bring(self, bring: Bring) -> None:
        adapter, began = bring.adapter, time.monotonic()
        try:
            if bring.if_room and not self._has_free_place(adapter):
                raise NoSlot(f"there is no free place for '{adapter.name}'")
            await self._register(adapter.id)
            await self.residency.ensure(adapter.name, adapter.folder, wait=bring.wait, urgent=bring.urgent)
            outcome = Outcome("there", seconds=time.monotonic() - began)
        except LorakitError as error:
            outcome = _outcome_of(error)
        except Exception as error:  # whoever waits for it is told
            outcome = Outcome("no slot", f"'{adapter.name}' was not loaded: {type(error).__name__}: {error}")
        self._settled.append((bring.number, outcome))
        self.changed.set()

    def _has_free_place(self, adapter: Adapter) -> bool:
        residency = self.residency
        known = residency.find(adapter.name) is not None
        return known or len(residency.residents) + residency.waiting < residency.places

    async def _let_go(self, leave: Leave) -> None:
        try:
            await self.residency.leave(leave.name)
            outcome = Outcome("gone")
        except Exception as error:
            outcome = Outcome("no slot", str(error))
        self._settled.append((leave.number, outcome))
        self.changed.set()

    def evicted(self, id: str) -> None:
        """Ray will send requests for it elsewhere, so it need not stay."""
        for resident in self.residency.residents:
            stays = resident.busy or any(name in self._kept or name in self._pinned for name in resident.names)
            if resident.folder.name == id and not stays:
                for name in list(resident.names):
                    self._begin(self._forgotten(name))

    async def _forgotten(self, name: str) -> None:
        with contextlib.suppress(LorakitError):
            await self.residency.leave(name)

    async def _read_metrics(self) -> None:
        self._metrics = await self._engine.metrics()
        self.changed.set()

    def _begin(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._aside.add(task)
        task.add_done_callback(self._aside.discard)

    # what it says

    def told(self) -> Told:
        """How it is now; what came of orders is said once."""
        residency, settled, metrics = self.residency, tuple(self._settled), self._metrics
        self._settled.clear()
        self._metrics = None
        self.changed.clear()
        return Told(
            replica=self.name, actor=self._actor, described=self._described,
            adapters=frozenset(residency.names), has_room=residency.has_room, waiting=residency.waiting,
            in_flight=self.in_flight, loads=residency.counted.loads, removes=residency.counted.removes,
            settled=settled, metrics=metrics,
        )  # fmt: skip

    def untold(self, told: Told) -> None:
        """It was not heard: say it again."""
        self._settled[:0] = told.settled
        self._metrics = self._metrics or told.metrics


async def _next(ready: asyncio.Queue[Message], answering: asyncio.Task[None]) -> list[Message] | None:
    """What is there of an answer, at least one message; None at its end."""
    if ready.empty() and not answering.done():
        getting = asyncio.create_task(ready.get())
        try:
            await asyncio.wait({getting, answering}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if not getting.done():
                getting.cancel()
        if getting.done() and not getting.cancelled():
            return [getting.result(), *_all_of(ready)]
    return _all_of(ready) or None


def _all_of(ready: asyncio.Queue[Message]) -> list[Message]:
    found = []
    while not ready.empty():
        found.append(ready.get_nowait())
    return found


def _scope_of(question: Question, length: int) -> Scope:
    headers = [
        (name, value) for name, value in question.headers if name not in (b"content-length", b"transfer-encoding")
    ]
    if length:
        headers.append((b"content-length", str(length).encode()))
    return {
        "type": "http", "http_version": "1.1", "method": question.method, "path": question.path,
        "query_string": question.query, "headers": headers,
    }  # fmt: skip


def _asked_once(body: bytes) -> Receive:
    """The body, and then a client that says no more: when it leaves, the request is cancelled."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        return messages.pop() if messages else await asyncio.get_running_loop().create_future()

    return receive


def _outcome_of(error: LorakitError) -> Outcome:
    if isinstance(error, LoadFailed):
        return Outcome("refused", str(error))
    return Outcome("unreached" if isinstance(error, Unreached) else "no slot", str(error))
