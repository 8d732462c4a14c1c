"""A real Ray cluster of this machine, in the process of the tests.

Ray is installed beside the rest (requirements/ray.txt), and is put behind it: nothing else of it is found there.
"""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

RAY = Path(__file__).parent.parent / ".venv" / "ray"
STARTED = 120.0  # seconds


def environment() -> dict[str, str]:
    """What has another process find Ray, and join what is started here."""
    others = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    paths = os.pathsep.join(dict.fromkeys([*others, str(RAY)]))
    return {"PYTHONPATH": paths, "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}


@contextmanager
def cluster_here(cpus: int = 2) -> Iterator[str]:
    """A cluster of one node, joined: its address. Where Ray is not installed, the test is skipped."""
    if not (RAY / "ray").is_dir():
        pytest.skip(f"pip install --no-deps --target {RAY} -r requirements/ray.txt")
    from lorakit.cluster.joining import joined

    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment().items():
            patch.setenv(name, value)
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setattr(sys, "path", [*sys.path, str(RAY)])
        joining = ExitStack()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what Ray imports
            ray = joining.enter_context(joined(True, cpus=cpus))
        try:
            yield ray.get_runtime_context().gcs_address
        finally:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of processes that it has killed, and did not wait for
                joining.close()
                gc.collect()


@contextmanager
def joining_node(address: str, log: Path, cpus: int = 1, before: tuple[str, ...] = ()) -> Iterator[None]:
    """Another node of it, started by the command `before`, if any."""
    program = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", f"--address={address}"]
    settings = [f"--num-cpus={cpus}", "--object-store-memory=100000000", "--disable-usage-stats"]
    with log.open("wb") as said:
        node = subprocess.Popen(
            [*before, *program, *settings], env=os.environ | environment(), stdout=said, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
    try:
        end = time.monotonic() + STARTED
        while b"Ray runtime started" not in log.read_bytes():
            assert node.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.05)
        yield
    finally:
        node.send_signal(signal.SIGTERM)
        try:
            node.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(node.pid, signal.SIGKILL)
            node.wait()
