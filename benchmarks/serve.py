"""`lorakit serve` beside the same vLLM without it, on a tiny model: throughput, delay and its tail; the time from a
finished checkpoint to its first right token; others' requests while adapters are loaded; many adapters in few slots.
Run: python benchmarks/serve.py"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the tests' tiny model and real servers
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from serving_load.adapters import make_many
from serving_load.load import Seen, closed_loop, open_loop, session
from serving_load.peers import SLOTS, medians, plain_vllm, processor_seconds, started_by

from tests.server.real import make_random_adapter, make_tiny_model, serving, write_checkpoint

PARTS = ("requests", "checkpoints", "loads", "many")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=PARTS, action="append", help="one part, or some; default: all")
    parser.add_argument("--seconds", type=float, default=5, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--checkpoints", type=int, default=21)
    parser.add_argument("--loads", type=int, default=100)
    parser.add_argument("--adapters", type=int, default=1000)
    arguments = parser.parse_args()
    parts = arguments.only or PARTS
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        base = make_tiny_model(folder / "base")
        adapters = [make_random_adapter(folder / f"a{seed}", base, seed) for seed in range(2)]
        watched = folder / "runs"
        write_checkpoint(watched / "sql", adapters[0], 1)
        print(f"load of the machine before: {os.getloadavg()[0]:.1f}\n", file=sys.stderr)
        if {"requests", "loads"} & set(parts):
            direct, process = stack.enter_context(plain_vllm(base, {"sql": adapters[0]}, folder / "direct.log"))
        many = make_many(adapters[1], folder / "many", max(arguments.loads, arguments.adapters))
        flags = ("--watch", str(watched), "--root", str(folder / "many"), "--max-loras", str(SLOTS))
        server = stack.enter_context(
            serving(base, folder / "home", folder / "serve.log", *flags, "--max-lora-rank", "8")
        )
        if "requests" in parts:
            peers = {direct: [process, *started_by(process)], server.url: [server.process.pid, *server.processes()]}
            compare(peers, arguments.seconds, arguments.rounds)
        if "checkpoints" in parts:
            until_first_token(server.url, watched, adapters, arguments.checkpoints)
        if "loads" in parts:
            while_loading(direct, server.url, many[: arguments.loads], arguments.seconds)
        if "many" in parts:
            behind_few_slots(server.url, many[: arguments.adapters], arguments.seconds)


# requests


def compare(peers: Mapping[str, Sequence[int]], seconds: float, rounds: int) -> None:
    """vLLM alone and lorakit, by address with their processes, in turns, so that a noisy neighbour troubles both; of
    each number the median of the rounds. What troubles it least is the processors' time that a request takes."""
    print(
        "| clients | answers | vLLM alone, requests/s | lorakit | ratio | p50, ms | lorakit | p99, ms | lorakit "
        f"| first byte, ms | lorakit | processors, ms a request | lorakit |\n{'|---' * 13}|"
    )
    for clients in (1, 16, 64):
        for stream in (False, True):
            found: dict[str, list[Seen]] = {url: [] for url in peers}
            for url in found:
                asyncio.run(closed_loop(url, sql, clients, 1.5, stream=stream))
            for _ in range(rounds):
                for url, results in found.items():
                    before = processor_seconds(peers[url])
                    results.append(asyncio.run(closed_loop(url, sql, clients, seconds, stream=stream)))
                    results[-1].processors = processor_seconds(peers[url]) - before
            alone, with_it = (medians(results) for results in found.values())
            assert not any(seen.failed for results in found.values() for seen in results)
            cells = [f"{alone[0]:.1f} | {with_it[0]:.1f} | {with_it[0] / alone[0]:.2f}"]
            cells += [f"{one * 1e3:.1f} | {other * 1e3:.1f}" for one, other in zip(alone[1:], with_it[1:], strict=True)]
            print(f"| {clients} | {'streamed' if stream else 'whole'} | {' | '.join(cells)} |", flush=True)


def sql() -> str:
    return "sql"


# checkpoints


def until_first_token(url: str, watched: Path, adapters: list[Path], count: int) -> None:
    print("\n| checkpoint to first right token | median, s | p99, s |\n|---|---|---|")
    for label, clients in (("idle", 0), ("8 clients busy", 8)):
        with busy(url, clients):
            delays = sorted(first_answers(url, watched, adapters, count))
        print(f"| {label} | {statistics.median(delays):.2f} | {delays[int(0.99 * len(delays))]:.2f} |", flush=True)


@contextmanager
def busy(url: str, clients: int) -> Iterator[None]:
    """Clients that keep the engine at work on the base."""
    ends = threading.Event()

    def loop() -> None:
        asked = {"model": "base", "prompt": "the quick brown fox", "max_tokens": 16, "temperature": 0}
        with httpx.Client(base_url=url, timeout=60) as client:
            while not ends.is_set():
                client.post("/v1/completions", json=asked).raise_for_status()

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
            time.sleep(1.2)  # what writes faster is loaded no faster
    return delays


def _revision(client: httpx.Client) -> str:
    response = client.post("/v1/completions", json={"model": "sql", "prompt": "a", "max_tokens": 1, "temperature": 0})
    return response.headers.get("x-lorakit-revision", "")


# loads


def while_loading(direct: str, gateway: str, adapters: list[Path], seconds: float) -> None:
    """What others' requests, 20 a second, take while adapters are loaded one after the other, beside no loads."""
    print("\n| others' requests | p50, ms | p99, ms | failed | loads a second |\n|---|---|---|---|---|")
    for what, loaded in (("no loads", []), (f"{len(adapters)} loads", adapters)):
        for label, url in (("vLLM alone", direct), ("lorakit", gateway)):
            seen, taken = asyncio.run(_beside_loads(url, loaded, seconds))
            rate = f"{len(loaded) / taken:.1f}" if loaded else "-"
            row = f"{seen.delay(0.5) * 1e3:.1f} | {seen.delay(0.99) * 1e3:.1f} | {seen.failed} | {rate}"
            print(f"| {label}, {what} | {row} |", flush=True)


async def _beside_loads(url: str, adapters: list[Path], seconds: float) -> tuple[Seen, float]:
    ends = asyncio.Event()
    others = asyncio.create_task(open_loop(url, sql, 20.0, ends))
    begun = time.perf_counter()
    async with session(url) as client:
        for folder in adapters:
            asked = {"lora_name": f"{folder.name}-loaded", "lora_path": str(folder)}
            async with client.post("/v1/load_lora_adapter", json=asked) as response:
                response.raise_for_status()
        taken = time.perf_counter() - begun
        await asyncio.sleep(max(0.0, seconds - taken))
    ends.set()
    return await others, taken


# many


def behind_few_slots(url: str, adapters: list[Path], seconds: float) -> None:
    """Each of them is loaded once; then 8 clients ask for any of them, and for some more often than for others."""
    with httpx.Client(base_url=url, timeout=120) as client:
        begun = time.perf_counter()
        for folder in adapters:
            asked = {"lora_name": folder.name, "lora_path": str(folder)}
            client.post("/v1/load_lora_adapter", json=asked).raise_for_status()
        taken = time.perf_counter() - begun
    print(
        f"\n{len(adapters)} adapters behind {SLOTS} slots, {taken / len(adapters) * 1e3:.1f} ms to load each at first:"
    )
    print("\n| asked for | requests/s | p50, ms | p99, ms | failed |\n|---|---|---|---|---|")
    chance = random.Random(0)
    names = [folder.name for folder in adapters]
    shares = [1 / (place + 1) for place in range(len(names))]
    ways: list[tuple[str, Callable[[], str]]] = [
        ("one of them", lambda: names[0]),
        ("all alike", lambda: chance.choice(names)),
        ("the n-th with a share of 1/n", lambda: chance.choices(names, shares)[0]),
    ]
    for label, model in ways:
        seen = asyncio.run(closed_loop(url, model, 8, max(10.0, seconds), stream=False))
        row = f"{seen.rate:.1f} | {seen.delay(0.5) * 1e3:.1f} | {seen.delay(0.99) * 1e3:.1f} | {seen.failed}"
        print(f"| {label} | {row} |", flush=True)


if __name__ == "__main__":
    main()
