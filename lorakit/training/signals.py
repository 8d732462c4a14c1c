"""Signals that set a flag while a training loop runs, and do what they did before when it does not."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from types import CodeType, FrameType
from typing import Any

Handler = Callable[[int, FrameType | None], Any] | int | None


class SignalFlag:
    """`received` is the first signal that came, or None.

    Processes that are forked while it is installed go on through Ctrl+C and whatever else their trainer heeds; what
    stops one of them, SIGTERM, does so.

    Args:
        signals: those to catch.
        once: the second one ends the process at once, as the system ends it; else the earlier handler is called too.
        said: what the first one prints on stderr.
    """

    def __init__(self, signals: Iterable[signal.Signals], *, once: bool = False, said: str = "") -> None:
        self.received: int | None = None
        self._signals = tuple(signals)
        self._once = once
        self._said = said
        self._earlier: dict[int, Handler] = {}
        self._process = 0
        self._loop: CodeType | None = None

    def install(self) -> bool:
        """False outside of the main thread, where Python has no signals. What the process ignores it goes on to ignore:
        whoever started it in the background, say, wanted that.
        """
        if threading.current_thread() is not threading.main_thread():
            return False
        self.restore()
        self.received = None
        self._process = os.getpid()
        self._loop = _training_loop(sys._getframe(1))
        for each in self._signals:
            if signal.getsignal(each) != signal.SIG_IGN:
                self._earlier[each] = signal.signal(each, self._caught)
        _INSTALLED.add(self)
        return True

    def restore(self) -> None:
        """Put back what was there, except where somebody else has put something since."""
        if threading.current_thread() is not threading.main_thread():
            return
        _INSTALLED.discard(self)
        for each in self._earlier:
            self._leave_row(each)
        self._earlier.clear()

    def leave_to_earlier(self, number: int) -> None:
        """What comes of this signal is no more this one's to say."""
        if number in self._earlier:
            self._leave_row(number)
            del self._earlier[number]

    def _leave_row(self, number: int) -> None:
        """Each handler calls the one before it: with two flags, the one that goes may not be the last that came."""
        earlier = self._earlier[number]
        later, current = None, signal.getsignal(number)
        while current not in (self._caught, signal.SIG_DFL):
            later = getattr(current, "__self__", None)
            if not isinstance(later, SignalFlag):
                return
            current = later._earlier.get(number)
        if later is not None:
            later._earlier[number] = earlier
        elif earlier is not None:  # one that Python did not set, and can't set again
            signal.signal(number, earlier)

    def _once_more_ends(self) -> None:
        """What came may have come to a whole group, and torch takes the end of processes that load data for a failure
        of the training.
        """
        ending = tuple(self._earlier)
        self._earlier[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, self._caught)
        for each in ending:
            signal.signal(each, signal.SIG_DFL)

    def _caught(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGCHLD:
            return
        earlier = self._earlier.get(number, signal.SIG_DFL)
        if os.getpid() != self._process:  # a worker that loads data: what its trainer heeds is not its business
            if number == signal.SIGTERM:
                _call(earlier, number, frame)
            return
        if number not in self._earlier or not _runs(self._loop, frame):  # it ended with an error, and nobody told us
            self.restore()
            _call(earlier, number, frame)
            return
        first, self.received = self.received is None, self.received or number
        if self._once:
            self._once_more_ends()
        elif callable(earlier):
            earlier(number, frame)
        if first and self._said and os.environ.get("LOCAL_RANK", "0") == "0":
            with suppress(OSError):
                os.write(2, self._said.encode())


_INSTALLED: set[SignalFlag] = set()


def _in_a_forked_process() -> None:
    """A multiprocessing.Pool ends its processes by SIGTERM, and waits for them."""
    for flag in _INSTALLED:
        flag.leave_to_earlier(signal.SIGTERM)


os.register_at_fork(after_in_child=_in_a_forked_process)


def _call(handler: Handler, number: int, frame: FrameType | None) -> None:
    """Do what a signal does where this is its handler."""
    if callable(handler):
        handler(number, frame)
    elif handler != signal.SIG_IGN:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


def _training_loop(frame: FrameType | None) -> CodeType | None:
    """What calls the callbacks: the code below the last of the frames that do."""
    while frame is not None and frame.f_code.co_name != "on_train_begin":
        frame = frame.f_back
    while frame is not None and frame.f_code.co_name in ("on_train_begin", "call_event"):
        frame = frame.f_back
    return frame.f_code if frame else None


def _runs(code: CodeType | None, frame: FrameType | None) -> bool:
    """Whether the code is among what was running when the signal came; True when there is none to look for."""
    while code is not None and frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return code is None or frame is not None
