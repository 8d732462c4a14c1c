"""Ten thousand adapters on a hundred GPUs, simulated: which rule for sending requests to engines costs what. The
engines take the time that a real one took: `--record` measures vLLM on this machine (some minutes).
Run: python benchmarks/fleet.py"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # lorakit, and the tests' tiny model

from fleet.engine import Size
from fleet.policies import POLICIES
from fleet.seen import LOOK, Seen
from fleet.shapes import alike, capacity, pools
from fleet.simulation import Plan, Simulation
from fleet.timings import Timings, published, recorded
from fleet.traffic import RANKS, Shape, made

BEFORE = 20  # requests for each adapter, after which it begins: adapters are where those went
WARM = 40.0  # seconds at least that are not measured then
ALIKE = ("random", "round robin", "least loaded", "sticky", "consistent hashing, bounded", "lorakit")
IN_POOLS = ("rank pools, hashing", "lorakit", "lorakit, 4 gateways")
COMPARED = (("least loaded", False), ("sticky", False), ("consistent hashing, bounded", False),
            ("rank pools, hashing", True), ("lorakit", False), ("lorakit", True))  # fmt: skip


@dataclass(frozen=True, slots=True)
class Setting:
    """One fleet under one load: `load` is a part of what engines that take every rank can answer."""

    timings: Timings
    policy: str
    in_pools: bool
    requests: int
    engines: int = 100
    shape: Shape = field(default_factory=Shape)
    size: Size = field(default_factory=Size)
    load: float = 0.7
    dies: bool = False
    seed: int = 1

    @property
    def rate(self) -> float:
        return self.load * capacity(self.timings, max(RANKS)) * self.engines

    @property
    def warm(self) -> float:
        return max(WARM, self.requests / self.rate / 5)

    @property
    def label(self) -> str:
        return f"{self.policy}, rank pools" if self.in_pools and "pools" not in self.policy else self.policy


def run(setting: Setting) -> tuple[Seen, float]:
    """What came of it, and the processor's seconds."""
    begun = time.process_time()
    traffic = made(setting.shape, setting.requests, setting.rate, setting.seed)
    before = made(setting.shape, BEFORE * setting.shape.adapters, setting.rate, setting.seed + 1000)
    warm = setting.warm
    plan = Plan(warm, warm + LOOK, warm + 2 * LOOK) if setting.dies else Plan(warm)
    sizes = (setting.timings, traffic, setting.engines, setting.size)
    ranks = pools(*sizes) if setting.in_pools else alike(setting.engines)
    simulation = Simulation(setting.timings, ranks, setting.size, POLICIES[setting.policy], traffic, plan)
    simulation.fill(before.adapters.tolist(), int(setting.rate * 3))
    return simulation.go(), time.process_time() - begun


def compared(settings: Iterable[Setting], jobs: int) -> Iterable[tuple[Seen, float]]:
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        yield from pool.map(run, settings)


def compare(base: Setting, jobs: int) -> None:
    """The whole comparison at one load, with an engine that dies and comes back."""
    settings = [replace(base, policy=policy, in_pools=False, dies=True) for policy in ALIKE]
    settings += [replace(base, policy=policy, in_pools=True, dies=True) for policy in IN_POOLS]
    said = f"{base.requests} requests, {base.rate:.0f} a second, {base.load:.0%} of what the engines can answer"
    print(f"\n### {base.timings.name}: {base.engines} engines, {base.shape.adapters} adapters, {said}\n")
    print(
        "| rule | p50, s | p99, s | first token p50, ms | p99, ms | waited for a load | cold loads a thousand requests "
        f"| all loads | store, GB/s | max/mean | more loads after a death | after a return |\n{'|---' * 12}|"
    )
    for setting, (seen, seconds) in zip(settings, compared(settings, jobs), strict=True):
        died = base.warm + LOOK
        middle, most = seen.within(0.5), seen.within(0.99)
        label = f"{setting.label} †" if seen.falls_behind else setting.label
        print(
            f"| {label} | {middle[1]:.2f} | {most[1]:.2f} | {middle[0] * 1e3:.0f} | {most[0] * 1e3:.0f} "
            f"| {seen.waited.mean():.2%} | {seen.cold_per_thousand:.1f} | {seen.loads_per_thousand:.1f} "
            f"| {seen.store_rate / 1e9:.2f} | {seen.balance:.2f} | {seen.more_loads(died, died)} "
            f"| {seen.more_loads(died + LOOK, died)} |",
            flush=True,
        )
        print(f"{setting.label}: {seconds:.0f} s to simulate", file=sys.stderr)


def vary(base: Setting, jobs: int) -> None:
    """A fleet of a fifth of the size, with one thing changed at a time: within how long 99% of the answers are
    complete, and their first tokens there."""
    shape = replace(base.shape, adapters=base.shape.adapters // 5, runs=base.shape.runs // 5)
    base = replace(base, engines=base.engines // 5, shape=shape, requests=base.requests // 10)
    varied = [("as above", base)]
    varied += [(f"load {load:.0%}", replace(base, load=load)) for load in (0.5, 0.9)]
    varied += [(f"Zipf {value}", replace(base, shape=replace(base.shape, exponent=value))) for value in (0.8, 1.2)]
    varied += [(f"{slots} slots", replace(base, size=replace(base.size, slots=slots))) for slots in (16, 64)]
    varied += [("memory for 128", replace(base, size=replace(base.size, memory=128)))]
    rows = [
        [replace(setting, policy=policy, in_pools=in_pools) for policy, in_pools in COMPARED] for _, setting in varied
    ]
    heads = " | ".join(setting.label for setting in rows[0])
    print(f"\n{base.engines} engines, {base.shape.adapters} adapters; p99, and of the first token, s:\n\n| | {heads} |")
    print("|---" * (len(COMPARED) + 1) + "|")
    found = iter(compared([setting for row in rows for setting in row], jobs))
    for what, _ in varied:
        cells = []
        for _ in COMPARED:
            seen, _ = next(found)
            first, last = seen.within(0.99)
            cells.append(f"{last:.1f}, {first:.{2 if first < 10 else 3}g}{' †' if seen.falls_behind else ''}")
        print(f"| {what} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", action="store_true", help="measure an engine here, and keep what it took")
    parser.add_argument("--timings", choices=("recorded", "h100"), action="append", help="default: one after the other")
    parser.add_argument("--requests", type=int, default=400_000)
    parser.add_argument("--engines", type=int, default=100)
    parser.add_argument("--adapters", type=int, default=10_000)
    parser.add_argument("--load", type=float, default=0.7)
    parser.add_argument("--vary", action="store_true", help="the load, the traffic and the slots as well")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    if arguments.record:
        from fleet.record import record

        record()
        return
    shape = replace(Shape(), adapters=arguments.adapters, runs=arguments.adapters // 50)
    for name in arguments.timings or ("recorded", "h100"):
        timings = recorded() if name == "recorded" else published()
        base = Setting(timings, "", False, arguments.requests, arguments.engines, shape, load=arguments.load)
        if (least := int(base.rate * (WARM + 4 * LOOK))) > base.requests:
            parser.error(f"{base.requests} requests are over before all was seen: --requests {least}, at least")
        compare(base, arguments.jobs)
        if arguments.vary:
            vary(base, arguments.jobs)


if __name__ == "__main__":
    main()
