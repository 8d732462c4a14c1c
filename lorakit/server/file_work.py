"""File work beside the event loop: quick, without making the loop slow."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

# A busy event loop gives the interpreter away after 5 ms, and a thread that touches the disk asks for it after each
# call: at that rate a checkpoint would take seconds to come in. But an engine that streams to many clients has threads
# of its own, and with short turns for good it would lose a twentieth of its throughput.
SHORT_TURN = 0.0005

_P = ParamSpec("_P")
_T = TypeVar("_T")
_lock = threading.Lock()
_usual: list[float] = []  # what to go back to, once for each that is at work


async def file_work(function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """As `asyncio.to_thread`, with short turns of the interpreter for all threads until the function has ended."""

    def at_work() -> _T:
        with _short_turns():
            return function(*args, **kwargs)

    return await asyncio.to_thread(at_work)


@contextmanager
def _short_turns() -> Iterator[None]:
    with _lock:
        _usual.append(_usual[0] if _usual else sys.getswitchinterval())
        _set_turn(min(_usual[0], SHORT_TURN))
    try:
        yield
    finally:
        with _lock:
            usual = _usual.pop()
            if not _usual:
                _set_turn(usual)


def _set_turn(seconds: float) -> None:
    sys.setswitchinterval(seconds + 0.5e-6)  # which it cuts to whole microseconds: what it said is not to shrink
