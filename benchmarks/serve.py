"""`lorakit serve` beside the same vLLM without it, on a tiny model: throughput, added delay, and the time from a
finished checkpoint to its first right token.
Run: python benchmarks/serve.py"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the tests' tiny model and real servers
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from tests.server.real import (
    ENGINE_FLAGS,
    QUICK,
    end_group,
    free_port,
    make_random_adapter,
    make_tiny_model,
    serving,
    wait_for,
    write_checkpoint,
)

ASKED = {"prompt": "the quick brown fox", "max_tokens": 16, "temperature": 0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=8, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--checkpoints", type=int, default=21)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        base = make_tiny_model(folder / "base")
        adapters = [make_random_adapter(folder / f"a{seed}", base, seed) for seed in range(2)]
        watched = folder / "runs"
        write_checkpoint(watched / "sql", adapters[0], 1)
        direct = stack.enter_context(plain_vllm(base, adapters[0], folder / "direct.log"))
        flags = ("--watch", str(watched), "--max-loras", "4", "--max-lora-rank", "8")
        server = stack.enter_context(serving(base, folder / "home", folder / "serve.log", *flags))
        compare(direct, server.url, arguments.seconds, arguments.rounds)
        for label, clients in (("idle", 0), ("8 clients busy", 8)):
            with busy(server.url, clients):
                delays = first_answers(server.url, watched, adapters, arguments.checkpoints)
            print(
                f"| checkpoint to first right token, {label} | median {statistics.median(delays):.2f} s, "
                f"largest of {len(delays)} {max(delays):.2f} s |  |  |"
            )


@contextmanager
def plain_vllm(base: Path, adapter: Path, log: Path) -> Iterator[str]:
    """The same engine with the same flags, and the adapter loaded at start."""
    port = free_port()
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(base), "--served-model-name", "base",
        "--host", "127.0.0.1", "--port", str(port), "--enable-lora", "--max-loras", "5", "--max-lora-rank", "8",
        "--max-cpu-loras", "6", "--enforce-eager", "--distributed-executor-backend", "uni", *ENGINE_FLAGS,
        "--disable-uvicorn-access-log", "--lora-modules", f"sql={adapter}",
    ]  # fmt: skip
    variables = {**os.environ, **QUICK, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    with log.open("wb") as stream:
        process = subprocess.Popen(command, env=variables, stdout=stream, stderr=stream, start_new_session=True)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
            wait_for(client, "/health", process, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)
        end_group(process)


def compare(direct: str, gateway: str, seconds: float, rounds: int) -> None:
    """Requests a second and median delay, in turns, so that a noisy neighbour troubles both."""
    print("| what | vLLM alone | lorakit | ratio |\n|---|---|---|---|")
    for clients in (1, 16):
        found: dict[str, list[tuple[float, float]]] = {direct: [], gateway: []}
        for url in found:
            drive(url, clients, 2)
        for _ in range(rounds):
            for url, results in found.items():
                results.append(drive(url, clients, seconds))
        rates = {url: statistics.median(rate for rate, _ in results) for url, results in found.items()}
        delays = {url: statistics.median(delay for _, delay in results) for url, results in found.items()}
        print(
            f"| requests/s, {clients} clients | {rates[direct]:.1f} | {rates[gateway]:.1f} "
            f"| {rates[gateway] / rates[direct]:.2f} |"
        )
        print(
            f"| median delay, {clients} clients | {delays[direct] * 1e3:.1f} ms | {delays[gateway] * 1e3:.1f} ms "
            f"| {(delays[gateway] - delays[direct]) * 1e3:+.1f} ms |"
        )


def drive(url: str, clients: int, seconds: float) -> tuple[float, float]:
    """Closed loop: answers a second, and the median time of one in seconds."""
    times: list[float] = []

    def ask(client: httpx.Client) -> None:
        begun = time.perf_counter()
        client.post("/v1/completions", json={"model": "sql", **ASKED}).raise_for_status()
        times.append(time.perf_counter() - begun)

    begun = time.perf_counter()
    in_parallel(url, clients, ask, until=begun + seconds)
    return len(times) / (time.perf_counter() - begun), statistics.median(times)


def in_parallel(url: str, clients: int, ask: Callable[[httpx.Client], None], until: float) -> None:
    def loop() -> None:
        with httpx.Client(base_url=url, timeout=60) as client:
            while time.perf_counter() < until:
                ask(client)

    threads = [threading.Thread(target=loop) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@contextmanager
def busy(url: str, clients: int) -> Iterator[None]:
    """Clients that keep the engine at work on the base."""
    ends = threading.Event()

    def loop() -> None:
        with httpx.Client(base_url=url, timeout=60) as client:
            while not ends.is_set():
                client.post("/v1/completions", json={"model": "base", **ASKED}).raise_for_status()

    threads = [threading.Thread(target=loop) for _ in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ends.set()
        for thread in threads:
            thread.join()


def first_answers(url: str, watched: Path, adapters: list[Path], count: int) -> list[float]:
    """Seconds from a checkpoint's last byte to the end of the first answer that is its own."""
    delays = []
    with httpx.Client(base_url=url, timeout=60) as client:
        listed = client.get("/v1/adapters/sql").json()["revisions"]
        start = max(revision["step"] for revision in listed) + 1
        for step in range(start, start + count):
            write_checkpoint(watched / "sql", adapters[step % 2], step)
            begun = time.perf_counter()
            while f"step-{step}-" not in _revision(client):
                time.sleep(0.002)
            delays.append(time.perf_counter() - begun)
            time.sleep(0.2)
    return delays


def _revision(client: httpx.Client) -> str:
    response = client.post("/v1/completions", json={"model": "sql", "prompt": "a", "max_tokens": 1, "temperature": 0})
    return response.headers.get("x-lorakit-revision", "")


if __name__ == "__main__":
    main()
