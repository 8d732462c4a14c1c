"""What is measured beside one another: vLLM alone, and of every server the numbers of some rounds."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx
from serving_load.load import Seen

from tests.server.real import ENGINE_FLAGS, QUICK, end_group, free_port, wait_for

SLOTS = 4


@contextmanager
def plain_vllm(base: Path, adapters: Mapping[str, Path], log: Path, **more: str) -> Iterator[tuple[str, int]]:
    """The same engine with the same flags, and the adapters loaded at start: its address, and its process. `more` are
    variables."""
    port = free_port()
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(base), "--served-model-name", "base",
        "--host", "127.0.0.1", "--port", str(port), "--enable-lora", "--max-loras", str(SLOTS + 1),
        "--max-lora-rank", "8", "--max-cpu-loras", str(SLOTS + 2), "--enforce-eager",
        "--distributed-executor-backend", "uni", *ENGINE_FLAGS, "--disable-uvicorn-access-log",
        *(["--lora-modules", *(f"{name}={path}" for name, path in adapters.items())] if adapters else []),
    ]  # fmt: skip
    variables = {
        **os.environ, **QUICK, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", **more,
    }  # fmt: skip
    with log.open("wb") as stream:
        process = subprocess.Popen(command, env=variables, stdout=stream, stderr=stream, start_new_session=True)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
            wait_for(client, "/health", process, log)
        yield f"http://127.0.0.1:{port}", process.pid
    finally:
        process.terminate()
        process.wait(30)
        end_group(process)


def medians(results: Sequence[Seen]) -> list[float]:
    """Requests a second; p50, p99 and first byte in seconds; processors' seconds a request."""
    rows = [
        (seen.rate, seen.delay(0.5), seen.delay(0.99), seen.first, seen.processors / len(seen.times))
        for seen in results
    ]
    return [statistics.median(column) for column in zip(*rows, strict=True)]


def started_by(process: int) -> list[int]:
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process)], capture_output=True, text=True)
    children = [int(word) for word in listed.stdout.split()]
    return [*children, *(one for child in children for one in started_by(child))]


def processor_seconds(processes: Sequence[int]) -> float:
    """That they have used so far."""
    stats = [Path(f"/proc/{process}/stat") for process in processes]
    fields = [stat.read_text().rpartition(")")[2].split() for stat in stats if stat.exists()]
    return sum(int(field[11]) + int(field[12]) for field in fields) / os.sysconf("SC_CLK_TCK")
