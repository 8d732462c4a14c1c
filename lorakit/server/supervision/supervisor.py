"""The process that `lorakit serve` is: owns the address, starts the engine, watches it, starts it again.

It imports no torch. The listening socket is lent to the engine, so the address never closes: while no engine answers,
this process accepts there itself and says 503 with the reason. Another server may take it over (takeover.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import math
import os
import signal
import socket
import sys
import tempfile
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.types import Receive, Scope, Send

from lorakit.errors import Conflict, EngineFailed, UsageError
from lorakit.files.folders import temporary_folder
from lorakit.server.certificate import Certificate
from lorakit.server.requests.answers import unavailable
from lorakit.server.sight.logs import LogFormat, own_line
from lorakit.server.sight.request_id import identified
from lorakit.server.supervision.engine_process import Command, EngineProcess, PhaseOf
from lorakit.server.supervision.line import Line
from lorakit.server.supervision.listener import LEAVING, QuietServer, public_server
from lorakit.server.supervision.takeover import accepted, door

BACKOFF = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0)
RUNTIME_PREFIX = "lorakit-run-"  # of a private folder for sockets, whose paths have to be short


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds: that requests in flight have at the end; without a sign of life, until requests are answered here, and
    until the engine is started again; without a line in its log, while an engine starts; and for an engine to end when
    nothing is in flight any more."""

    drain: float = 10.0
    silent: float = 15.0
    hung: float = 60.0
    start: float = 1800.0
    ending: float = 10.0


def listen(host: str, port: int) -> socket.socket:
    """The public address, held for as long as the supervisor lives.

    Raises:
        Conflict: another process listens there.
        UsageError: there is no such address here.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except socket.gaierror as error:
        raise UsageError(f"--host {host}: {error.strerror}") from None
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen(2048)
    except (OSError, OverflowError) as error:
        bound.close()
        if getattr(error, "errno", None) == errno.EADDRINUSE:
            raise Conflict(
                f"port {port} on {host} is taken: name another with --port, or --takeover if it is a server of lorakit"
            ) from None
        raise UsageError(f"can't listen on {host} port {port}: {error}") from None
    return bound


def place_for_sockets() -> Path:
    """The folder for temporary files, unless its name leaves no room in a socket's path, which may have 108 bytes."""
    named = tempfile.gettempdir()
    return Path(named if len(os.fsencode(named)) <= 70 else "/tmp")


class Supervisor:
    """Runs one engine until it is told to stop. `phase_of` reads what the engine is doing from a line of its log;
    `taken` is the line to the server that this one takes over from, `way_in` where another may take over from this,
    `what` the engine is called."""

    def __init__(
        self, public: socket.socket, command: Command, *, phase_of: PhaseOf, times: Times,
        log_format: LogFormat = "text", way_in: Path | None = None, taken: socket.socket | None = None,
        certificate: Certificate | None = None, what: str = "engine",
    ) -> None:  # fmt: skip
        self._what = what
        self._public = public
        self._command = command
        self._phase_of = phase_of
        self._times = times
        self._certificate = certificate
        self._log_format = log_format
        self._way_in = way_in
        self._taken = Line(taken) if taken is not None else None
        self._reason = f"the {what} is starting"
        self._again_at = 0.0
        self._stopping = asyncio.Event()
        self._at_once = asyncio.Event()
        self.exit_code = 0
        self._engine: EngineProcess | None = None
        self._ended: deque[dict[str, Any]] = deque(maxlen=4)
        self._lets_go = asyncio.Event()  # the server before this one changes nothing any more
        self._held = False  # another server is about to take over
        self._succeeded = False  # it has
        self._answering: asyncio.Task[None] | None = None
        self._server: QuietServer | None = None

    async def run(self) -> None:
        """Until SIGINT or SIGTERM, or until another server has taken over.

        Raises:
            EngineFailed: the engine never came up; its own last words are in the message.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._stop, number)
        with temporary_folder(place_for_sockets(), RUNTIME_PREFIX, 0o700) as runtime, door(self._way_in) as way_in:
            others = [asyncio.create_task(self._hear_successors(way_in))]
            if (taken := self._taken) is not None:
                others.append(asyncio.create_task(self._hear_predecessor(taken)))
            try:
                await self._run_engines(runtime)
            finally:
                for other in others:
                    other.cancel()
                await asyncio.gather(*others, return_exceptions=True)
                await self._leave_to_engine()
                self._public.close()
                if taken is not None:
                    taken.close()

    async def _run_engines(self, runtime: Path) -> None:
        was_up, failures, starts = False, 0, 0
        while not self._stopping.is_set():
            if self._taken is None:
                await self._answer_here()
            # a path of its own for each: a socket's file outlives a process that was killed
            engine = EngineProcess(
                self._command(str(runtime / f"{starts}.sock")), self._phase_of, self._times.drain + self._times.ending,
                self._log_format, self._what,
            )  # fmt: skip
            self._engine = engine
            starts += 1
            try:
                await self._watch(engine)
            finally:
                patience = LEAVING if self._succeeded else self._times.drain
                await engine.end(patience + self._times.ending, self._at_once)
            if self._stopping.is_set():
                break
            if not (was_up or engine.listening):
                what = "vLLM" if self._what == "engine" else f"the {self._what}"
                raise EngineFailed(f"{what} did not start: {engine.how_it_ended}\n{engine.last_words}")
            was_up = True
            failures = 0 if engine.listening and engine.age > 60 else failures + 1
            self._ended.append(engine.as_ended())
            await self._pause(engine.how_it_ended, BACKOFF[min(failures, len(BACKOFF)) - 1] if failures else 0)

    async def _pause(self, how: str, seconds: float) -> None:
        """Before the next start, longer each time that it fails soon."""
        self._say(f"the {self._what} ended ({how}); it is started again in {seconds:g} s")
        self._reason = f"the {self._what} ended ({how}) and is started again"
        self._again_at = time.monotonic() + seconds
        await self._answer_here()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stopping.wait()

    @property
    def at_once(self) -> bool:
        """Whether it is to end without finishing."""
        return self._at_once.is_set()

    def stop(self) -> None:
        """As if it were told to."""
        self._stopping.set()

    def _stop(self, number: int) -> None:
        self.exit_code = 130 if number == signal.SIGINT else 0
        if self._stopping.is_set():
            self._say("stopping at once")
            self._at_once.set()
        else:
            self._say("stopping")
            self._stopping.set()

    # the engine

    async def _watch(self, engine: EngineProcess) -> None:
        """Until the engine ends, is of no more use, or this process is told to stop."""
        stopping = asyncio.create_task(self._stopping.wait())
        try:
            while not engine.ended:
                if self._stopping.is_set():
                    await self._part_from(engine)
                    break
                await self._see_to(engine)
                if why := engine.past_help(hung=self._times.hung, start=self._times.start):
                    self._say(f"the {self._what} is ended: {why}")
                    engine.kill(why)
                    break
                changed = asyncio.create_task(engine.changed.wait())
                await asyncio.wait({changed, stopping}, timeout=1.0, return_when=asyncio.FIRST_COMPLETED)
                changed.cancel()
                engine.changed.clear()
        finally:
            stopping.cancel()

    async def _see_to(self, engine: EngineProcess) -> None:
        """Give the engine what it is ready for, and answer here while it does not."""
        if "here" in engine.reports and not engine.begun and not self._held:
            await self._let_go_of_store()
            await engine.begin()
        if not engine.listening and ("up" if self._taken is None else "ready") in engine.reports:
            await self._leave_to_engine()
            await engine.listen(self._public, self._ended)
            self._ended.clear()
            await self._take_over()
        if engine.listening and engine.silent <= self._times.silent:
            self._reason = f"the {self._what} does not answer"
            await self._leave_to_engine()
        elif engine.listening:
            await self._answer_here()
        elif self._reason.partition(", for ")[0] != engine.phase:
            self._say(engine.phase)
        if not engine.listening:
            self._reason = f"{engine.phase}, for {engine.age:.0f} s"
            if self._taken is None:
                await self._answer_here()

    async def _part_from(self, engine: EngineProcess) -> None:
        if self._succeeded:
            await self._leave_to_engine()
            await engine.tell("leave")
            return
        await engine.ask_to_stop()
        self._reason = "the server is stopping"
        await self._answer_here()

    # taking over, and being taken over from

    async def _hear_predecessor(self, taken: Line) -> None:
        """Until the server that this one takes over from is gone, or has nothing to do with it any more."""
        while word := await taken.hear():
            if word.say == "held":
                self._lets_go.set()
        if self._taken is not None:
            self._say("the server that this one was to take over from is gone")
            self._alone()

    async def _let_go_of_store(self) -> None:
        """Have the server before this one change nothing in the store from now on."""
        if self._taken is not None:
            with contextlib.suppress(OSError):
                await self._taken.say("hold")
            await self._lets_go.wait()

    async def _take_over(self) -> None:
        """The engine listens: the server before this one may leave."""
        if self._taken is not None:
            with contextlib.suppress(OSError):
                await self._taken.say("over")
            self._say("this server has taken over; the one before it finishes what is in flight")
            self._alone()

    def _alone(self) -> None:
        self._taken = None
        self._lets_go.set()

    async def _hear_successors(self, way_in: socket.socket | None) -> None:
        while way_in is not None:
            successor = await accepted(way_in)
            try:
                await self._hand_over(successor)
            finally:
                successor.close()
                if self._held and not self._succeeded:
                    self._held = False
                    self._say("the server that was to take over is gone")
                    if self._engine is not None:
                        await self._engine.tell("resume")
                        self._engine.changed.set()

    async def _hand_over(self, successor: Line) -> None:
        """Give the address to another server; until it listens there, this one serves as before."""
        with contextlib.suppress(OSError):
            while not self._stopping.is_set() and (word := await successor.hear()):
                if word.say == "takeover":
                    members = self._engine.members() if self._engine is not None else []
                    await successor.say("address", handles=[self._public.fileno()], members=members)
                elif word.say == "hold":
                    self._say("another server is about to take over")
                    self._held = True
                    if self._engine is not None:
                        await self._engine.hold()
                    await successor.say("held")
                elif word.say == "over":
                    self._say("another server has taken over")
                    self._succeeded = True
                    self._stopping.set()

    # in the engine's place

    async def _answer_here(self) -> None:
        """Accept on the public address and say 503."""
        if self._answering is None:
            self._server = public_server(self._unavailable, 1, self._certificate)
            self._answering = asyncio.create_task(self._server.serve(sockets=[self._public.dup()]))

    async def _leave_to_engine(self) -> None:
        """Accept no more here; what is connected is answered first."""
        if self._answering is None or self._server is None:
            return
        while not self._server.started and not self._answering.done():  # noqa: ASYNC110 - uvicorn has no event for it
            await asyncio.sleep(0.01)
        for server in self._server.servers:
            server.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.5):
                while self._server.server_state.connections:  # noqa: ASYNC110 - nor for this
                    await asyncio.sleep(0.01)
        self._server.should_exit = True
        await self._answering
        self._answering = None

    async def _unavailable(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope, send = identified(scope, send)
            response = unavailable(self._reason)
            response.headers["Connection"] = "close"
            wait = math.ceil(self._again_at - time.monotonic())
            response.headers["Retry-After"] = str(max(wait, int(response.headers["Retry-After"])))
            await response(scope, receive, send)

    def _say(self, message: str) -> None:
        print(own_line(message, self._log_format), file=sys.stderr, flush=True)
