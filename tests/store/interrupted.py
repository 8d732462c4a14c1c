"""Programs that are killed between two of lorakit's own lines, each of them in turn, or that find the disk full."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

DONE, FAILED = 0, 1
STRIDE = 1 if os.environ.get("HYPOTHESIS_PROFILE") == "search" else 3  # `make test-all` leaves no line out


def kills(action: Callable[[], object], *, every: int = 1, first: int = 1, within: str = "lorakit") -> Iterator[int]:
    """Run `action` in a child that is killed before its n-th line, until it is done: what to check comes between.

    `every` so many lines in `make test-all`, and in each third of those otherwise; lines of the files in the folder
    `within` count, whichever thread runs them.
    """
    line = first
    while (ended := _run(action, line, within)) != DONE:
        assert ended == -signal.SIGKILL, "it failed by itself"
        yield line
        line += every * STRIDE


def _run(action: Callable[[], object], line: int, within: str) -> int:
    child = os.fork()
    if child == 0:
        try:
            killer = _killer(line, within)
            threading.settrace(killer)
            sys.settrace(killer)
            action()
            sys.settrace(None)
            os._exit(DONE)
        except BaseException:
            sys.settrace(None)
            import traceback

            traceback.print_exc()
            os._exit(FAILED)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _killer(line: int, within: str) -> Callable[[FrameType, str, Any], Any]:
    left = line

    def lines(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal left
        if event == "line":
            left -= 1
            if left <= 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return lines

    def calls(frame: FrameType, event: str, argument: Any) -> Any:
        return lines if f"{os.sep}{within}{os.sep}" in frame.f_code.co_filename else None

    return calls
