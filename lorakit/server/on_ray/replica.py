"""The deployment `Engines` of Ray Serve: each replica is one vLLM with its adapters."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

import ray
from ray import serve
from ray.serve.handle import DeploymentHandle

from lorakit.errors import EngineFailed
from lorakit.server.engines.canary import Canary
from lorakit.server.on_ray.hosted import Hosted, Piece
from lorakit.server.on_ray.messages import Adapter, Described, Orders, Outcome, Question, Told
from lorakit.server.on_ray.plan import Plan
from lorakit.server.on_ray.process import Process
from lorakit.server.on_ray.reporting import keep_obeying, keep_telling
from lorakit.server.settings import Settings
from lorakit.server.sight.logs import log, log_to_stderr

ENGINES, GATEWAY = "Engines", "Gateway"  # the deployments' names
LAST_WORDS = 2.0  # seconds that answers have to break off after their engine ended


class Engines:
    """Ray makes one for each replica, and asks it whether it is well."""

    async def __init__(self, plan: Plan, settings: Settings) -> None:  # type: ignore[misc]  # Ray awaits it
        log_to_stderr(settings.log_format)
        context = serve.get_replica_context()
        self._settings = settings
        self._process = Process(plan, settings)
        self._ending = False
        self._tasks: list[asyncio.Task[None]] = []
        try:
            await self._process.start()
            self._engine = engine = await self._process.connected()
        except BaseException:
            await self._process.end()
            raise
        places = max(engine.limits.slots, engine.limits.memory)
        self._described = Described(engine.offers, places)

        @serve.multiplexed(max_num_models_per_replica=places)  # type: ignore[untyped-decorator]
        async def registered(id: str) -> _Registered:
            return _Registered(id, self._hosted)

        async def register(id: str) -> None:
            await registered(id)

        self._hosted = Hosted(
            engine, self._described, register, name=context.replica_id.unique_id,
            actor=ray.get_runtime_context().get_actor_id() or "", fair_wait=settings.fair_wait,
        )  # fmt: skip
        self._overseer = overseer = _Overseer(serve.get_deployment_handle(GATEWAY, app_name=context.app_name))
        self._canary = Canary(engine, settings.canary)
        for work in (
            keep_telling(self._hosted, overseer), keep_obeying(self._hosted, overseer), self._end_with_engine(),
            engine.watch(settings.silent_limit), self._canary.run(),
        ):  # fmt: skip
            self._tasks.append(asyncio.create_task(work))

    # what the gateway asks

    async def describe(self) -> Described:
        return self._described

    async def answer(self, question: Question, adapter: Adapter | None, wait: float) -> AsyncGenerator[Piece, None]:
        answer = self._hosted.answer(question, adapter, wait)
        try:
            async for pieces in answer:
                yield pieces
        finally:
            await answer.aclose()

    async def call(
        self, method: str, path: str, body: Any, adapter: Adapter | None, wait: float
    ) -> tuple[int, bytes] | Outcome:
        return await self._hosted.call(method, path, body, adapter, wait)

    # what Ray asks

    async def check_health(self) -> None:
        """Raises EngineFailed where another should take its place."""
        if self._process.ended:
            raise EngineFailed(self._process.why)
        if wrong := self._canary.wrong:
            raise EngineFailed(f"the base does not answer: {wrong}")
        if self._canary.stuck > self._settings.hang_limit:
            raise EngineFailed(f"the engine made no token for {self._canary.stuck:.0f} s")
        if self._engine.lost.is_set():
            raise EngineFailed("the engine has forgotten what was in it")

    async def __del__(self) -> None:
        self._ending = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if hasattr(self, "_hosted"):
            with contextlib.suppress(Exception):
                async with asyncio.timeout(LAST_WORDS):
                    await self._overseer.tell(replace(self._hosted.told(), ends=True))
            await self._hosted.close()
        await self._process.end()

    # by itself

    async def _end_with_engine(self) -> None:
        """An engine that ended does not come back: Ray makes another replica at once when this one is gone too."""
        await self._process.until_ended()
        log.error("%s", self._process.why)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LAST_WORDS):
                while self._hosted.in_flight:  # noqa: ASYNC110 - there is no event
                    await asyncio.sleep(0.05)
        if not self._ending:
            with contextlib.suppress(Exception):
                await self._process.end()
            os._exit(1)


class _Overseer:
    """The gateway's deployment."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._handle = handle

    async def tell(self, told: Told) -> None:
        await self._handle.tell.remote(told)

    async def orders(self, replica: str) -> Orders:
        found: Orders = await self._handle.orders.remote(replica)
        return found


class _Registered:
    """What Ray counts as an adapter of this replica. What Ray calls when it counts it no more is found by its name on
    the object, not on its class, which Python would call as well."""

    def __init__(self, id: str, hosted: Hosted) -> None:
        async def counted_no_more() -> None:
            hosted.evicted(id)

        setattr(self, "__del__", counted_no_more)  # noqa: B010
