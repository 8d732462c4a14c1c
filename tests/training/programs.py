"""The trainer of this folder as a program: started, asked, interrupted, ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.readme import ROOT

LIMIT = 120  # seconds, for a machine that does much else


def command(output: Path, **wish: Any) -> list[str]:
    return ["-m", "tests.training.trainer", json.dumps({"output": str(output), **wish})]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PYTHONWARNINGS": "default"}


@contextmanager
def training(output: Path, *, ranks: int = 1, **wish: Any) -> Iterator[subprocess.Popen[str]]:
    """A group of processes of its own, which nothing outlives."""
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--master_port", "0", "--standalone"]
    arguments = [*(launcher if ranks > 1 else []), *command(output, **wish)]
    process = subprocess.Popen(
        [sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
        env=environment(), start_new_session=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM if ranks > 1 else signal.SIGKILL)  # torchrun ends its own
        process.communicate(timeout=LIMIT)


def lines_until(process: subprocess.Popen[str], wanted: str) -> list[str]:
    """What it prints, up to the first line with those words."""
    assert process.stdout
    lines = []
    for line in process.stdout:
        lines.append(line.rstrip())
        if wanted in line:
            return lines
    raise AssertionError(f"it never said '{wanted}': " + "\n".join(lines[-40:]))


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    shown, _ = process.communicate(timeout=LIMIT)
    return process.returncode, shown


def trained(output: Path, **wish: Any) -> tuple[int, str]:
    with training(output, **wish) as process:
        return ended(process)
