"""Merges that end at a chosen call to the operating system, or at a chosen moment: for tests of what is left then."""

from __future__ import annotations

import errno
import io
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

WRITING = ("pwrite", "copy_file_range", "fsync", "rename", "truncate", "mkdir", "open", "unlink")


@contextmanager
def each_write(act: Callable[[int, str], None]) -> Iterator[None]:
    """`act(number, name)` comes before every call that changes the disk."""
    count, lock = itertools.count(1), threading.Lock()

    def watched(name: str, call: Callable[..., Any], wanted: Callable[..., bool]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            if wanted(*arguments, **options):
                with lock:
                    act(next(count), name)
            return call(*arguments, **options)

        return counted

    before = {name: getattr(os, name) for name in WRITING}
    opened = io.open
    for name, call in before.items():
        setattr(os, name, watched(name, call, _WANTED.get(name, _always)))
    io.open = watched("open for writing", opened, _writes)  # type: ignore[assignment]
    try:
        yield
    finally:
        io.open = opened  # type: ignore[assignment]
        for name, call in before.items():
            setattr(os, name, call)


def _always(*_: Any, **__: Any) -> bool:
    return True


def _creates(_: Any, flags: int, *__: Any, **___: Any) -> bool:
    return bool(flags & os.O_CREAT)


def _makes(folder: Any, *_: Any, **__: Any) -> bool:
    return not os.path.exists(folder)


def _writes(_: Any, mode: str = "r", *__: Any, **___: Any) -> bool:
    return any(letter in mode for letter in "wxa+")


_WANTED: dict[str, Callable[..., bool]] = {"open": _creates, "mkdir": _makes}


def disk_full_at(number: int) -> Callable[[int, str], None]:
    def act(now: int, name: str) -> None:
        if now == number and name != "unlink":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return act


def killed_at(number: int | None, renames: int | None) -> Callable[[int, str], None]:
    """Before that call, or before the rename of so many shards."""
    left = [renames]

    def act(now: int, name: str) -> None:
        if name == "rename" and left[0] is not None:
            left[0] -= 1
        if now == number or left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    return act


class Runner:
    """A process that has imported all, and forks a child for every merge: a merge in 50 ms instead of 3 s."""

    def __enter__(self) -> Runner:
        command = [sys.executable, "-m", "tests.merge.cut_short"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate(timeout=60)

    def run(self, base: Any, adapter: Any, out: Any, **rule: Any) -> int:
        """How it ended: 0, 5 for a conflict, or -9.

        `call` and `rename` (their numbers), `part` or `seconds` say when it is killed.
        """
        return self.together({"base": base, "adapter": adapter, "out": out, **rule})[0]

    def together(self, *jobs: dict[str, Any]) -> list[int]:
        """How several that run at once ended."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(jobs, default=str) + "\n")
        self._process.stdin.flush()
        ended: list[int] = json.loads(self._process.stdout.readline())
        return ended


def _child(job: dict[str, Any]) -> int:
    from lorakit.errors import LorakitError
    from lorakit.merge import merge as module

    def progress(done: int, total: int) -> None:
        if "part" in job and done >= job["part"] * total:
            os.kill(os.getpid(), signal.SIGKILL)

    try:
        with each_write(killed_at(job.get("call"), job.get("rename"))):
            module.merge(
                job["base"], job["adapter"], out=job["out"], device="cpu", dtype="bf16", progress=progress,
                resume=job.get("resume", False),
            )  # fmt: skip
    except LorakitError as error:
        return error.code
    return 0


def _serve() -> None:
    import lorakit.merge.blocks
    import lorakit.merge.merge
    import lorakit.merge.rounding  # noqa: F401

    for line in sys.stdin:
        jobs = json.loads(line)
        children = []
        for job in jobs:
            child = os.fork()
            if child == 0:
                os._exit(_child(job))
            children.append(child)
        if "seconds" in jobs[0]:
            time.sleep(jobs[0]["seconds"])
            os.kill(children[0], signal.SIGKILL)
        statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        print(json.dumps(statuses), flush=True)


if __name__ == "__main__":
    _serve()
