"""Which servers run on a store: each holds a lock for as long as it lives, however it ends."""

from __future__ import annotations

import fcntl
import json
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from lorakit.errors import disk_errors_named
from lorakit.store.store import open_store

FOLDER = "serving"


@dataclass(frozen=True, slots=True)
class Serving:
    """A server that runs now; `started` in seconds since 1970, `url` empty where it is not known; `file` says it."""

    pid: int
    base: str
    url: str
    started: float
    file: Path

    def __str__(self) -> str:
        return f"the server {self.url or 'of vLLM'} (process {self.pid})"


@contextmanager
def serving(home: Path, base: str, url: str = "") -> Iterator[Path]:
    """Say that a server of a base runs on a store, until the end of the block or of the process: the file that does."""
    folder = home / FOLDER
    file = folder / f"{uuid.uuid4().hex}.json"
    beside = file.with_suffix(".tmp")
    with disk_errors_named(folder):
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(beside, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        with disk_errors_named(folder):
            fcntl.flock(handle, fcntl.LOCK_EX)
            said = {"pid": os.getpid(), "base": base, "url": url, "started": time.time()}
            os.write(handle, json.dumps(said).encode())
            beside.rename(file)  # locked before it has the name that others look for
        yield file
    finally:
        for name in (beside, file):
            with suppress(OSError):
                name.unlink()
        os.close(handle)


def serving_now(home: Path) -> list[Serving]:
    """The servers that run on a store; what dead ones left is cleared away."""
    found = []
    for file in sorted((home / FOLDER).glob("*.json")):
        try:
            handle = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:  # it has just ended
            continue
        try:
            if _is_held(handle):
                found.append(_read(handle, file))
            else:
                for left in (file.with_suffix(".sock"), file):
                    with suppress(OSError):
                        left.unlink()
        finally:
            os.close(handle)
    return found


def in_use(home: Path) -> dict[tuple[str, int], str]:
    """What running servers may be asked for by an alias: base and id of each revision, and who needs it as what."""
    found: dict[tuple[str, int], str] = {}
    for server in sorted(serving_now(home), key=lambda one: not one.url):  # the supervisor knows where to reach it
        with open_store(home, server.base) as store:
            runs = store.runs()
        for run in runs.values():
            for name, revision in run.pointed_at():
                found.setdefault((server.base, revision.id), f"{server} serves it as '{name}'")
    return found


def _is_held(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    return False


def _read(handle: int, file: Path) -> Serving:
    said = json.loads(os.read(handle, 1 << 16))
    return Serving(said["pid"], said["base"], said["url"], said["started"], file)
