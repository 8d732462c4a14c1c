"""Several engines as one: what asks no adapter goes to the least busy, and what they say of themselves is joined.

Which of them has an adapter, and which gets the next, is beside this, in `placing`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol

from starlette.types import Receive, Scope, Send

from lorakit.errors import EngineFailed
from lorakit.server.engines.engine import Answering, Engine, Limits, Unreached
from lorakit.server.spread.expositions import joined
from lorakit.server.spread.routing import Capacity, Nowhere, Router

AT_ONCE = 256  # requests that vLLM answers at once (its --max-num-seqs), where nobody said otherwise
TELLS = 5.0  # seconds that one has to tell its metrics


class Following(Protocol):
    """Is told of engines that come and go."""

    def came(self, name: str, engine: Engine) -> None: ...

    async def went(self, name: str) -> None: ...

    def fell_ill(self, name: str) -> None: ...


class Fleet:
    """Engines of one base, by name. All methods run on the event loop."""

    def __init__(self) -> None:
        self.router = Router()
        self.members: dict[str, Engine] = {}
        self._followers: list[Following] = []
        self._last: Answering | None = None
        self._limits: Limits | None = None  # of all that are there

    # who is there

    def follow(self, follower: Following) -> None:
        self._followers.append(follower)
        for name, engine in self.members.items():
            follower.came(name, engine)

    def join(self, name: str, engine: Engine) -> None:
        """An engine is there, and answers.

        Raises:
            EngineFailed: it serves another base than those that are there.
        """
        limits = engine.limits
        if self._last is not None and (mine := self._last.limits.base) != limits.base:
            raise EngineFailed(f"'{name}' serves '{limits.base}', and the others '{mine}': start all with one base")
        self._last = engine
        self.members[name] = engine
        self._limits = None
        memory = max(limits.slots, limits.memory)
        self.router.join(name, Capacity(limits.slots, memory, limits.max_rank, AT_ONCE))
        for follower in self._followers:
            follower.came(name, engine)

    async def leave(self, name: str) -> None:
        """It is gone, or has forgotten what was in it."""
        if self.members.pop(name, None) is not None:
            self._limits = None
            self.router.leave(name)
            for follower in self._followers:
                await follower.went(name)

    def is_well(self, name: str, well: bool) -> None:
        """Whether one that is there answers."""
        if name in self.members:
            self.router.set_health(name, well)
            for follower in () if well else self._followers:
                follower.fell_ill(name)

    @property
    def _any(self) -> Answering:
        """One of them, or that which was there last."""
        assert self._last is not None, "nobody has joined"
        return next(iter(self.members.values()), self._last)

    @property
    def _one(self) -> Answering:
        """The least busy of them that answers."""
        choice = self.router.choose(None)
        return self._any if isinstance(choice, Nowhere) else self.members[choice.engine]

    # as one engine

    @property
    def limits(self) -> Limits:
        if self._limits is None:
            self._limits = self._joined_limits()
        return self._limits

    def _joined_limits(self) -> Limits:
        first, all_ = self._any.limits, [engine.limits for engine in self.members.values()]
        if len(all_) < 2:
            return first
        return replace(
            first,
            slots=sum(one.slots for one in all_),
            max_rank=max(one.max_rank for one in all_),
            engine=f"{len(all_)} x {first.engine}",
            honours_patterns=all(one.honours_patterns for one in all_),
            memory=sum(max(one.slots, one.memory) for one in all_),
        )

    async def try_out(self, name: str) -> str | None:
        return await self._one.try_out(name)

    async def call(self, method: str, path: str, body: Any) -> tuple[int, bytes]:
        return await self._one.call(method, path, body)

    async def alive(self, *, now: bool = False) -> bool:
        return any(await asyncio.gather(*(engine.alive(now=now) for engine in list(self.members.values()))))

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        choice = self.router.choose(None)
        if isinstance(choice, Nowhere):
            raise Unreached(choice.reason)
        engine = self.members[choice.engine]
        self.router.begun(choice.engine, None)
        try:
            await engine.answer(scope, receive, send)
        finally:
            if self.members.get(choice.engine) is engine:  # one that was started anew has begun nothing
                self.router.ended(choice.engine, None)

    def model_card(self) -> dict[str, Any]:
        return self._any.model_card()

    def serves(self, path: str) -> bool:
        return all(engine.serves(path) for engine in (self._any, *self.members.values()))

    def goes_around(self, path: str) -> bool:
        return any(engine.goes_around(path) for engine in (self._any, *self.members.values()))

    def templated(self, path: str, said: Mapping[str, Any], template: str) -> dict[str, Any]:
        return self._any.templated(path, said, template)

    async def metrics(self) -> bytes:
        """All that each says, with the label `replica`."""
        members = dict(self.members)
        told = await asyncio.gather(*(_told_by(engine) for engine in members.values()))
        return joined(dict(zip(members, told, strict=True)), "replica")

    async def describe(self) -> dict[str, Any]:
        return await self._one.describe()


async def _told_by(engine: Answering) -> bytes:
    """Nothing, of one that hangs."""
    try:
        async with asyncio.timeout(TELLS):
            return await engine.metrics()
    except TimeoutError:
        return b""
