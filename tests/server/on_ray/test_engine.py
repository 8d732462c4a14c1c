"""All replicas as one engine: what a death costs, and what comes through, over fake engines (fakes.py)."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.server.fake_engine import fingerprint_of, put_checkpoint
from tests.server.on_ray.fakes import FakeEngine, holds, on_ray

pytestmark = pytest.mark.anyio


async def test_a_request_that_a_dying_replica_had_not_begun_to_answer_is_asked_again_elsewhere(
    numbers: Path, tmp_path: Path
) -> None:
    put_checkpoint(tmp_path / "runs" / "sql", 10)
    engines = FakeEngine(numbers), FakeEngine(numbers)
    async with on_ray(tmp_path, numbers, *engines) as there:
        there.ray.only = "b"
        asking = asyncio.create_task(there.ask("sql", hold="there"))
        await there.until(lambda: holds(engines[1]))
        engines[0].gate("there").set()
        there.ray.only = "a"
        await there.ray.kill("b")
        answer = await asking
        assert answer.status_code == 200
        assert answer.headers["x-lorakit-replica"] == "a"
        assert [member.name for member in there.ray.roster.members] == ["a"]


async def test_when_no_replica_is_there_requests_are_503_at_once(numbers: Path, tmp_path: Path) -> None:
    put_checkpoint(tmp_path / "runs" / "sql", 10)
    engine = FakeEngine(numbers)
    async with on_ray(tmp_path, numbers, engine) as there:
        asking = asyncio.create_task(there.ask("sql", hold="there"))
        await there.until(lambda: holds(engine))
        await there.ray.kill("a")
        assert (await asking).status_code == 503
        for model in ("sql", numbers.name):
            async with asyncio.timeout(1):
                assert (await there.ask(model)).status_code == 503


async def test_what_was_there_before_answers_again_when_another_replica_has_come(numbers: Path, tmp_path: Path) -> None:
    put_checkpoint(tmp_path / "runs" / "sql", 10)
    async with on_ray(tmp_path, numbers, FakeEngine(numbers)) as there:
        revision = await there.revision_of("sql")
        await there.ray.kill("a")
        there.ray.roster.died("actor-a")
        there.ray.start(FakeEngine(numbers), "b")
        await there.until(lambda: there.ray.roster.members)
        assert await there.revision_of("sql") == revision


async def test_a_client_that_leaves_ends_its_request_in_the_replica(numbers: Path, tmp_path: Path) -> None:
    put_checkpoint(tmp_path / "runs" / "sql", 10)
    engine = FakeEngine(numbers)
    async with on_ray(tmp_path, numbers, engine) as there:
        asking = asyncio.create_task(there.ask("sql", hold="for ever"))
        await there.until(lambda: holds(engine))
        asking.cancel()
        await there.until(lambda: there.ray.replicas["a"].hosted.in_flight == 0)
        resident = there.ray.replicas["a"].hosted.residency.residents[0]
        assert not resident.busy


async def test_a_stream_comes_through_whole_with_its_own_name(numbers: Path, tmp_path: Path) -> None:
    put_checkpoint(tmp_path / "runs" / "sql", 10)
    async with on_ray(tmp_path, numbers, FakeEngine(numbers)) as there:
        revision = await there.revision_of("sql")
        answer = await there.ask("sql", stream=True)
        assert answer.text.count(f'"model":"{revision}"') == 3
        assert answer.text.endswith("data: [DONE]\n\n")


async def test_an_adapter_that_has_no_slot_in_time_is_503_with_the_reason(numbers: Path, tmp_path: Path) -> None:
    for name in ("sql", "chat"):
        put_checkpoint(tmp_path / "runs" / name, 10, len(name))
    engine = FakeEngine(numbers, slots=1)
    async with on_ray(tmp_path, numbers, engine, load_wait=0.3) as there:
        asking = asyncio.create_task(there.ask("sql", hold="long"))
        await there.until(lambda: holds(engine))
        answer = await there.ask("chat")
        assert answer.status_code == 503
        assert "slot" in answer.json()["error"]["message"]
        engine.gate("long").set()
        assert (await asking).status_code == 200


async def test_the_metrics_of_all_replicas_stand_side_by_side(numbers: Path, tmp_path: Path) -> None:
    engines = FakeEngine(numbers), FakeEngine(numbers)
    for number, engine in enumerate(engines):
        engine.told_metrics = b"# TYPE vllm:num_requests_running gauge\nvllm:num_requests_running %d\n" % number
    async with on_ray(tmp_path, numbers, *engines) as there:
        told = (await there.client.get("/metrics")).text
        assert 'vllm:num_requests_running{replica="a"} 0' in told
        assert 'vllm:num_requests_running{replica="b"} 1' in told
        assert told.count("# TYPE vllm:num_requests_running") == 1


async def test_an_engine_that_has_ended_behind_its_door_is_not_what_answers(numbers: Path, tmp_path: Path) -> None:
    """vLLM's API may outlive what computes: its errors say nothing of the request, nor of the adapter."""
    folder = put_checkpoint(tmp_path / "runs" / "sql", 10)
    engines = FakeEngine(numbers), FakeEngine(numbers)
    async with on_ray(tmp_path, numbers, *engines) as there:
        there.ray.only = "b"
        assert (await there.ask("sql")).status_code == 200
        engines[1].fails.add(fingerprint_of(folder))
        assert (await there.ask("sql")).status_code == 500
        engines[1].dead = True
        assert (await there.ask("sql")).status_code == 503
        resident = there.reconciler.residency.find(str(await there.revision_of_alias("sql")))
        assert resident is not None
        assert await resident.engine.try_out(resident.engine_name) is None


async def test_routes_of_the_engines_own_keepers_are_closed(numbers: Path, tmp_path: Path) -> None:
    async with on_ray(tmp_path, numbers, FakeEngine(numbers)) as there:
        for path in ("/collective_rpc", "/sleep", "/reset_prefix_cache", "/start_draft_update", "/start_profile"):
            assert (await there.client.post(path, json={})).status_code == 404
