"""Two real engines on a real Ray: names mean the same in both, answers are whole, and one may die.

What of it needs no model is in `test_on_ray`.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.server.on_ray.real import (
    REPLICA,
    asked_at_once,
    by_replica,
    engines,
    named,
    replicas_known,
    serving_on_ray,
)
from tests.server.peft_oracle import PeftOracle
from tests.server.real import Server, write_checkpoint
from tests.server.test_real_flips import (
    CLIENTS,
    PROMPTS,
    Streamed,
    stream,
    streamed_while_it_moves,
    wholly_of_one,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]  # two real engines are a minute, and more, to start
AT_ONCE = 20  # requests in one replica, so that both have some
BUSY = {"prompt": "the quick brown fox", "max_tokens": 24, "temperature": 0, "ignore_eos": True}


@dataclass
class OnRay:
    server: Server
    watched: Path
    base: Path
    adapters: list[Path]

    def put(self, run: str, adapter: int, step: int) -> str:
        """Write a checkpoint, wait until the run's name means it: the revision's name."""
        write_checkpoint(self.watched / run, self.adapters[adapter], step)
        found: str = self.server.wait_until(lambda: self.at(run, step))
        return found

    def at(self, run: str, step: int) -> str | None:
        name = self.server.adapter(run)["revision"]
        return str(name) if name and name.startswith(f"{run}@step-{step}-") else None


@pytest.fixture(scope="module")
def on_ray(materials: tuple[Path, list[Path]], tmp_path_factory: pytest.TempPathFactory) -> Iterator[OnRay]:
    base, adapters = materials
    folder = tmp_path_factory.mktemp("ray")
    watched = folder / "runs"
    watched.mkdir()
    flags = ("--replicas", "2", "--watch", str(watched), "--max-loras", "3", "--max-lora-rank", "8",
             "--max-ongoing-requests", str(AT_ONCE))  # fmt: skip
    with serving_on_ray(base, folder, *flags) as server:
        server.wait_until(lambda: len(replicas_known(server)) == 2, 60)
        yield OnRay(server, watched, base, adapters)


def test_two_engines_answer_for_the_base_and_each_says_which_it_is(on_ray: OnRay) -> None:
    answers = asked_at_once(on_ray.server, {**BUSY, "model": "base"}, 24)
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.json()["choices"][0]["text"] for answer in answers}) == 1
    assert len(by_replica(answers)) == 2
    assert replicas_known(on_ray.server) == set(by_replica(answers))


def test_when_a_name_has_moved_answers_of_both_engines_are_of_the_new_revision_within_a_second(on_ray: OnRay) -> None:
    run = "moved"
    revisions = [on_ray.put(run, adapter, adapter + 1) for adapter in range(2)]
    body = {**BUSY, "model": f"{run}@now"}
    with on_ray.server.client() as client:
        for revision in (*revisions, revisions[0]):
            client.put(f"/v1/adapters/{run}/aliases/now", json={"revision": revision}).raise_for_status()
            moved = time.monotonic()
            answers = asked_at_once(on_ray.server, body, 2 * AT_ONCE)
            assert time.monotonic() - moved < 60
            assert {answer.status_code for answer in answers} == {200}
            assert {answer.headers["x-lorakit-revision"] for answer in answers} == {revision}
            assert {answer.json()["model"] for answer in answers} == {revision}
            assert len(by_replica(answers)) == 2


def test_the_metrics_of_both_engines_stand_beside_the_gateways(on_ray: OnRay) -> None:
    asked_at_once(on_ray.server, {**BUSY, "model": "base"}, 1)
    with on_ray.server.client() as client:
        text = client.get("/metrics").text
    found = {family.name: family for family in text_string_to_metric_families(text)}
    assert len({one.labels["replica"] for one in found["vllm:num_requests_running"].samples}) == 2
    assert "base" in {one.labels["alias"] for one in found["lorakit_requests"].samples}


@pytest.mark.parametrize(("seconds", "every"), [(60.0, 1.0), (8.0, 0.8)], ids=["a_minute", "short"])
def test_a_name_that_moves_under_streams_mixes_no_answer_and_fails_none(
    on_ray: OnRay, seconds: float, every: float
) -> None:
    run = "flips" if every == 1.0 else "flip"
    revisions = {on_ray.put(run, adapter, adapter + 1): adapter for adapter in range(4)}  # more than there are slots
    oracle = PeftOracle(on_ray.base, on_ray.adapters[:4])
    streamed_while_it_moves(on_ray.server, run, revisions, oracle, seconds, every)


def test_a_gateway_that_is_killed_is_replaced_and_knows_what_names_mean(on_ray: OnRay) -> None:
    server, run = on_ray.server, "known"
    revision = on_ray.put(run, 2, 7)
    replicas = replicas_known(server)
    (gateway,) = named(server, "ServeReplica:lorakit:Gateway")
    os.kill(gateway, signal.SIGKILL)
    server.wait_until(lambda: named(server, "ServeReplica:lorakit:Gateway") not in ([], [gateway]), 60)

    def answers() -> bool:
        (answer,) = asked_at_once(server, {**BUSY, "model": run}, 1)
        return answer.status_code == 200 and answer.headers["x-lorakit-revision"] == revision

    server.wait_until(answers, 60)
    server.wait_until(lambda: replicas_known(server) == replicas, 20)


def test_a_replica_that_is_killed_costs_its_own_requests_alone_and_another_takes_its_place(on_ray: OnRay) -> None:
    server, run = on_ray.server, "killed"
    revisions = {on_ray.put(run, adapter, adapter + 1): adapter for adapter in range(2)}
    asked_at_once(server, {**BUSY, "model": run}, 2 * AT_ONCE)  # so that both have it
    before, there = replicas_known(server), engines(server)
    assert len(before) == len(there) == 2
    killed, orphan = next(iter(there.items()))
    seen: list[tuple[str, Streamed | Exception]] = []

    async def keep_streaming(client: httpx.AsyncClient, ends: asyncio.Event, number: int) -> None:
        replica = [""]

        async def note(response: httpx.Response) -> None:
            replica[0] = response.headers.get(REPLICA, "")

        client.event_hooks["response"] = [note]
        while not ends.is_set():
            replica[0] = ""
            try:
                answer: Streamed | Exception = await stream(client, run, PROMPTS[number % len(PROMPTS)])
            except Exception as error:
                answer = error
            seen.append((replica[0], answer))

    async def kill_under_load() -> None:
        ends = asyncio.Event()
        async with asyncio.TaskGroup() as tasks:
            clients = [httpx.AsyncClient(base_url=server.url, timeout=60) for _ in range(CLIENTS)]
            for number, client in enumerate(clients):
                tasks.create_task(keep_streaming(client, ends, number))
            await asyncio.sleep(4)
            os.kill(killed, signal.SIGKILL)
            await asyncio.sleep(8)
            ends.set()
        for client in clients:
            await client.aclose()

    asyncio.run(kill_under_load())
    broken = [(replica, answer) for replica, answer in seen if isinstance(answer, Exception)]
    assert len({replica for replica, _ in broken}) <= 1, broken  # those that the dead one had begun to answer, at most
    assert len(broken) <= AT_ONCE
    whole = [(replica, answer) for replica, answer in seen if isinstance(answer, Streamed)]
    wholly_of_one([answer for _, answer in whole], revisions, PeftOracle(on_ray.base, on_ray.adapters[:4]))
    assert {replica for replica, _ in whole} <= before
    server.wait_until(lambda: not Path(f"/proc/{orphan}").exists(), 20)
    new = server.wait_until(lambda: replicas_known(server) - before, 150)
    assert len(new) == 1
    server.wait_until(lambda: _answers_at(server, run, next(iter(new))), 60)
    last = asked_at_once(server, {**BUSY, "model": run}, 2 * AT_ONCE)
    assert {answer.headers["x-lorakit-revision"] for answer in last} == {list(revisions)[-1]}


def _answers_at(server: Server, model: str, replica: str) -> bool:
    answers = asked_at_once(server, {**BUSY, "model": model}, 2 * AT_ONCE)
    return replica in by_replica([answer for answer in answers if answer.status_code == 200])
