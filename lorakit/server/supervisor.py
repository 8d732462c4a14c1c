"""The process that `lorakit serve` is: owns the address, starts the engine, watches it, starts it again.

It imports no torch. The listening socket is handed down to the engine, so the address never closes: while no engine
answers, this process accepts there itself and says 503 with the reason.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from starlette.types import Receive, Scope, Send

from lorakit.errors import Conflict, EngineFailed, UsageError
from lorakit.files.folders import temporary_folder
from lorakit.server.answers import unavailable
from lorakit.server.listener import CONTROL_FD, LISTEN_FD, QuietServer, public_server, say, words

SILENT = 15.0  # seconds without a sign of life, after which requests are answered here
HUNG = 60.0  # the same, after which the engine is ended and started again
BACKOFF = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0)
RUNTIME_PREFIX = "lorakit-run-"  # of a private folder for sockets, whose paths have to be short
_LAST_LINES = 40

Command = Callable[[str], tuple[list[str], dict[str, str]]]  # from a private socket's path: arguments, variables


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
            raise Conflict(f"port {port} on {host} is taken: name another with --port") from None
        raise UsageError(f"can't listen on {host} port {port}: {error}") from None
    return bound


def _place_for_sockets() -> Path:
    """The folder for temporary files, unless its name leaves no room in a socket's path, which may have 108 bytes."""
    named = tempfile.gettempdir()
    return Path(named if len(os.fsencode(named)) <= 70 else "/tmp")


class Supervisor:
    """Runs one engine until it is told to stop. `phase_of` reads what the engine is doing from a line of its log."""

    def __init__(
        self, public: socket.socket, command: Command, *, drain: float, phase_of: Callable[[str], str | None]
    ) -> None:
        self._public = public
        self._command = command
        self._drain = drain
        self._phase_of = phase_of
        self._reason = "the engine is starting"
        self._stopping = asyncio.Event()
        self._at_once = asyncio.Event()
        self.exit_code = 0
        self._answering: asyncio.Task[None] | None = None
        self._server: QuietServer | None = None

    async def run(self) -> None:
        """Until SIGINT or SIGTERM.

        Raises:
            EngineFailed: the engine never came up; its own last words are in the message.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._stop, number)
        was_up, failures, starts = False, 0, 0
        with temporary_folder(_place_for_sockets(), RUNTIME_PREFIX, 0o700) as runtime:
            try:
                while not self._stopping.is_set():
                    await self._answer_here()
                    started = time.monotonic()
                    # a path of its own for each: a socket's file outlives a process that was killed
                    command = self._command(str(runtime / f"{starts}.sock"))
                    engine = EngineProcess(command, self._public, self._phase_of)
                    starts += 1
                    try:
                        up = await self._watch(engine)
                    finally:
                        await engine.end(self._drain, self._at_once)
                    if self._stopping.is_set():
                        break
                    if not (was_up or up):
                        raise EngineFailed(f"vLLM did not start:\n{engine.last_words}")
                    was_up = True
                    failures = 0 if up and time.monotonic() - started > 60 else failures + 1
                    await self._pause(engine.how_it_ended, BACKOFF[min(failures, len(BACKOFF)) - 1] if failures else 0)
            finally:
                await self._leave_to_engine()
                self._public.close()

    async def _pause(self, how: str, seconds: float) -> None:
        """Before the next start, longer each time that it fails soon."""
        self._say(f"the engine ended ({how}); it is started again in {seconds:g} s")
        self._reason = "the engine ended and is started again"
        await self._answer_here()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stopping.wait()

    def _stop(self, number: int) -> None:
        self.exit_code = 130 if number == signal.SIGINT else 0
        if self._stopping.is_set():
            self._say("stopping at once")
            self._at_once.set()
        else:
            self._say("stopping")
            self._stopping.set()

    async def _watch(self, engine: EngineProcess) -> bool:
        """Until the engine ends, hangs, or this process is told to stop: whether it ever answered."""
        up = False
        hearing = asyncio.create_task(engine.hear())
        reading = asyncio.create_task(engine.read_log())
        stopping = asyncio.create_task(self._stopping.wait())
        try:
            while not engine.ended:
                if self._stopping.is_set():
                    await engine.ask_to_stop()
                    self._reason = "the server is stopping"
                    await self._answer_here()
                    break
                if engine.up and not up:
                    up = True
                    await self._leave_to_engine()
                    await engine.let_listen()
                if self._reason != engine.phase and not up:
                    self._say(engine.phase)
                self._reason = engine.phase
                silent = time.monotonic() - engine.heard if up else 0.0
                if silent > HUNG:
                    self._say(f"the engine has not answered for {silent:.0f} s and is ended")
                    engine.kill()
                    break
                if silent > SILENT:
                    self._reason = "the engine does not answer"
                    await self._answer_here()
                elif up:
                    await self._leave_to_engine()
                changed = asyncio.create_task(engine.changed.wait())
                await asyncio.wait({changed, stopping}, timeout=1.0, return_when=asyncio.FIRST_COMPLETED)
                changed.cancel()
                engine.changed.clear()
        finally:
            for task in (hearing, stopping):
                task.cancel()
            engine.reading = reading
        return up

    async def _answer_here(self) -> None:
        """Accept on the public address and say 503."""
        if self._answering is None:
            self._server = public_server(self._unavailable, drain=1)
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
            response = unavailable(self._reason)
            response.headers["Connection"] = "close"
            await response(scope, receive, send)

    def _say(self, message: str) -> None:
        print(f"lorakit: {message}", file=sys.stderr, flush=True)


class EngineProcess:
    """One engine process with all that it starts, in a session of its own so that Ctrl+C reaches this process alone."""

    def __init__(
        self, command: tuple[list[str], dict[str, str]], public: socket.socket, phase_of: Callable[[str], str | None]
    ) -> None:
        arguments, variables = command
        self._control, theirs = socket.socketpair()
        handles = (public.fileno(), theirs.fileno())
        variables = {**variables, LISTEN_FD: str(handles[0]), CONTROL_FD: str(handles[1])}
        self._process = subprocess.Popen(
            arguments, env=variables, pass_fds=handles, start_new_session=True, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, preexec_fn=_end_with_parent,
        )  # fmt: skip
        theirs.close()
        self._phase_of = phase_of
        self._lines: deque[str] = deque(maxlen=_LAST_LINES)
        self._writer: asyncio.StreamWriter | None = None
        self.phase = "the engine is starting: importing vLLM"
        self.up = False
        self.heard = time.monotonic()
        self.changed = asyncio.Event()
        self.reading: asyncio.Task[None] | None = None
        self._watcher = os.pidfd_open(self._process.pid)
        self._gone = asyncio.Event()
        asyncio.get_running_loop().add_reader(self._watcher, self._noticed_end)

    def _noticed_end(self) -> None:
        asyncio.get_running_loop().remove_reader(self._watcher)
        self._gone.set()
        self.changed.set()

    @property
    def ended(self) -> bool:
        return self._gone.is_set()

    @property
    def last_words(self) -> str:
        """What it logged last, as far as it matters."""
        return "\n".join(f"  {line}" for line in self._lines)

    @property
    def how_it_ended(self) -> str:
        code = self._process.returncode
        return f"killed by {signal.Signals(-code).name}" if code and code < 0 else f"exit code {code}"

    async def hear(self) -> None:
        """Its signs of life."""
        self._control.setblocking(False)
        reader, self._writer = await asyncio.open_connection(sock=self._control)
        async for word in words(reader):
            self.heard = time.monotonic()
            if word["say"] == "up":
                self.up = True
            self.changed.set()

    async def read_log(self) -> None:
        """Pass its log on, and read from it what it is doing."""
        assert self._process.stdout is not None
        reader = asyncio.StreamReader(limit=1 << 20)
        await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), self._process.stdout
        )
        while True:
            try:
                line = await reader.readline()
            except ValueError:  # a line longer than the limit
                continue
            if not line:
                return
            text = line.decode(errors="replace").rstrip()
            self._lines.append(text)
            print(text, file=sys.stderr, flush=True)
            phase = None if self.up else self._phase_of(text)
            if phase:
                self.phase = f"the engine is starting: {phase}"
                self.changed.set()

    async def let_listen(self) -> None:
        if self._writer is not None:
            await say(self._writer, "listen")

    async def ask_to_stop(self) -> None:
        """It finishes what is in flight, when it is up; before that there is nothing to finish."""
        with contextlib.suppress(OSError):
            if self.up and self._writer is not None:
                await say(self._writer, "stop")
            else:
                self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """For one that hears nothing any more."""
        self._process.kill()

    async def end(self, patience: float, at_once: asyncio.Event) -> None:
        """Have it and all that it started gone: by itself within `patience` and some seconds, else by force.

        Before it is up there is nothing to finish, and while it imports it hears no signal.
        """
        waits = [asyncio.create_task(event.wait()) for event in (self._gone, at_once)]
        await asyncio.wait(waits, timeout=patience + 10 if self.up else 2, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        # Its leader is not reaped yet, so the group's number is still its own, and what vLLM orphaned is in it.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        await asyncio.to_thread(self._process.wait)
        await self._rest_gone()
        if self.reading is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(2):
                    await self.reading
        with contextlib.suppress(OSError, ValueError):
            asyncio.get_running_loop().remove_reader(self._watcher)
        os.close(self._watcher)
        if self._writer is not None:
            self._writer.close()
        self._control.close()

    async def _rest_gone(self) -> None:
        """Until nothing of its group is left; what was killed takes a moment to go, and not every init clears up."""
        with contextlib.suppress(ProcessLookupError, PermissionError, TimeoutError):
            async with asyncio.timeout(3):
                while True:
                    os.killpg(self._process.pid, 0)
                    await asyncio.sleep(0.02)


_libc = ctypes.CDLL(None, use_errno=True)


def _end_with_parent() -> None:
    """In the child: SIGTERM when the supervisor dies, however it dies (prctl, PR_SET_PDEATHSIG)."""
    _libc.prctl(1, signal.SIGTERM)
