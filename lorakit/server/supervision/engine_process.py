"""One engine process as the supervisor sees it: what it says over its line, what it logs, and its end.

It imports nothing that the engine does.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lorakit.server.engines.vllm import undecorated
from lorakit.server.sight.logs import LogFormat, engine_line
from lorakit.server.supervision import line
from lorakit.server.supervision.line import Line
from lorakit.server.supervision.listener import CONTROL_FD
from lorakit.server.supervision.warden import Warden

_HOLD = 10.0  # seconds that a gateway has to come to rest
_LAST_LINES = 40
_LAST_CHARACTERS = 2048  # of what is handed down to the next engine

Command = Callable[[str], tuple[list[str], dict[str, str]]]  # from a private socket's path: arguments, variables
PhaseOf = Callable[[str], str | None]


class EngineProcess:
    """One engine process with all that it starts, in a session of its own so that Ctrl+C reaches this process alone.

    `reports` holds the words that it has said: `here`, `up`, `ready`, `failed`. It has `patience` seconds to end by
    itself when this process is gone.
    """

    def __init__(
        self, command: tuple[list[str], dict[str, str]], phase_of: PhaseOf, patience: float, form: LogFormat,
        what: str = "engine",
    ) -> None:  # fmt: skip
        arguments, variables = command
        ours, theirs = line.pair()
        self._process = subprocess.Popen(
            arguments, env={**variables, CONTROL_FD: str(theirs.fileno())}, pass_fds=(theirs.fileno(),),
            start_new_session=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            preexec_fn=end_with_parent,
        )  # fmt: skip
        theirs.close()
        self._warden = Warden(self._process.pid, patience)
        self._line = Line(ours)
        self._phase_of = phase_of
        self._form = form
        self._lines: deque[str] = deque(maxlen=_LAST_LINES)
        self._heard = self._spoke = self._started = time.monotonic()
        self._stuck = 0.0
        self._what = what
        self._phase = "importing vLLM" if what == "engine" else "waiting for the engines"
        self._why = ""
        self._code: int | None = None  # while it is not reaped
        self._closed = False
        self.reports: set[str] = set()
        self.begun = self.listening = False
        self.changed = asyncio.Event()
        self._holds = asyncio.Event()
        self._watcher = os.pidfd_open(self._process.pid)
        self._gone = asyncio.Event()
        asyncio.get_running_loop().add_reader(self._watcher, self._noticed_end)
        self._hearing = asyncio.create_task(self._hear())
        self._reading = asyncio.create_task(self._read_log())

    def _noticed_end(self) -> None:
        asyncio.get_running_loop().remove_reader(self._watcher)
        with contextlib.suppress(ChildProcessError):
            # It is left to be reaped: until then its group's number stays its own.
            found = os.waitid(os.P_PIDFD, self._watcher, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if found is not None:
                self._code = found.si_status if found.si_code == os.CLD_EXITED else -found.si_status
        self._gone.set()
        self.changed.set()

    # what is known of it

    @property
    def ended(self) -> bool:
        return self._gone.is_set()

    @property
    def age(self) -> float:
        """Seconds since it was started."""
        return time.monotonic() - self._started

    @property
    def silent(self) -> float:
        """Seconds without a sign of life: from its process, or from what is behind it."""
        return max(time.monotonic() - self._heard, self._stuck)

    @property
    def quiet(self) -> float:
        """Seconds in which it logged nothing."""
        return time.monotonic() - self._spoke

    @property
    def phase(self) -> str:
        return f"the {self._what} is starting: {self._phase}"

    @property
    def last_words(self) -> str:
        """What it logged last, as far as it matters."""
        return "\n".join(f"  {text}" for text in self._lines)

    @property
    def how_it_ended(self) -> str:
        """Once it has: why it was ended, or how it ended by itself."""
        code = self._process.returncode if self._process.returncode is not None else self._code
        by_itself = f"killed by {signal.Signals(-code).name}" if code and code < 0 else f"exit code {code}"
        return self._why or by_itself

    def as_ended(self) -> dict[str, Any]:
        """Its end, for the events of the next one."""
        return {"how": self.how_it_ended, "ended": time.time(), "last_words": self.last_words[-_LAST_CHARACTERS:]}

    def members(self) -> list[int]:
        """The processes of its group: itself, and what it started."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if os.getpgid(int(folder.name)) == self._process.pid:
                    found.append(int(folder.name))
        return found

    def past_help(self, *, hung: float, start: float) -> str | None:
        """Why it is to be ended, if it is: seconds without a sign of life, and without a line in its log while it
        starts."""
        if "failed" in self.reports:
            return self.how_it_ended
        if "up" in self.reports and self.silent > hung:
            return f"it has not answered for {self.silent:.0f} s"
        if "here" not in self.reports and self.quiet > start:
            return f"it has logged nothing for {self.quiet:.0f} s while it started"
        return None

    # what it says

    async def _hear(self) -> None:
        while word := await self._line.hear():
            self._heard = time.monotonic()
            self._stuck = word.data.get("stuck", 0.0)
            if word.say == "failed":
                self._why = word.data["reason"]
            if word.say == "hold":
                self._holds.set()
            elif word.say != "alive":
                self.reports.add(word.say)
            self.changed.set()

    async def _read_log(self) -> None:
        """Pass its log on, and read from it what it is doing."""
        assert self._process.stdout is not None
        reader = asyncio.StreamReader(limit=1 << 20)
        await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), self._process.stdout
        )
        while True:
            try:
                raw = await reader.readline()
            except ValueError:  # a line longer than the limit
                continue
            if not raw:
                return
            text = undecorated(raw.decode(errors="replace").rstrip())
            self._lines.append(text)
            self._spoke = time.monotonic()
            print(engine_line(text, self._form), file=sys.stderr, flush=True)
            phase = None if "up" in self.reports else self._phase_of(text)
            if phase:
                self._phase = phase
                self.changed.set()

    # what it is told

    async def begin(self) -> None:
        """Its gateway may start."""
        self.begun = True
        await self.tell("begin")

    async def listen(self, public: socket.socket, ended: Sequence[dict[str, Any]]) -> None:
        """Give it the public socket, and what engines before it said last."""
        self.listening = True
        await self.tell("listen", handles=[public.fileno()], ended=list(ended))

    async def hold(self) -> None:
        """Have it change nothing in the store from now on. One whose gateway has not begun changes nothing anyway."""
        if not self.begun:
            return
        self._holds.clear()
        await self.tell("hold")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_HOLD):
                await self._holds.wait()

    async def tell(self, word: str, *, handles: Sequence[int] = (), **more: Any) -> None:
        """One that is gone hears nothing."""
        with contextlib.suppress(OSError):
            await self._line.say(word, handles=handles, **more)

    async def ask_to_stop(self) -> None:
        """It finishes what is in flight, when it is up; before that there is nothing to finish."""
        if "up" in self.reports:
            await self.tell("stop")
        else:
            self._process.send_signal(signal.SIGTERM)

    def kill(self, why: str) -> None:
        """For one that is of no more use."""
        self._why = why
        self._process.kill()

    async def end(self, patience: float, at_once: asyncio.Event) -> None:
        """Have it and all that it started gone: by itself within `patience` seconds, else by force.

        Before it is up there is nothing to finish, and while it imports it hears no signal. Once it is over, nothing
        happens; where it was cancelled, it is to be called again.
        """
        if self._closed:
            return
        waits = [asyncio.create_task(event.wait()) for event in (self._gone, at_once)]
        limit = patience if "up" in self.reports else 2
        await asyncio.wait(waits, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        # Its leader is not reaped yet, so the group's number is still its own, and what vLLM orphaned is in it.
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
        await asyncio.to_thread(self._process.wait)
        await self._rest_gone()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(2):
                await self._reading
        self._hearing.cancel()
        await asyncio.gather(self._hearing, return_exceptions=True)
        self._close()

    def _close(self) -> None:
        if self._closed:  # by another call meanwhile
            return
        self._closed = True
        with contextlib.suppress(OSError, ValueError):
            asyncio.get_running_loop().remove_reader(self._watcher)
        os.close(self._watcher)
        self._line.close()
        self._warden.dismiss()

    async def _rest_gone(self) -> None:
        """Until nothing of its group is left; what was killed takes a moment to go, and not every init clears up."""
        with contextlib.suppress(ProcessLookupError, PermissionError, TimeoutError):
            async with asyncio.timeout(3):
                while True:
                    os.killpg(self._process.pid, 0)
                    await asyncio.sleep(0.02)


_libc = ctypes.CDLL(None, use_errno=True)


def end_with_parent() -> None:
    """In the child: SIGTERM when the process that started it dies, however it dies (prctl, PR_SET_PDEATHSIG)."""
    _libc.prctl(1, signal.SIGTERM)
