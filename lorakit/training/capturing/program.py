"""Run another program as if it stood in this one's place: its exit code, the signals passed on, the terminal lent.

The program has a process group of its own, so that a signal which reaches this process reaches it once: from us.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from lorakit.errors import LorakitError

# What a terminal sends to all that runs in it, and what is sent to one process.
TO_ALL = (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP)
TO_ONE = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
TOGETHER = 0.1  # seconds within which the same signal twice is one: `timeout` sends to a process and to its group
NOT_EXECUTABLE, NOT_FOUND = 126, 127  # a shell's exit codes


class CannotStart(LorakitError):
    """The program is not there (127), or can't be executed (126), as a shell says it."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class Program:
    """A program that runs; `code` is its exit code, 128 and the signal for one that a signal ended, None before.
    `called_off`: since it ended a signal came, which all that it started got.
    """

    def __init__(self, pid: int, awake: int) -> None:
        self.pid = pid
        self.code: int | None = None
        self.called_off = False
        self._awake = awake
        self._passed: dict[int, float] = {}
        self._terminal = _Terminal()

    def wait(self, seconds: float, *others: int) -> None:
        """Until a signal arrived, one of some other files is readable, or the time is over; then see what became of it.

        Raises:
            OSError: one of the files was closed.
        """
        ready, _, _ = select.select([self._awake, *others], [], [], seconds)
        if self._awake in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(self._awake, 4096)
        self._see()

    @property
    def group_lives(self) -> bool:
        """Whether anything of its process group is still running."""
        try:
            os.killpg(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True
        return _any_runs(self.pid)

    def pass_on(self, number: int) -> None:
        """Send it, or all of its group, a signal that reached this process."""
        now = time.monotonic()
        if now - self._passed.get(number, -TOGETHER) < TOGETHER:
            return
        self._passed[number] = now
        self.called_off = self.code is not None
        with contextlib.suppress(ProcessLookupError):
            if number in TO_ONE and self.code is None:
                os.kill(self.pid, number)
            else:
                os.killpg(self.pid, number)

    def stop(self) -> None:
        """As a terminal's Ctrl+Z: it, and this process with it, until a shell lets both go on."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGTSTP)
        self._terminal.take_back()
        os.kill(os.getpid(), signal.SIGSTOP)

    def go_on(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGCONT)

    def _see(self) -> None:
        while self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG | os.WUNTRACED)
            if pid == 0:
                return
            if os.WIFSTOPPED(status):
                self._is_stopped(os.WSTOPSIG(status))
            else:
                self.code = 128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
                self._terminal.take_back()

    def _is_stopped(self, number: int) -> None:
        """It wants the terminal, or was stopped by one that is lent to it."""
        if number in (signal.SIGTTIN, signal.SIGTTOU) and self._terminal.lend(self.pid):
            self.go_on()
        elif number in (signal.SIGTTIN, signal.SIGTTOU) or (number == signal.SIGTSTP and self._terminal.lent):
            self.stop()


class _Terminal:
    """The controlling terminal, if there is one: which process group may read from it."""

    def __init__(self) -> None:
        self.lent = False

    def lend(self, group: int) -> bool:
        """Whether it is that group's now: it has to be ours to be lent."""
        with _controlling_terminal() as terminal:
            if terminal is None or os.tcgetpgrp(terminal) != os.getpgrp():
                return False
            os.tcsetpgrp(terminal, group)
        self.lent = True
        return True

    def take_back(self) -> None:
        if not self.lent:
            return
        self.lent = False
        before = signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # who is not in the foreground is stopped for trying
        try:
            with _controlling_terminal() as terminal, contextlib.suppress(OSError):
                if terminal is not None:
                    os.tcsetpgrp(terminal, os.getpgrp())
        finally:
            signal.signal(signal.SIGTTOU, before)


def _any_runs(group: int) -> bool:
    """Whether one of them is more than a zombie, which nobody may ever reap; yes where that can not be told."""
    stats = list(Path("/proc").glob("[0-9]*/stat"))
    for stat in stats:
        with contextlib.suppress(OSError, ValueError):
            state, _, its_group, *_ = stat.read_text(errors="replace").rpartition(") ")[2].split()
            if int(its_group) == group and state not in "ZX":
                return True
    return not stats


@contextmanager
def _controlling_terminal() -> Iterator[int | None]:
    try:
        terminal = os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        yield None
        return
    try:
        yield terminal
    finally:
        os.close(terminal)


@contextmanager
def running(command: Sequence[str], environ: Mapping[str, str], *, inherited: Sequence[int] = ()) -> Iterator[Program]:
    """Start a program with this one's stdin, stdout and stderr; signals are passed on to it until the block ends.

    A signal that this process ignores, as under `nohup`, stays ignored by both. Has to be called in the main thread.

    Args:
        inherited: open files that the program gets; they are closed here.

    Raises:
        CannotStart: there is no such program, or it can't be executed.
    """
    early: list[int] = []
    program: Program | None = None

    def arrived(number: int, _: FrameType | None) -> None:
        if program is None:
            early.append(number)
        elif number == signal.SIGTSTP:
            program.stop()
        elif number == signal.SIGCONT:
            program.go_on()
        elif number != signal.SIGCHLD:
            program.pass_on(number)

    with _awoken() as awake, _handled((*TO_ALL, *TO_ONE, signal.SIGTSTP, signal.SIGCONT, signal.SIGCHLD), arrived):
        program = Program(_spawned(command, environ, inherited), awake)
        for number in early:
            arrived(number, None)
        yield program


def _spawned(command: Sequence[str], environ: Mapping[str, str], inherited: Sequence[int]) -> int:
    for file in inherited:
        os.set_inheritable(file, True)
    try:
        # Python ignores two signals, which what it executes would ignore then too.
        return os.posix_spawnp(
            command[0], list(command), environ, setpgroup=0, setsigdef=[signal.SIGPIPE, signal.SIGXFSZ]
        )
    except (FileNotFoundError, NotADirectoryError):
        raise CannotStart(f"there is no program '{command[0]}': name one on PATH, or its path", NOT_FOUND) from None
    except OSError as error:
        why = os.strerror(error.errno).lower() if error.errno else str(error)
        raise CannotStart(f"'{command[0]}' can't be executed: {why}", NOT_EXECUTABLE) from None
    finally:
        for file in inherited:
            os.close(file)


@contextmanager
def _awoken() -> Iterator[int]:
    """A file that is readable when a signal arrived."""
    reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield reader
    finally:
        signal.set_wakeup_fd(before)
        os.close(reader)
        os.close(writer)


@contextmanager
def _handled(numbers: Sequence[int], arrived: signal._HANDLER) -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        for number, handler in before.items():
            if handler != signal.SIG_IGN or number == signal.SIGCHLD:
                signal.signal(number, arrived)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
