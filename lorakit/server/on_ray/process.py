"""The vLLM of one replica: a process on a private socket, gone when the replica is."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from pathlib import Path

from lorakit.errors import EngineFailed
from lorakit.merge.base import read_base
from lorakit.server.engines import vllm
from lorakit.server.engines.remote import UNIX, Http, RemoteEngine
from lorakit.server.on_ray.plan import Plan
from lorakit.server.settings import Settings
from lorakit.server.supervision.engine_process import EngineProcess

LOOK = 0.1  # seconds between two looks at one that starts
PATIENCE = 1.0  # seconds that it has to end by itself
RANK = 16


class Process:
    """Started with `start`; `connected` once it answers."""

    def __init__(self, plan: Plan, settings: Settings) -> None:
        self._plan, self._settings = plan, settings
        self._folder = Path(tempfile.mkdtemp(prefix="lorakit-"))  # that only this user may enter; its name is short
        self._process: EngineProcess | None = None
        self.http = Http(f"{UNIX}{self._folder / 'engine'}")

    @property
    def ended(self) -> bool:
        return self._process is not None and self._process.ended

    @property
    def why(self) -> str:
        assert self._process is not None
        return f"vLLM ended ({self._process.how_it_ended}); it said last:\n{self._process.last_words}"

    async def start(self) -> None:
        """Until it answers.

        Raises:
            EngineFailed: it ended instead, or was silent for too long.
        """
        plan, settings = self._plan, self._settings
        found = vllm.installed()
        vllm.refuse_own_flags(plan.vllm)
        base = await asyncio.to_thread(read_base, plan.base)
        words = vllm.command(
            found, base=str(base.folder.resolve()), name=plan.name, socket=str(self._folder / "engine"),
            slots=settings.max_loras or 8, rank=vllm.allowed_rank(plan.max_lora_rank or RANK), extra=plan.vllm,
        )  # fmt: skip
        environ = {**os.environ, "VLLM_SERVER_DEV_MODE": "1"}  # it takes adapters out; nobody else reaches its socket
        variables = vllm.environment(found, environ, offline=plan.is_folder and not settings.asks_hub)
        self._process = EngineProcess(
            (_without_gateway(words), variables), vllm.phase_of, PATIENCE, settings.log_format
        )
        while (await self.http.call("GET", "/health", None))[0] != 200:
            if self._process.ended:
                await self._process.end(PATIENCE, asyncio.Event())
                raise EngineFailed(f"the engine does not start: {self.why}")
            if self._process.quiet > settings.start_limit:
                raise EngineFailed(f"the engine does not start: it was silent for {settings.start_limit:g} s")
            await asyncio.sleep(LOOK)
        self.http.failures = 0

    async def until_ended(self) -> None:
        while not self.ended:  # noqa: ASYNC110 - there is no event of that alone
            await asyncio.sleep(LOOK)

    async def connected(self) -> RemoteEngine:
        base = await asyncio.to_thread(read_base, self._plan.base)
        return await RemoteEngine.connect(
            self.http, self._settings.store_home, base_path=str(base.folder.resolve()),
            slots=self._settings.max_loras or 8, max_rank=vllm.allowed_rank(self._plan.max_lora_rank or RANK),
        )  # fmt: skip

    async def end(self) -> None:
        """It, and all that it started."""
        await self.http.close()
        if self._process is not None:
            await self._process.ask_to_stop()
            await self._process.end(PATIENCE, asyncio.Event())
        shutil.rmtree(self._folder, ignore_errors=True)


def _without_gateway(words: list[str]) -> list[str]:
    """The gateway is elsewhere, and has a log of its requests."""
    at = words.index("--middleware")
    return [*words[:at], *words[at + 2 :], "--disable-uvicorn-access-log"]
