"""Ends what an engine started when its supervisor is gone: vLLM's own children may outlive the process that made them.

Run by path as a small program of its own, with nothing but the standard library: `python -IS warden.py GROUP SECONDS`.
It waits for the end of its standard input, which the supervisor holds open.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time


def start(group: int, patience: float) -> subprocess.Popen[bytes]:
    """Watch over a process group for as long as the caller lives; close its standard input, or kill it, to end."""
    return subprocess.Popen(
        [sys.executable, "-IS", __file__, str(group), str(patience)], stdin=subprocess.PIPE, start_new_session=True
    )


def watch(group: int, patience: float) -> None:
    """Give the group some seconds to end by itself once the supervisor is gone, then end it."""
    while os.read(0, 4096):
        pass
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
    watch(int(sys.argv[1]), float(sys.argv[2]))
