"""Several engines behind one gateway: where adapters come to be, who answers, and what a death costs.

The engines are fakes that hold lorakit to what each relies on (fake_engine.py).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.types import Receive, Scope, Send

from lorakit.errors import EngineFailed
from lorakit.server.engines.engine import Unreached
from lorakit.server.gateway import Gateway
from lorakit.server.spread.fleet import Fleet
from lorakit.server.spread.placing import Placing
from tests.server.fake_engine import FakeEngine, Served, fingerprint_of, nothing, put_checkpoint, settings_for

pytestmark = pytest.mark.anyio


class Gone(FakeEngine):
    """One whose process may be dead: what is sent to it does not arrive."""

    reachable = True

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not self.reachable:
            self.dead = True
            raise Unreached("nobody listens there")
        await super().answer(scope, receive, send)


class Several:
    def __init__(self, fleet: Fleet, served: Served) -> None:
        self.fleet, self.served = fleet, served
        self.ask, self.until = served.ask, served.until

    @property
    def engines(self) -> dict[str, Any]:
        return self.fleet.members

    def having(self, folder: Path) -> list[str]:
        """The engines that have the weights of a folder."""
        return [name for name, engine in self.engines.items() if fingerprint_of(folder) in engine.inside.values()]


@asynccontextmanager
async def several(folder: Path, base: Path, *engines: FakeEngine, **more: Any) -> AsyncIterator[Several]:
    fleet = Fleet()
    for number, engine in enumerate(engines):
        fleet.join(str(number), engine)
    gateway = Gateway(nothing)
    await gateway.begin(fleet, settings_for(folder, **more), Placing)
    client = httpx.AsyncClient(transport=httpx.ASGITransport(gateway), base_url="http://lorakit")
    try:
        yield Several(fleet, Served(gateway, engines[0], client))
    finally:
        await client.aclose()
        await gateway.stop()


def runs(folder: Path, *names: str) -> dict[str, Path]:
    return {name: put_checkpoint(folder / "runs" / name, 10, seed) for seed, name in enumerate(names, 1)}


async def test_each_adapter_is_in_one_engine_and_answers_as_itself(numbers: Path, tmp_path: Path) -> None:
    folders = runs(tmp_path, "a", "b", "c", "d")
    async with several(tmp_path, numbers, FakeEngine(numbers), FakeEngine(numbers)) as there:
        await there.served.until_ready()
        for name, folder in folders.items():
            answer = await there.ask(name)
            assert answer.json()["choices"][0]["text"] == fingerprint_of(folder)
            assert len(there.having(folder)) == 1


async def test_more_adapters_than_one_engine_holds_are_spread(numbers: Path, tmp_path: Path) -> None:
    folders = runs(tmp_path, *"abcdef")
    engines = [FakeEngine(numbers, slots=3), FakeEngine(numbers, slots=3)]
    async with several(tmp_path, numbers, *engines) as there:
        await there.served.until_ready()
        held = [there.engines["0"].gate("x"), there.engines["1"].gate("x")]
        asked = [asyncio.create_task(there.ask(name, hold="x")) for name in folders]
        await there.until(lambda: sum(len(engine._answering) for engine in engines) == 6)  # all six at once
        for gate in held:
            gate.set()
        answers = [(await one).json()["choices"][0]["text"] for one in asked]
    assert answers == [fingerprint_of(folder) for folder in folders.values()]


async def test_an_adapter_with_many_requests_is_copied(numbers: Path, tmp_path: Path) -> None:
    (folder,) = runs(tmp_path, "hot").values()
    engines = [FakeEngine(numbers), FakeEngine(numbers)]
    async with several(tmp_path, numbers, *engines) as there:
        await there.served.until_ready()
        for engine in engines:
            engine.answer_seconds = 0.05
        answers = await asyncio.gather(*(there.ask("hot") for _ in range(40)))
        assert {answer.json()["choices"][0]["text"] for answer in answers} == {fingerprint_of(folder)}
        await there.until(lambda: len(there.having(folder)) == 2)
        await asyncio.gather(*(there.ask("hot") for _ in range(40)))
        shares = [sum(asked["model"] != "numbers" for asked in engine.asked) for engine in engines]
    assert min(shares) > 5


async def test_the_base_is_answered_by_all(numbers: Path, tmp_path: Path) -> None:
    engines = [FakeEngine(numbers), FakeEngine(numbers)]
    async with several(tmp_path, numbers, *engines) as there:
        for engine in engines:
            engine.answer_seconds = 0.02
        answers = await asyncio.gather(*(there.ask(numbers.name) for _ in range(20)))
    assert {answer.json()["choices"][0]["text"] for answer in answers} == {"base"}
    assert all(engine.asked for engine in engines)


async def test_what_a_dead_engine_was_not_given_goes_to_another(numbers: Path, tmp_path: Path) -> None:
    (folder,) = runs(tmp_path, "a").values()
    engines = [Gone(numbers), Gone(numbers)]
    async with several(tmp_path, numbers, *engines) as there:
        await there.served.until_ready()
        (holder,) = there.having(folder)
        there.engines[holder].reachable = False
        there.fleet.is_well(holder, False)
        answer = await there.ask("a")
        assert (answer.status_code, answer.json()["choices"][0]["text"]) == (200, fingerprint_of(folder))


async def test_a_request_that_finds_its_engine_dead_is_asked_once_more_elsewhere(numbers: Path, tmp_path: Path) -> None:
    (folder,) = runs(tmp_path, "a").values()
    engines = [Gone(numbers), Gone(numbers)]
    async with several(tmp_path, numbers, *engines) as there:
        await there.served.until_ready()
        (holder,) = there.having(folder)
        there.engines[holder].reachable = False

        def found_dead(engine: Any = there.engines[holder]) -> None:
            there.fleet.is_well(holder, not engine.dead)

        original = there.engines[holder].answer

        async def answer(scope: Scope, receive: Receive, send: Send) -> None:
            try:
                await original(scope, receive, send)
            finally:
                found_dead()

        there.engines[holder].answer = answer
        answers = [await there.ask("a"), await there.ask("a")]
        base = [await there.ask(numbers.name) for _ in range(4)]
        assert [one.json()["choices"][0]["text"] for one in answers] == [fingerprint_of(folder)] * 2
        assert [one.status_code for one in base] == [200] * 4
        residents = there.served.reconciler.residency.residents
        assert not any(one.busy for one in residents)


async def test_where_all_are_dead_it_is_503(numbers: Path, tmp_path: Path) -> None:
    engines = [Gone(numbers), Gone(numbers)]
    async with several(tmp_path, numbers, *engines) as there:
        for engine in engines:
            engine.dead = True
        answer = await there.ask(numbers.name)
    assert answer.status_code == 503
    assert "retry-after" in answer.headers


async def test_an_engine_that_was_started_anew_has_again_what_names_mean(numbers: Path, tmp_path: Path) -> None:
    folders = runs(tmp_path, "a", "b", "c", "d")
    async with several(tmp_path, numbers, FakeEngine(numbers), FakeEngine(numbers)) as there:
        await there.served.until_ready()
        before = {name: there.having(folder) for name, folder in folders.items()}
        lost = before["a"][0]
        await there.fleet.leave(lost)
        for name, folder in folders.items():
            assert (await there.ask(name)).json()["choices"][0]["text"] == fingerprint_of(folder)
        there.fleet.join(lost, FakeEngine(numbers))
        for name, folder in folders.items():
            if before[name] == [lost]:
                await there.until(lambda folder=folder: lost in there.having(folder))
        for name, folder in folders.items():
            assert (await there.ask(name)).json()["choices"][0]["text"] == fingerprint_of(folder)


async def test_who_waits_for_an_engine_that_goes_is_answered_by_another(numbers: Path, tmp_path: Path) -> None:
    (folder,) = runs(tmp_path, "a").values()
    engines = [FakeEngine(numbers), FakeEngine(numbers)]
    async with several(tmp_path, numbers, *engines, follow="manual", load_wait=20.0) as there:
        await there.served.until_ready()
        (holder,) = there.having(folder)
        await there.fleet.leave(holder)
        for engine in engines:
            engine.load_seconds = 0.5
        asked = asyncio.create_task(there.ask("a"))
        await there.until(lambda: there.served.reconciler.residency.waiting == 1)
        there.fleet.join(holder, FakeEngine(numbers))
        await there.fleet.leave("1" if holder == "0" else "0")
        answer = await asked
    assert answer.json()["choices"][0]["text"] == fingerprint_of(folder)


async def test_a_name_that_moves_is_ready_in_each_engine_that_answers_for_it(numbers: Path, tmp_path: Path) -> None:
    (first,) = runs(tmp_path, "a").values()
    engines = [FakeEngine(numbers), FakeEngine(numbers)]
    async with several(tmp_path, numbers, *engines) as there:
        await there.served.until_ready()
        for engine in engines:
            engine.answer_seconds = 0.02
        stop = asyncio.Event()

        async def busy() -> None:
            while not stop.is_set():
                answer = await there.ask("a")
                assert answer.status_code == 200, answer.text

        clients = [asyncio.create_task(busy()) for _ in range(24)]
        await there.until(lambda: len(there.having(first)) == 2)
        second = put_checkpoint(tmp_path / "runs" / "a", 20, 7)
        await there.until(lambda: len(there.having(second)) == 2)
        stop.set()
        await asyncio.gather(*clients)
        answer = await there.ask("a")
    assert answer.json()["choices"][0]["text"] == fingerprint_of(second)


async def test_what_is_unloaded_leaves_every_engine(numbers: Path, tmp_path: Path) -> None:
    (folder,) = runs(tmp_path, "a").values()
    engines = [FakeEngine(numbers), FakeEngine(numbers)]
    async with several(tmp_path, numbers, *engines) as there:
        await there.served.until_ready()
        for engine in engines:
            engine.answer_seconds = 0.02
        await asyncio.gather(*(there.ask("a") for _ in range(40)))
        await there.until(lambda: len(there.having(folder)) == 2)
        await there.served.client.delete("/v1/adapters/a")
        await there.until(lambda: not there.having(folder))
        assert (await there.ask("a")).status_code == 404


async def test_engines_of_two_bases_are_no_fleet(numbers: Path, tmp_path: Path) -> None:
    other = FakeEngine(numbers)
    other.limits = other.limits.__class__("other", "", 1, 8, "fake 1", honours_patterns=True)
    fleet = Fleet()
    fleet.join("0", FakeEngine(numbers))
    with pytest.raises(EngineFailed, match="start all with one base"):
        fleet.join("1", other)


async def test_what_they_say_of_themselves_is_of_all(numbers: Path, tmp_path: Path) -> None:
    engines = [FakeEngine(numbers, slots=2), FakeEngine(numbers, slots=3, max_rank=64)]
    for number, engine in enumerate(engines):
        engine.told_metrics = b"vllm:running %d\n" % number
    async with several(tmp_path, numbers, *engines) as there:
        limits = there.fleet.limits
        assert (limits.slots, limits.max_rank, limits.engine) == (5, 64, "2 x fake 1")
        told = (await there.served.client.get("/metrics")).text
    assert 'vllm:running{replica="0"} 0' in told
    assert 'vllm:running{replica="1"} 1' in told
    assert "lorakit_engine_slots 5" in told


async def test_an_engine_may_come_and_go_under_load(numbers: Path, tmp_path: Path) -> None:
    """Whoever answers, it is with what was asked for; nothing fails but what was in flight where the engine ended."""
    folders = runs(tmp_path, "a", "b", "c")
    async with several(tmp_path, numbers, Gone(numbers), Gone(numbers), load_wait=10.0) as there:
        await there.served.until_ready()
        for engine in there.engines.values():
            engine.answer_seconds = 0.003
        stop = asyncio.Event()

        async def busy(name: str) -> int:
            count = 0
            while not stop.is_set():
                answer = await there.ask(name)
                assert answer.status_code == 200, answer.text
                assert answer.json()["choices"][0]["text"] == fingerprint_of(folders[name])
                count += 1
            return count

        clients = [asyncio.create_task(busy(name)) for name in folders for _ in range(4)]
        for turn in range(12):
            name = str(turn % 2)
            await asyncio.sleep(0.05)
            with contextlib.suppress(KeyError):
                await there.fleet.leave(name)
            await asyncio.sleep(0.05)
            engine = Gone(numbers)
            engine.answer_seconds = 0.003
            there.fleet.join(name, engine)
        stop.set()
        counts = await asyncio.gather(*clients)
    assert min(counts) > 3


class Dying(FakeEngine):
    """One whose core may die behind an API that goes on to answer, with errors."""

    def __init__(self, base: Path, fleet: Fleet, name: str) -> None:
        super().__init__(base)
        self.fleet, self.name = fleet, name

    async def alive(self, *, now: bool = False) -> bool:
        if self.dead and now:
            self.fleet.is_well(self.name, False)
        return not (self.dead and now)

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not self.dead:
            await super().answer(scope, receive, send)
            return
        await receive()
        body = b'{"error": {"message": "EngineCore encountered an issue", "type": "InternalServerError"}}'
        await send({"type": "http.response.start", "status": 500, "headers": []})
        await send({"type": "http.response.body", "body": body})


@asynccontextmanager
async def dying(folder: Path, base: Path, **more: Any) -> AsyncIterator[Several]:
    fleet = Fleet()
    engines = [Dying(base, fleet, str(number)) for number in range(2)]
    for engine in engines:
        fleet.join(engine.name, engine)
    gateway = Gateway(nothing)
    await gateway.begin(fleet, settings_for(folder, **more), Placing)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(gateway), base_url="http://lorakit") as client:
        yield Several(fleet, Served(gateway, engines[0], client))
    await gateway.stop()


async def test_what_an_engine_says_as_it_dies_is_no_fault_of_its_adapter(numbers: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "a"
    put_checkpoint(run, 10, 1)
    async with dying(tmp_path, numbers) as there:
        await there.served.until_ready()
        newer = put_checkpoint(run, 20, 2)
        await there.until(lambda: there.having(newer))
        await there.until(lambda: there.served.reconciler.runs["a"].select(None).facts.step == 20)  # type: ignore[union-attr]
        (holder,) = there.having(newer)
        there.engines[holder].dead = True
        answers = await asyncio.gather(*(there.ask("a") for _ in range(20)))
        assert {answer.status_code for answer in answers} <= {200, 503}
        await asyncio.sleep(0.2)
        answer = await there.ask("a")
        assert (answer.status_code, answer.json()["choices"][0]["text"]) == (200, fingerprint_of(newer))
        assert not there.served.reconciler.passed_over


async def test_an_adapter_that_an_engine_refused_as_it_died_is_loaded_by_another(numbers: Path, tmp_path: Path) -> None:
    async with dying(tmp_path, numbers) as there:
        for engine in there.engines.values():
            engine.load_seconds = 0.3
        (folder,) = runs(tmp_path, "a").values()
        await there.until(lambda: any(engine.loads for engine in there.engines.values()))
        first = next(engine for engine in there.engines.values() if engine.loads)
        first.dead = True
        await there.until(lambda: there.having(folder))
        await there.until(lambda: there.served.reconciler.runs["a"].aliases)
        answer = await there.ask("a")
        assert (answer.status_code, answer.json()["choices"][0]["text"]) == (200, fingerprint_of(folder))


class Unasked(Gone):
    """One that is dead when it is asked to load."""

    async def load(self, name: str, folder: Path) -> None:
        if not self.reachable:
            self.dead = True
            raise EngineFailed("the engine did not list its adapters: Connection refused")
        await super().load(name, folder)


async def test_a_cold_adapter_whose_home_has_just_died_comes_into_another(numbers: Path, tmp_path: Path) -> None:
    engines = [Unasked(numbers), Unasked(numbers)]
    async with several(tmp_path, numbers, *engines) as there:
        await there.served.until_ready()
        folders = {}
        for name, engine in there.engines.items():
            engine.reachable = False
            alive = engine.alive

            async def told(*, now: bool = False, name: str = name, alive: Any = alive) -> bool:
                well = await alive(now=now)
                there.fleet.is_well(name, well)
                return bool(well)

            engine.alive = told
            folders |= runs(tmp_path, "a")
            break
        other = next(engine for engine in there.engines.values() if engine.reachable)
        await there.until(lambda: other.inside)
        await there.until(lambda: "a" in there.served.reconciler.runs and there.served.reconciler.runs["a"].aliases)
        answer = await there.ask("a")
    assert (answer.status_code, answer.json()["choices"][0]["text"]) == (200, fingerprint_of(folders["a"]))


async def test_of_one_content_under_two_names_nothing_stays_on_its_way(numbers: Path, tmp_path: Path) -> None:
    put_checkpoint(tmp_path / "runs" / "a", 10, 1)
    put_checkpoint(tmp_path / "runs" / "b", 10, 1)
    async with several(tmp_path, numbers, FakeEngine(numbers), FakeEngine(numbers)) as there:
        await there.served.until_ready()
        for name in "abab":
            assert (await there.ask(name)).status_code == 200
        assert not any(engine.coming for engine in there.fleet.router._engines.values())


async def test_who_removes_an_adapter_does_not_wait_for_an_engine_that_is_gone(numbers: Path, tmp_path: Path) -> None:
    (folder,) = runs(tmp_path, "a").values()
    engines = [FakeEngine(numbers), FakeEngine(numbers)]
    async with several(tmp_path, numbers, *engines) as there:
        await there.served.until_ready()
        (holder,) = there.having(folder)
        engine = there.engines[holder]
        held = asyncio.create_task(there.ask("a", hold="x"))
        await there.until(lambda: engine.asked)
        revision = there.served.reconciler.runs["a"].select(None)
        assert revision is not None
        leaving = asyncio.create_task(there.served.reconciler.residency.leave(revision.name))
        await asyncio.sleep(0.05)
        assert not leaving.done(), "a request is in flight"
        await there.fleet.leave(holder)
        async with asyncio.timeout(5):
            await leaving
        engine.gate("x").set()
        assert (await held).status_code == 200
