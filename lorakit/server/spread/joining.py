"""How engines come into a fleet, and leave it: each is waited for, asked what it can do, and watched, for ever."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

from lorakit.errors import LorakitError
from lorakit.server.engines.remote import LOOK, Http, RemoteEngine
from lorakit.server.settings import Settings
from lorakit.server.sight.logs import log
from lorakit.server.spread.fleet import Fleet

SOON = 0.25  # seconds between two looks for an engine that is started
TOGETHER = 10.0  # seconds that the first waits for the others


@dataclass(frozen=True, slots=True)
class Address:
    """Of an engine: its name in the fleet, and `http://HOST:PORT` or `unix:/PATH`."""

    name: str
    url: str


def _nobody(_: bool) -> None:
    pass


class Joining:
    """`base_path`, `max_rank` and `memory` are what engines do not say of themselves over HTTP. `kept`: somebody ends
    one that can't be used, and starts it anew, so it is waited for."""

    def __init__(
        self, fleet: Fleet, addresses: Sequence[Address], settings: Settings, *, base_path: str, max_rank: int,
        memory: int = 0, kept: bool = False, key: str = "",
    ) -> None:  # fmt: skip
        self._fleet = fleet
        self._addresses = addresses
        self._settings = settings
        self._base_path = base_path
        self._max_rank = max_rank
        self._memory = memory
        self._kept = kept
        self._key = key
        self._joined: dict[str, asyncio.Event] = {one.name: asyncio.Event() for one in addresses}
        self._why: dict[str, str] = {}

    @property
    def reason(self) -> str:
        """Why nobody has joined yet."""
        return "; ".join(self._why.values()) or "the engines are starting"

    async def run(self) -> None:
        """For ever.

        Raises:
            LorakitError: one can't be used, before any could.
        """
        tasks = [asyncio.create_task(self._keep_joined(address)) for address in self._addresses]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def first(self) -> None:
        """Until there is one, and the others had a little time."""
        waits = [asyncio.create_task(event.wait()) for event in self._joined.values()]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.wait(waits, timeout=TOGETHER)
        finally:
            for wait in waits:
                wait.cancel()

    async def _keep_joined(self, address: Address) -> None:
        while True:
            http = Http(address.url, self._key)
            try:
                await self._answers(http)
                engine = await self._connected(http)
                self._say(address.name, "")
                await self._serve(address.name, engine)
                self._say(address.name, f"{address.url} was started anew: what was in it is loaded again")
            except LorakitError as error:
                if not (self._kept or any(event.is_set() for event in self._joined.values())):
                    raise
                self._say(address.name, f"{address.url} can't be used: {error}")
                await asyncio.sleep(LOOK)
            finally:
                await http.close()

    async def _answers(self, http: Http) -> None:
        while (await http.call("GET", "/health", None))[0] != 200:
            self._say(http.url, f"{http.url} does not answer")
            await asyncio.sleep(SOON)
        self._say(http.url, "")
        http.failures = 0

    async def _connected(self, http: Http) -> RemoteEngine:
        return await RemoteEngine.connect(
            http, self._settings.store_home, base_path=self._base_path, slots=self._settings.max_loras,
            max_rank=self._max_rank, memory=self._memory,
        )  # fmt: skip

    async def _serve(self, name: str, engine: RemoteEngine) -> None:
        """Until it was started anew.

        Raises:
            EngineFailed: it does not fit to the others.
        """
        self._fleet.join(name, engine)

        def told(well: bool) -> None:
            self._fleet.is_well(name, well)

        engine.told = told
        self._joined[name].set()
        try:
            await engine.watch(self._settings.silent_limit)
        finally:
            engine.told = _nobody  # what is found out of it late is not of the next one
            await self._fleet.leave(name)
            with contextlib.suppress(LorakitError):
                await engine.close()

    def _say(self, whose: str, reason: str) -> None:
        if reason and reason != self._why.get(whose):
            log.warning("%s", reason)
        if reason:
            self._why[whose] = reason
        else:
            self._why.pop(whose, None)
