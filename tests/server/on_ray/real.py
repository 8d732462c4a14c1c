"""A real Ray with real engines on it: `lorakit serve --ray`, and what its replicas are."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.real import ENGINE_FLAGS, QUICK, Server, free_port, is_running, wait_for

RAY = Path(__file__).parents[3] / ".venv" / "ray"
REPLICA = "x-lorakit-replica"


def environment(before: Path | None = None) -> dict[str, str]:
    """What finds Ray, which is installed beside the rest (requirements/ray.txt); where it is not, the test is
    skipped. `before`: a folder whose packages count first."""
    if not (RAY / "ray").is_dir():
        pytest.skip(f"pip install --no-deps --target {RAY} -r requirements/ray.txt")
    path = os.pathsep.join([*([str(before)] if before else []), str(RAY.parents[1]), str(RAY)])
    return {**os.environ, **QUICK, "PYTHONPATH": path, "RAY_USAGE_STATS_ENABLED": "0"}


@contextmanager
def serving_on_ray(
    base: Path, folder: Path, *flags: str, ray: str = "--ray", before: Path | None = None, limit: float = 400
) -> Iterator[Server]:
    """`lorakit serve --ray`, ready, with its store and its log in `folder`; ended by Ctrl+C, which leaves no process
    behind."""
    port, log = free_port(), folder / "serve.log"
    command = [
        sys.executable, "-m", "lorakit", "serve", str(base), ray, "--port", str(port), *flags, "--", *ENGINE_FLAGS,
    ]  # fmt: skip
    environ = {**environment(before), "LORAKIT_HOME": str(folder / "home")}
    with log.open("wb") as stream:
        process = subprocess.Popen(command, env=environ, stdout=stream, stderr=stream)
    with interrupted_at_the_end(process, port, log, limit, gone=20) as server:
        yield server
    assert process.returncode == 130, log.read_text(errors="replace")[-4000:]


@contextmanager
def interrupted_at_the_end(
    process: subprocess.Popen[bytes], port: int, log: Path, limit: float, *, gone: float
) -> Iterator[Server]:
    """A program that serves, ready within `limit` seconds; ended by Ctrl+C, and `gone` seconds later with all that it
    started."""
    server = Server(process, f"http://127.0.0.1:{port}", log)
    try:
        with server.client() as client:
            wait_for(client, "/ready", process, log, limit)
        yield server
    finally:
        started = server.processes()
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        server.wait_until(lambda: not [pid for pid in started if is_running(pid)], gone)


def engines(server: Server) -> dict[int, int]:
    """The processes of the replicas, and of the engine that each has started: Ray's, and vLLM's."""
    found = {}
    for pid in server.processes():
        words = Path(f"/proc/{pid}/cmdline").read_bytes() if Path(f"/proc/{pid}/cmdline").exists() else b""
        if b"vllm.entrypoints" in words:
            status = Path(f"/proc/{pid}/stat").read_text()
            found[int(status.rpartition(")")[2].split()[1])] = pid
    return found


def replicas_known(server: Server) -> set[str]:
    """The replicas that the gateway has metrics of."""
    with server.client() as client:
        lines = client.get("/metrics").text.splitlines()
    told = [line for line in lines if line.startswith("vllm:num_requests_running{")]
    return {line.partition('replica="')[2].partition('"')[0] for line in told}


def asked_at_once(server: Server, body: Mapping[str, Any], count: int) -> list[httpx.Response]:
    """The answers to so many equal requests."""

    def ask(_: int) -> httpx.Response:
        with server.client() as client:
            return client.post("/v1/completions", json=body)

    with ThreadPoolExecutor(count) as beside:
        return list(beside.map(ask, range(count)))


def by_replica(answers: list[httpx.Response]) -> Counter[str]:
    return Counter(answer.headers[REPLICA] for answer in answers)


def said(answer: httpx.Response) -> Any:
    return json.loads(answer.text)


@contextmanager
def run_by_ray(config: Path, port: int, folder: Path, limit: float = 200) -> Iterator[Server]:
    """`serve run CONFIG`, Ray's own command, ready; ended by Ctrl+C, which leaves no process behind."""
    log = folder / "run.log"
    command = [sys.executable, "-c", "from ray.serve.scripts import cli; cli()", "run", str(config)]
    short = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # of sockets, whose paths have 107 letters at most
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command, env={**environment(), "RAY_TMPDIR": str(short)}, stdout=stream, stderr=stream
        )  # fmt: skip
    try:
        with interrupted_at_the_end(process, port, log, limit, gone=30) as server:
            yield server
    finally:
        shutil.rmtree(short, ignore_errors=True)


def named(server: Server, title: str) -> list[int]:
    """Ray's processes that call themselves so."""
    found = []
    for pid in server.processes():
        with contextlib.suppress(OSError):
            if title.encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
    return found
