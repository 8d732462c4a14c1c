"""The deployment `Gateway` of Ray Serve: lorakit's gateway, as it stands in front of any engine, with its store.

There is one, so that a name means the same for every request; what it hands on names a revision, and where it lies.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

from lorakit.server.access.at_start import KEY, key_from_file
from lorakit.server.gateway import Gateway
from lorakit.server.on_ray.calls import RayReplicas
from lorakit.server.on_ray.engine import RayEngine
from lorakit.server.on_ray.messages import Orders, Told
from lorakit.server.on_ray.plan import Plan
from lorakit.server.on_ray.residence import Residence
from lorakit.server.on_ray.roster import Roster
from lorakit.server.settings import Settings

_standing: list[Gateway] = []  # of this process, which Ray made for one replica


class Ingress:
    """Ray makes one, and gives it the engines' handle."""

    async def __init__(  # type: ignore[misc]  # Ray awaits it
        self, plan: Plan, settings: Settings, key: str, engines: Any
    ) -> None:
        if plan.api_key_file:
            key = key_from_file(Path(plan.api_key_file))
        if key:
            os.environ[KEY] = key
        replicas = RayReplicas(engines)
        described = await replicas.describe()
        self._roster = Roster(settings.silent_limit)
        engine = RayEngine(
            replicas, described, self._roster, wait=settings.load_wait, max_body=settings.max_body * 2**20
        )
        self._gateway = Gateway(_no_sockets, settings)
        await self._gateway.begin(engine, settings, residency_of=Residence)
        _standing[:] = [self._gateway]

    async def tell(self, told: Told) -> None:
        """A replica says how it is."""
        self._roster.tell(told)

    async def orders(self, replica: str) -> Orders:
        """A replica asks what it is to do."""
        return await self._roster.orders(replica)


def standing() -> Starlette:
    """The app of this process, as Ray Serve wants it."""
    return Starlette(middleware=[Middleware(_Standing)], lifespan=_life)


class _Standing:
    """Answers all requests; what it stands before has its life alone."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        taken = _standing and scope["type"] != "lifespan"
        await (_standing[0] if taken else self._app)(scope, receive, send)


@contextlib.asynccontextmanager
async def _life(_: Starlette) -> AsyncIterator[None]:
    yield
    for gateway in _standing:
        await gateway.stop()
    _standing.clear()


async def _no_sockets(scope: Scope, receive: Receive, send: Send) -> None:
    """What the gateway hands on past its engine: WebSockets, which have no way through here."""
    await receive()
    await send({"type": "websocket.close", "code": 1011, "reason": "lorakit passes no WebSocket on to Ray's replicas"})
