"""Keeps one engine running that a gateway in another process asks: started, watched, and started again."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from pathlib import Path

from lorakit.errors import EngineFailed
from lorakit.server.sight.logs import LogFormat, own_line
from lorakit.server.supervision.engine_process import Command, EngineProcess, PhaseOf
from lorakit.server.supervision.supervisor import BACKOFF, Times


class Keeper:
    """`name` is the engine's; it listens on `socket`. `at_once` is set when it has to end without finishing."""

    def __init__(
        self, name: str, socket: Path, command: Command, *, phase_of: PhaseOf, times: Times, log_format: LogFormat
    ) -> None:
        self._name = name
        self._socket = socket
        self._command = command
        self._phase_of = phase_of
        self._times = times
        self._log_format = log_format
        self._at_once = asyncio.Event()

    async def run(self) -> None:
        """Until it is cancelled.

        Raises:
            EngineFailed: the engine never came up; its own last words are in the message.
        """
        was_up, failures = False, 0
        while True:
            self._socket.unlink(missing_ok=True)  # a socket's file outlives a process that was killed
            engine = EngineProcess(
                self._command(str(self._socket)), self._phase_of, self._times.drain + self._times.ending,
                self._log_format,
            )  # fmt: skip
            try:
                await self._watch(engine)
            except asyncio.CancelledError:
                await engine.ask_to_stop()
                raise
            finally:
                await engine.end(self._times.drain + self._times.ending, self._at_once)
            up = "up" in engine.reports
            if not (was_up or up):
                raise EngineFailed(f"vLLM did not start: {engine.how_it_ended}\n{engine.last_words}")
            was_up = True
            failures = 0 if up and engine.age > 60 else failures + 1
            seconds = BACKOFF[min(failures, len(BACKOFF)) - 1] if failures else 0
            self._say(f"it ended ({engine.how_it_ended}), and is started again in {seconds:g} s")
            await asyncio.sleep(seconds)

    async def _watch(self, engine: EngineProcess) -> None:
        """Until it ends, or is of no more use."""
        told = ""
        while not engine.ended:
            if "here" in engine.reports and not engine.begun:
                await engine.begin()
            if "up" not in engine.reports and engine.phase != told:
                told = engine.phase
                self._say(told)
            if why := engine.past_help(hung=self._times.hung, start=self._times.start):
                self._say(f"it is ended: {why}")
                engine.kill(why)
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1.0):
                    await engine.changed.wait()
            engine.changed.clear()

    def end_at_once(self) -> None:
        self._at_once.set()

    def _say(self, message: str) -> None:
        print(own_line(f"engine '{self._name}': {message}", self._log_format), file=sys.stderr, flush=True)
