"""Programs that the demo starts: each writes to a log of its own, and is stopped when it is no longer wanted.
Nothing to run here; see demo.py."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


class Failed(Exception):
    """Something is not what it must be."""


@dataclass(frozen=True)
class Program:
    """A process that was started here, and will be stopped here."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    def is_running(self) -> bool:
        """Raises Failed when it has ended badly."""
        code = self.process.poll()
        if code:
            raise Failed(f"{self.name} ended with {code}; {self.last_words()}")
        return code is None

    def last_words(self, count: int = 25) -> str:
        return "its log ends with\n" + "\n".join(self.log.read_text(errors="replace").splitlines()[-count:])

    def stop(self) -> None:
        if self.process.poll() is not None:
            return
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(40)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@contextmanager
def started(name: str, log: Path, command: list[object], **variables: str) -> Iterator[Program]:
    # One thread each: models this small gain nothing from more, and several programs share the cores. A session of its
    # own each: Ctrl+C reaches this program alone, which then stops the others in their order.
    environ = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [str(part) for part in command], stdout=stream, stderr=stream, env=environ, start_new_session=True
        )
    program = Program(name, process, log)
    try:
        yield program
    finally:
        program.stop()


def run(name: str, log: Path, command: list[object], **variables: str) -> None:
    with started(name, log, command, **variables) as program:
        program.process.wait()
        program.is_running()
