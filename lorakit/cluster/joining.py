"""Joining a Ray cluster: the one that is named, or one of this machine alone for as long as the work takes.

Ray is imported here and nowhere else, and only when it is asked for.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
import signal
import socket
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lorakit.errors import LorakitError, UsageError
from lorakit.files.folders import temporary_folder

ADDRESS = "RAY_ADDRESS"
ANSWERS = 5.0  # seconds to wait for a connection
OBJECT_STORE = 100 << 20  # bytes; what is sent between processes is small, and Ray would take 30% of the memory
_SAFE = "RAY_AUTH_MODE"
_OOM = {"RAY_task_oom_retries": "3"}  # of a task that a node ended for want of memory: Ray's default is for ever
_LONGEST = 18  # letters: the sockets deep below it are named by paths of at most 107

Where = str | bool  # an address; True for the one that RAY_ADDRESS names, else for a cluster of this machine


def ensure_installed() -> None:
    """Raises UsageError where Ray is not."""
    if find_spec("ray") is None:
        raise UsageError("Ray is not installed, which --ray needs: pip install 'lorakit[ray]'")


@contextmanager
def joined(
    where: Where, *, cpus: int | None = None, object_store: int = OBJECT_STORE, logs: bool = False
) -> Iterator[Any]:
    """The module `ray`, with a cluster joined; at the end it is left, or ended where it was started for this.

    A program that has joined one already goes on with that. `cpus` and `object_store` (bytes) are for one that is
    started: by default all cores that this process may use. `logs`: what its workers write is shown on stderr.

    Raises:
        UsageError: Ray is not installed, or the address is of a kind that can't be joined.
        LorakitError: the cluster can't be joined, or none can be started.
    """
    ensure_installed()
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():
        yield sys.modules["ray"]
        return
    address = (where if isinstance(where, str) else "") or os.environ.get(ADDRESS, "")
    _ensure_answers(address)
    options: dict[str, Any] = {"address": address, "log_to_driver": logs, "logging_level": logging.ERROR}
    with contextlib.ExitStack() as stack:
        if address in ("", "local"):
            options |= {
                "address": "local", "num_cpus": cpus or len(os.sched_getaffinity(0)), "include_dashboard": False,
                "object_store_memory": object_store, "_temp_dir": str(stack.enter_context(_short_folder())),
            }  # fmt: skip
            stack.enter_context(_variables(_ours()))
        # Whoever begins a task counts, so this holds on any cluster; it is read as Ray is imported.
        stack.enter_context(_variables({name: os.environ.get(name, value) for name, value in _OOM.items()}))
        ray: Any = import_module("ray")
        stack.callback(ray.shutdown)
        _begin(ray, options, address)
        yield ray


def _ensure_answers(address: str) -> None:
    """Ray itself would wait for minutes."""
    if address.startswith("ray://"):
        raise UsageError(
            f"'{address}' is of Ray's client, which has no part in the cluster's files: run this on one of its "
            f"machines, and name the cluster itself (HOST:6379)"
        )
    if address in ("", "local", "auto"):
        return
    match = re.fullmatch(r"\[?([^\[\]/]+)\]?:(\d{1,5})", address)
    if match is None:
        raise UsageError(f"'{address}' is no address of a Ray cluster: write HOST:PORT, as `ray start` says it")
    try:
        socket.create_connection((match[1], int(match[2])), ANSWERS).close()
    except (OSError, OverflowError) as error:
        raise LorakitError(
            f"no Ray cluster answers at '{address}' ({error}): `ray status` on one of its machines says where it is"
        ) from error


def _begin(ray: Any, options: dict[str, Any], address: str) -> None:
    before = signal.getsignal(signal.SIGTERM)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what later versions of Ray will do
            ray.init(**options)
    except (ConnectionError, RuntimeError, ValueError, OSError, ray.exceptions.RayError) as error:
        said = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if address:
            raise LorakitError(
                f"can't join the Ray cluster '{address}': {said}; `ray status` says whether it runs, and this machine "
                f"has to be one of its nodes, with the same versions of Ray and Python"
            ) from error
        raise LorakitError(f"Ray could not be started on this machine: {said}") from error
    finally:
        if threading.current_thread() is threading.main_thread() and before is not None:
            signal.signal(signal.SIGTERM, before)  # Ray's own would end the process here and now


@contextmanager
def _short_folder() -> Iterator[Path]:
    """Where Ray puts its sockets and logs, gone at the end; that of a killed process is removed by the next."""
    parent = tempfile.gettempdir()
    with temporary_folder(Path(parent if len(parent) <= _LONGEST else "/tmp"), "lorakit-ray-", 0o700) as folder:
        yield folder


def _ours() -> dict[str, str]:
    """What a cluster that is started here is told: to tell nobody of it, and to let nobody else in. Ray listens on
    every address of the machine, and whoever can reach it could run programs there.
    """
    if _SAFE in os.environ or "ray" in sys.modules:  # it has read that as it was imported
        return {"RAY_USAGE_STATS_ENABLED": "0"}
    return {"RAY_USAGE_STATS_ENABLED": "0", _SAFE: "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}


@contextmanager
def _variables(wanted: dict[str, str]) -> Iterator[None]:
    """Of the environment, which the cluster's processes inherit."""
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
