"""Ends what an engine started when its supervisor is gone: vLLM's own children may outlive the process that made them.

Run by path as a small program of its own, with nothing but the standard library: `python -IS warden.py GROUP SECONDS`.
It goes on as a child of init, and says its number: Ray ends a worker by force together with all its direct children.
Then it reads its standard input, which the supervisor holds open: the end of that means that the supervisor is gone,
and a byte that it is not needed any more.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time


class Warden:
    """Watches over a process group for as long as this process lives, or until it is dismissed. When this process is
    gone, the group has `patience` seconds to end by itself."""

    def __init__(self, group: int, patience: float) -> None:
        starter = subprocess.Popen(
            [sys.executable, "-IS", __file__, str(group), str(patience)], bufsize=0, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        assert starter.stdin is not None
        assert starter.stdout is not None
        with starter.stdout as said:
            self.pid = int(said.readline() or 0)
        starter.wait()
        self._held = starter.stdin

    def dismiss(self) -> None:
        """Have it leave the group alone. To be called once."""
        with contextlib.suppress(BrokenPipeError), self._held:
            self._held.write(b"\0")
        if self.pid:
            with contextlib.suppress(ChildProcessError):  # it is this process's own only where this one is init
                os.waitpid(self.pid, 0)


def watch(group: int, patience: float) -> None:
    """Give the group some seconds to end by itself once the supervisor is gone, then end it."""
    if os.read(0, 1):
        return
    ends = time.monotonic() + patience
    while _runs(group):
        if time.monotonic() > ends:
            os.killpg(group, signal.SIGKILL)
            return
        time.sleep(0.1)


def _runs(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # the number is another's by now
        return False
    return True


if __name__ == "__main__":
    if own := os.fork():
        print(own, flush=True)
        os._exit(0)
    os.close(1)
    watch(int(sys.argv[1]), float(sys.argv[2]))
