"""What each layer before vLLM costs, on a tiny model: the gateway inside of it, the gateway in front of it, in front of
two, and Ray Serve with two. All are measured in turns, in one run, and on the same cores: two engines have no more of
those than one. What a noisy neighbour troubles least is the processors' time that a request takes, engines included.
Run: python benchmarks/serve_layers.py"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the tests' tiny model and real servers
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from serving_load.load import Seen, closed_loop
from serving_load.peers import SLOTS, medians, plain_vllm, processor_seconds, started_by

from tests.server.on_ray.real import serving_on_ray
from tests.server.real import Server, make_random_adapter, make_tiny_model, serving, started, write_checkpoint

NAMES = ("a", "b", "c", "d")
ALONE = "vLLM alone"
COLUMNS = ("clients", "answers", "server", "requests/s", "ratio", "p50, ms", "p99, ms", "first byte, ms",
           "processors, ms a request", "ratio")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=5, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--without-ray", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        base = make_tiny_model(folder / "base")
        adapters = {run: make_random_adapter(folder / run, base, seed) for seed, run in enumerate(NAMES)}
        for run, adapter in adapters.items():
            write_checkpoint(folder / "runs" / run, adapter, 1)
        flags = ("--watch", str(folder / "runs"), "--max-loras", str(SLOTS), "--max-lora-rank", "8")

        def server(called: str, *more: str) -> Server:
            return stack.enter_context(serving(base, folder / called, folder / f"{called}.log", *flags, *more))

        direct, process = stack.enter_context(plain_vllm(base, adapters, folder / "direct.log"))
        behind, engine = stack.enter_context(plain_vllm(base, {}, folder / "behind.log", VLLM_SERVER_DEV_MODE="1"))
        front = stack.enter_context(started(folder, "serve", str(base), "--engine", behind, *flags))
        servers = {
            "lorakit, inside of it": server("inside"),
            "lorakit, in front of it": front,
            "lorakit, --replicas 2": server("replicas", "--replicas", "2"),
        }
        if not arguments.without_ray:
            (folder / "ray").mkdir()
            on_ray = serving_on_ray(base, folder / "ray", *flags, "--replicas", "2")
            servers["lorakit, --ray --replicas 2"] = stack.enter_context(on_ray)
        urls = {ALONE: direct} | {called: one.url for called, one in servers.items()}
        own = {ALONE: [process]} | {called: [one.process.pid] for called, one in servers.items()}
        own["lorakit, in front of it"].append(engine)
        own = {called: [one for pid in pids for one in (pid, *started_by(pid))] for called, pids in own.items()}
        print(f"load of the machine before: {os.getloadavg()[0]:.1f}\n", file=sys.stderr)
        print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
        for clients, stream in itertools.product((1, 16, 64), (False, True)):
            measure(urls, own, clients, stream, arguments.seconds, arguments.rounds)


def measure(
    urls: dict[str, str], own: dict[str, list[int]], clients: int, stream: bool, seconds: float, rounds: int
) -> None:
    found: dict[str, list[Seen]] = {called: [] for called in urls}
    for url in urls.values():
        asyncio.run(closed_loop(url, each_in_turn(), clients, 1.5, stream=stream))
    for _ in range(rounds):
        for called, url in urls.items():
            before = processor_seconds(own[called])
            seen = asyncio.run(closed_loop(url, each_in_turn(), clients, seconds, stream=stream))
            seen.processors = processor_seconds(own[called]) - before
            found[called].append(seen)
    assert not any(seen.failed for results in found.values() for seen in results)
    rows = {called: medians(results) for called, results in found.items()}
    for called, (rate, *seconds_of) in rows.items():
        times = " | ".join(f"{one * 1e3:.1f}" for one in seconds_of)
        how = "streamed" if stream else "whole"
        print(
            f"| {clients} | {how} | {called} | {rate:.1f} | {rate / rows[ALONE][0]:.2f} | {times} "
            f"| {seconds_of[-1] / rows[ALONE][-1]:.2f} |",
            flush=True,
        )


def each_in_turn() -> Callable[[], str]:
    names = itertools.cycle(NAMES)
    return lambda: next(names)


if __name__ == "__main__":
    main()
