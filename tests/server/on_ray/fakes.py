"""Replicas over fake engines in this process, and what stands for Ray between them and the gateway.

As Ray does, it sends a request where its adapter is registered, else to the replica with the fewest, and what a dead
replica was at breaks off.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from lorakit.server.engines.vllm import COMPLETIONS, Offered
from lorakit.server.gateway import Gateway
from lorakit.server.on_ray.engine import RayEngine, ReplicaDied
from lorakit.server.on_ray.hosted import Hosted, Piece
from lorakit.server.on_ray.messages import Adapter, Described, Orders, Outcome, Question, Told
from lorakit.server.on_ray.reporting import keep_obeying, keep_telling
from lorakit.server.on_ray.residence import Residence
from lorakit.server.on_ray.roster import Roster
from tests.server import fake_engine
from tests.server.fake_engine import Served, nothing, settings_for


class FakeEngine(fake_engine.FakeEngine):
    """One that says logprobs where it is asked for them, as an engine over HTTP is tried out by them."""

    async def call(self, method: str, path: str, body: Any) -> tuple[int, bytes]:
        status, raw = await super().call(method, path, body)
        if status == 200 and isinstance(body, dict) and "logprobs" in body:
            said = json.loads(raw)
            said["choices"][0]["logprobs"] = {"token_logprobs": [-1.0]}
            raw = json.dumps(said).encode()
        return status, raw


@dataclass(eq=False)
class Replica:
    """`registered`: what is said to be here. `dead` is set when its process is."""

    name: str
    engine: FakeEngine
    hosted: Hosted
    registered: dict[str, None] = field(default_factory=dict)
    tasks: list[asyncio.Task[None]] = field(default_factory=list)
    dead: asyncio.Event = field(default_factory=asyncio.Event)
    answered: int = 0


class FakeRay:
    """`Replicas`, as the gateway has it. `only`: the name of one that all requests go to."""

    def __init__(self) -> None:
        self.roster = Roster(5.0)
        self.replicas: dict[str, Replica] = {}
        self.only = ""

    def start(self, engine: FakeEngine, name: str) -> Replica:
        """A replica that is there from now on."""
        described = described_by(engine)

        async def register(id: str) -> None:
            replica.registered[id] = None
            while len(replica.registered) > described.places:
                first = next(iter(replica.registered))
                del replica.registered[first]
                hosted.evicted(first)

        hosted = Hosted(engine, described, register, name=name, actor=f"actor-{name}", fair_wait=0.05)
        replica = self.replicas[name] = Replica(name, engine, hosted)
        replica.tasks = [
            asyncio.create_task(keep_telling(hosted, self)),
            asyncio.create_task(keep_obeying(hosted, self)),
        ]
        return replica

    async def kill(self, name: str) -> None:
        """Nobody hears of it, but those whose requests it has."""
        replica = self.replicas.pop(name)
        replica.dead.set()
        for task in replica.tasks:
            task.cancel()
        await asyncio.gather(*replica.tasks, return_exceptions=True)
        await replica.hosted.close()

    async def close(self) -> None:
        for name in list(self.replicas):
            await self.kill(name)

    async def tell(self, told: Told) -> None:
        self.roster.tell(told)

    async def orders(self, replica: str) -> Orders:
        return await self.roster.orders(replica)

    async def _chosen(self, adapter: Adapter | None) -> Replica:
        """Where there is none, it waits for one, as Ray does."""
        while True:
            if there := [one for one in self.replicas.values() if self.only in ("", one.name)]:
                break
            await asyncio.sleep(0.01)
        having = [one for one in there if adapter is not None and adapter.id in one.registered]
        return min(having or there, key=lambda one: (one.hosted.in_flight, len(one.registered)))

    async def answer(self, question: Question, adapter: Adapter | None, wait: float) -> AsyncGenerator[Piece, None]:
        replica = await self._chosen(adapter)
        replica.answered += 1
        answer = replica.hosted.answer(question, adapter, wait)
        try:
            while True:
                pieces = await _unless_dead(_next(answer), replica)
                if pieces is None:
                    return
                yield pieces
        finally:
            with contextlib.suppress(RuntimeError):
                await answer.aclose()

    async def call(
        self, method: str, path: str, body: Any, adapter: Adapter | None, wait: float
    ) -> tuple[int, bytes] | Outcome:
        replica = await self._chosen(adapter)
        found: tuple[int, bytes] | Outcome = await _unless_dead(
            replica.hosted.call(method, path, body, adapter, wait), replica
        )
        return found


async def _next(answer: AsyncIterator[Piece]) -> Piece | None:
    try:
        return await answer.__anext__()
    except StopAsyncIteration:
        return None


async def _unless_dead(work: Any, replica: Replica) -> Any:
    doing, dead = asyncio.ensure_future(work), asyncio.ensure_future(replica.dead.wait())
    try:
        await asyncio.wait({doing, dead}, return_when=asyncio.FIRST_COMPLETED)
        if dead.done():
            raise ReplicaDied(f"actor-{replica.name}")
        return doing.result()
    finally:
        for one in (doing, dead):
            one.cancel()
        await asyncio.gather(doing, dead, return_exceptions=True)


def holds(engine: FakeEngine) -> bool:
    """Whether it was given a request that it holds."""
    return any("hold" in asked for asked in engine.asked)


def described_by(engine: FakeEngine) -> Described:
    limits = engine.limits
    paths = frozenset({COMPLETIONS, "/v1/chat/completions", "/v1/responses"})
    return Described(Offered(limits, engine.model_card(), paths, {}, True, None), max(limits.slots, limits.memory))


class OnRay(Served):
    """A gateway over replicas, and a client of it."""

    ray: FakeRay

    async def revision_of_alias(self, name: str) -> str:
        """What a name means, asked of nobody but the gateway."""
        found: str = (await self.client.get(f"/v1/adapters/{name}")).json()["revision"]
        return found


@asynccontextmanager
async def on_ray(
    folder: Path, base: Path, *engines: FakeEngine, ready: bool = True, **more: Any
) -> AsyncIterator[OnRay]:
    """Replicas `a`, `b`, … over these engines, and a gateway over `folder/runs`."""
    ray = FakeRay()
    for number, engine in enumerate(engines):
        ray.start(engine, "abcdef"[number])
    while len(ray.roster.members) < len(engines):  # noqa: ASYNC110 - there is no event
        await asyncio.sleep(0.01)
    settings = settings_for(folder, **more)
    engine_of_all = RayEngine(ray, described_by(engines[0]), ray.roster, wait=settings.load_wait)
    gateway = Gateway(nothing)
    await gateway.begin(engine_of_all, settings, Residence)
    client = httpx.AsyncClient(transport=httpx.ASGITransport(gateway), base_url="http://lorakit")
    served = OnRay(gateway, engines[0], client)
    served.ray = ray
    try:
        if ready:
            await served.until_ready()
        yield served
    finally:
        await client.aclose()
        await gateway.stop()
        await ray.close()
