"""`lorakit capture` as a process of its own, and what it left in the store."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lorakit.store.kept import Kept, kept_in
from tests.checkpoints.written import write_checkpoint

WRITER = str(Path(__file__).with_name("writer.py"))
LIMIT = 120  # seconds, for a machine that does much else

Files = dict[str, str]


def template(folder: Path) -> Path:
    return write_checkpoint(folder / "template", [{"step": 1, "loss": 2.5}, {"step": 1, "eval_loss": 1.5}])


def writer(template: Path, **wish: Any) -> list[str]:
    return [sys.executable, "-S", WRITER, json.dumps({"template": str(template), **wish})]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "lorakit", "capture", *arguments]


def environment(home: Path, **more: str) -> dict[str, str]:
    return {**os.environ, "LORAKIT_HOME": str(home), "PYTHONUNBUFFERED": "1", **more}


@contextmanager
def capturing(home: Path, *arguments: str, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """Ended by its id if it should be there after the block."""
    settings = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL, **options}
    with subprocess.Popen(command(*arguments), text=True, env=environment(home), **settings) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
            for pipe in (process.stdout, process.stderr):
                if pipe is not None and not pipe.closed:
                    pipe.read()


def captured(home: Path, *arguments: str, input: str = "", **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), input=input, capture_output=True, text=True, timeout=LIMIT,
        env=environment(home, **environ), check=False,
    )  # fmt: skip


def said(out: str) -> dict[int, Files]:
    """What the writer printed: the files of each step."""
    return {line["step"]: line["files"] for line in map(json.loads, out.splitlines())}


def files_of(folder: Path) -> Files:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def kept_steps(home: Path, run: str = "writer") -> dict[int | None, Files]:
    return {kept.step: files_of(kept.folder) for kept in kept_of(home, run)}


def kept_of(home: Path, run: str = "writer") -> list[Kept]:
    return [kept for kept in kept_in(home) if kept.run == run]
