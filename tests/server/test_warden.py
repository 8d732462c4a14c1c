"""What outlives a supervisor that was killed, and what is left alone, with `sleep` in vLLM's place."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lorakit.server.supervision.warden import Warden
from tests.server.test_supervisor import gone, is_there

# As Ray ends the worker of a replica by force: all its direct children first, then itself.
STARTER = """
import os, signal, subprocess, sys
from pathlib import Path
from lorakit.server.supervision.warden import Warden

api = subprocess.Popen(
    ["sh", "-c", "sleep 600 & echo $!; wait"], stdout=subprocess.PIPE, text=True, start_new_session=True
)
warden = Warden(api.pid, 0.3)
print(api.pid, api.stdout.readline().strip(), warden.pid, flush=True)
sys.stdin.read()
for one in Path("/proc/self/task").glob("*/children"):
    for child in one.read_text().split():
        os.kill(int(child), signal.SIGKILL)
os.kill(os.getpid(), signal.SIGKILL)
"""


def until(condition: Callable[[], object], seconds: float = 10) -> None:
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends, "it took too long"
        time.sleep(0.02)


def test_what_an_engine_started_ends_with_a_supervisor_that_is_killed_with_all_its_children() -> None:
    starter = subprocess.Popen([sys.executable, "-c", STARTER], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert starter.stdout is not None
    api, core, warden = map(int, starter.stdout.readline().split())
    try:
        time.sleep(0.5)  # past its patience, which counts from the supervisor's end alone
        assert is_there(api)
        assert is_there(core)
        assert is_there(warden)
        starter.communicate(timeout=10)
        assert starter.returncode == -signal.SIGKILL
        until(gone(api, core, warden))
    finally:
        starter.kill()
        if is_there(core):
            os.kill(core, signal.SIGKILL)


@pytest.mark.parametrize("killed", [False, True])
def test_one_that_is_dismissed_leaves_the_group_alone(killed: bool) -> None:
    api = subprocess.Popen(["sleep", "600"], start_new_session=True)
    try:
        warden = Warden(api.pid, 0.0)
        parent = Path(f"/proc/{warden.pid}/stat").read_text().rpartition(")")[2].split()[1]
        assert int(parent) != os.getpid()  # what Ray kills with a worker are its direct children
        if killed:
            os.kill(warden.pid, signal.SIGKILL)
            until(gone(warden.pid))
        warden.dismiss()
        until(gone(warden.pid))
        time.sleep(0.2)
        assert api.poll() is None
    finally:
        api.kill()
        api.wait()
