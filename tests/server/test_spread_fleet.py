"""The simulation that the router's numbers come from: what it says of small fleets can be worked out by hand."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from tests.readme import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

from fleet.engine import Size
from fleet.policies import POLICIES
from fleet.seen import Seen
from fleet.shapes import POOLS, alike, capacity, pools
from fleet.simulation import Plan, Simulation
from fleet.store import Store
from fleet.timings import BYTES_PER_RANK, Timings, fitted, published, recorded
from fleet.traffic import Shape, Traffic, made

TIMINGS = Timings(
    "by hand", step_fixed=0.01, step_per_request=0.001, step_per_request_rank=0.0, step_per_adapter_rank=0.0001,
    prompt_per_token=0.001, prompt_per_token_rank=0.0, load_fixed=0.5, load_per_byte=0.0,
)  # fmt: skip
FETCH = 16 * BYTES_PER_RANK / 3e9  # seconds, for rank 16, alone
SMALL = Shape(adapters=400, runs=8, every=10.0)


def traffic(times: Sequence[float], adapters: Sequence[int], prompt: int = 100, answer: int = 11) -> Traffic:
    count = len(times)
    return Traffic(
        np.array(times, float), np.array(adapters), np.full(count, prompt), np.full(count, answer), (16,) * 50, ()
    )


def seen(traffic: Traffic, *, engines: int = 1, size: Size | None = None, there: bool = True) -> Seen:
    simulation = Simulation(TIMINGS, [16] * engines, size or Size(), POLICIES["sticky"], traffic, Plan())
    if there:
        simulation.fill(traffic.adapters.tolist(), 0)
    return simulation.go()


# one engine


def test_a_request_alone_takes_its_prompt_and_its_steps() -> None:
    found = seen(traffic([1.0], [0]))
    assert found.first == pytest.approx([0.1])
    assert found.last == pytest.approx([0.1 + 10 * (0.011 + 0.0016)])
    assert not found.waited.any()


def test_two_at_once_have_a_slower_step_each_and_wait_for_both_prompts() -> None:
    found = seen(traffic([1.0, 1.0], [0, 1]))
    assert found.first == pytest.approx([0.1, 0.2])
    assert found.last == pytest.approx([0.2 + 10 * (0.012 + 0.0032)] * 2)


def test_a_prompt_holds_up_those_that_are_being_answered() -> None:
    found = seen(traffic([1.0, 1.15], [0, 0]))
    one, two = 0.0126, 0.012 + 0.0016
    before = 0.05 / one  # steps of the first, alone
    assert found.last[0] == pytest.approx(0.25 + (10 - before) * two)
    assert found.last[1] == pytest.approx(0.1 + (10 - before) * two + before * one)


def test_a_load_takes_its_fetch_and_its_own_time() -> None:
    found = seen(traffic([1.0, 9.0], [0, 0]), there=False)
    assert found.first == pytest.approx([FETCH + 0.5 + 0.1, 0.1])
    assert found.waited.tolist() == [True, False]
    assert [load.size for load in found.loads] == [16 * BYTES_PER_RANK]


def test_a_load_holds_up_those_that_are_being_answered() -> None:
    simulation = Simulation(TIMINGS, [16], Size(), POLICIES["sticky"], traffic([1.0, 1.15], [0, 1]), Plan())
    simulation.fill([0], 0)
    found = simulation.go()
    before = (0.05 + FETCH) / 0.0126  # steps of the first, alone
    assert found.last[0] == pytest.approx(0.15 + FETCH + 0.5 + 0.1 + (10 - before) * (0.012 + 0.0032))


def test_one_that_has_no_slot_waits_until_one_is_idle() -> None:
    small = replace(Size(), slots=1, fair_wait=100.0)
    simulation = Simulation(TIMINGS, [128], small, POLICIES["sticky"], traffic([1.0, 1.0], [0, 1]), Plan())
    simulation.fill([0, 1], 0)
    found = simulation.go()
    assert found.first[1] == pytest.approx(found.last[0] + 0.1)


def test_the_least_recently_used_makes_place() -> None:
    small = replace(Size(), memory=2)
    found = seen(traffic([1.0, 5.0, 10.0, 15.0, 20.0], [0, 1, 0, 2, 0]), size=small, there=False)
    assert found.waited.tolist() == [True, True, False, True, False]
    assert seen(traffic([1.0, 5.0, 10.0, 15.0], [0, 1, 2, 0]), size=small, there=False).waited.all()


def test_those_who_fetch_share_the_store() -> None:
    store: Store[str] = Store(bandwidth=100.0, link=40.0)
    store.add("a", 80)
    store.advance(1.0)  # 40 of 80
    store.add("b", 40)
    store.add("c", 80)
    assert store.next_end() == pytest.approx(1.0 + 40 / (100 / 3))
    store.advance(store.next_end())
    assert sorted(store.ended()) == ["a", "b"]
    assert store.next_end() == pytest.approx(store.now + 1.0)  # 40 left, alone


# fleets


DEATH = Plan(4.0, dies=8.0, joins=14.0)


def small_fleet(policy: str, *, in_pools: bool = False, count: int = 2500, plan: Plan | None = None) -> Simulation:
    timings = published()
    engines, size = 8, replace(Size(), memory=96)
    rate = 0.5 * engines * capacity(timings, 128)
    asked = made(SMALL, count, rate, seed=1)
    ranks = pools(timings, asked, engines, size) if in_pools else alike(engines)
    simulation = Simulation(timings, ranks, size, POLICIES[policy], asked, plan or Plan(4.0))
    simulation.fill(made(SMALL, 6000, rate, seed=2).adapters.tolist(), int(3 * rate))
    return simulation


@pytest.mark.parametrize("policy", POLICIES)
def test_whatever_the_rule_every_request_is_answered_though_an_engine_dies(policy: str) -> None:
    simulation = small_fleet(policy, in_pools="pools" in policy, count=1500, plan=DEATH)
    found = simulation.go()
    assert (found.first > 0).all()
    assert (found.last >= found.first).all()
    for engine in simulation.engines:
        assert not engine.in_flight
        assert len(engine.inside) <= engine.size.memory
    assert found.retried > 0


def test_the_same_seed_gives_the_same_numbers() -> None:
    one, other = small_fleet("lorakit", count=800).go(), small_fleet("lorakit", count=800).go()
    assert one.last.tolist() == other.last.tolist()


def test_lorakits_rule_is_quicker_and_loads_less_than_those_that_look_at_one_thing() -> None:
    lorakit = small_fleet("lorakit").go()
    for other in ("random", "least loaded", "consistent hashing, bounded"):
        found = small_fleet(other).go()
        assert lorakit.cold_per_thousand < found.cold_per_thousand
        assert lorakit.waited.mean() < found.waited.mean() / 2
        assert lorakit.within(0.99)[0] < found.within(0.99)[0]
    sticky = small_fleet("sticky").go()
    assert lorakit.balance < sticky.balance
    assert lorakit.within(0.99)[1] < sticky.within(0.99)[1]


def test_pools_by_rank_are_quicker_than_engines_that_take_all() -> None:
    assert small_fleet("lorakit", in_pools=True).go().within(0.5)[1] < small_fleet("lorakit").go().within(0.5)[1]


def test_a_new_checkpoint_takes_its_name_when_it_is_there() -> None:
    simulation = small_fleet("lorakit", count=1500)
    simulation.go()
    moved = {run for _, run in simulation.traffic.checkpoints}
    assert moved
    assert {run for run, current in enumerate(simulation.current) if run != current} == moved - set(simulation.moving)
    assert not simulation.moving


def test_pools_hold_their_adapters_and_are_all_of_the_fleet() -> None:
    asked = made(SMALL, 2000, 100.0, seed=3)
    size = replace(Size(), memory=96)
    ranks = pools(published(), asked, 12, size)
    assert len(ranks) == 12
    for pool, smaller in zip(POOLS, (0, *POOLS), strict=False):
        count = sum(smaller < rank <= pool for rank in asked.ranks)
        assert ranks.count(pool) * size.memory >= count


# timings


def test_timings_are_found_again_from_what_they_give() -> None:
    shapes = [(rank, batch, count) for rank in (8, 128) for batch, count in ((1, 1), (16, 1), (16, 16), (64, 4))]
    found = fitted({
        "name": "by hand",
        "steps": [{"max_rank": rank, "batch": batch, "adapters": count, "seconds": TIMINGS.step(batch, count, rank)}
                  for rank, batch, count in shapes],
        "prompts": [{"max_rank": rank, "tokens": tokens, "seconds": 0.02 + TIMINGS.prompt(tokens, rank)}
                    for rank in (8, 128) for tokens in (10, 200)],
        "loads": [{"bytes": size, "seconds": 0.5} for size in (1000, 10**6)],
    })  # fmt: skip
    for rank, batch, count in shapes:
        assert found.step(batch, count, rank) == pytest.approx(TIMINGS.step(batch, count, rank))
    assert found.prompt(50, 16) == pytest.approx(TIMINGS.prompt(50, 16))
    assert found.load(64) == pytest.approx(0.5)


@pytest.mark.parametrize("timings", [published, recorded])
def test_a_larger_rank_and_a_larger_batch_cost_more(timings: object) -> None:
    assert callable(timings)
    found = timings()
    assert found.step(64, 16, 128) > found.step(64, 16, 16) > found.step(1, 1, 16) > 0
    assert found.load(128) >= found.load(8) > 0
    assert capacity(found, 16) > capacity(found, 128)
