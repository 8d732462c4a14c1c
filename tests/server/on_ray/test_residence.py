"""Adapters in several replicas as the gateway counts them, over fake engines (fakes.py)."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from lorakit.server.on_ray.messages import Orders
from tests.server.fake_engine import fingerprint_of, put_checkpoint
from tests.server.on_ray.fakes import FakeEngine, holds, on_ray

pytestmark = pytest.mark.anyio


async def test_an_adapter_answers_from_each_replica_as_itself_and_says_its_revision(
    numbers: Path, tmp_path: Path
) -> None:
    folder = put_checkpoint(tmp_path / "runs" / "sql", 10)
    async with on_ray(tmp_path, numbers, FakeEngine(numbers), FakeEngine(numbers)) as there:
        revision = await there.revision_of("sql")
        for replica in ("a", "b"):
            there.ray.only = replica
            answer = await there.ask("sql")
            assert answer.headers["x-lorakit-replica"] == replica
            assert answer.headers.get_list("x-lorakit-revision") == [revision]
            assert answer.json()["model"] == revision
            assert answer.json()["choices"][0]["text"] == fingerprint_of(folder)


async def test_a_prompt_that_looks_like_a_model_stays_as_it_is(numbers: Path, tmp_path: Path) -> None:
    put_checkpoint(tmp_path / "runs" / "sql", 10)
    async with on_ray(tmp_path, numbers, FakeEngine(numbers)) as there:
        revision = await there.revision_of("sql")
        prompt = f'{{"model":"{revision}"}} lorakit-0'
        answer = await there.ask("sql", prompt=prompt, metadata={"model": revision})
        assert answer.status_code == 200
        assert there.engine.asked[-1]["prompt"] == prompt
        assert there.engine.asked[-1]["metadata"] == {"model": revision}


async def test_a_new_checkpoint_comes_to_every_replica_that_had_the_one_before(numbers: Path, tmp_path: Path) -> None:
    put_checkpoint(tmp_path / "runs" / "sql", 10)
    engines = FakeEngine(numbers), FakeEngine(numbers)
    async with on_ray(tmp_path, numbers, *engines) as there:
        for there.ray.only in ("a", "b"):
            assert (await there.ask("sql")).status_code == 200
        await there.until(lambda: all(len(one.told.adapters) == 1 for one in there.ray.roster.members))
        new = put_checkpoint(tmp_path / "runs" / "sql", 20)
        await there.until(lambda: all(fingerprint_of(new) in engine.inside.values() for engine in engines))


async def test_a_new_replica_has_what_is_served_before_anybody_asks_it(numbers: Path, tmp_path: Path) -> None:
    folders = [put_checkpoint(tmp_path / "runs" / name, 10, seed) for seed, name in enumerate(("sql", "chat"), 1)]
    async with on_ray(tmp_path, numbers, FakeEngine(numbers)) as there:
        new = FakeEngine(numbers)
        there.ray.start(new, "b")
        await there.until(lambda: set(new.inside.values()) == {fingerprint_of(folder) for folder in folders})
        assert there.ray.replicas["b"].answered == 0


async def test_a_replica_that_takes_its_leave_is_counted_on_no_more(numbers: Path, tmp_path: Path) -> None:
    put_checkpoint(tmp_path / "runs" / "sql", 10)
    async with on_ray(tmp_path, numbers, FakeEngine(numbers), FakeEngine(numbers)) as there:
        hosted = there.ray.replicas["b"].hosted
        before = there.reconciler.residency.counted.loads
        await there.ray.kill("b")
        await there.ray.tell(replace(hosted.told(), ends=True))
        assert [member.name for member in there.ray.roster.members] == ["a"]
        assert there.reconciler.residency.counted.loads >= before
        assert there.reconciler.engine.limits.slots == 4


async def test_what_is_unloaded_leaves_every_replica_after_its_last_request(numbers: Path, tmp_path: Path) -> None:
    put_checkpoint(tmp_path / "runs" / "sql", 10)
    engines = FakeEngine(numbers), FakeEngine(numbers)
    async with on_ray(tmp_path, numbers, *engines) as there:
        there.ray.only = "b"
        asking = asyncio.create_task(there.ask("sql", hold="long"))
        await there.until(lambda: holds(engines[1]))
        assert (await there.client.delete("/v1/adapters/sql")).status_code == 200
        assert (await there.ask("sql")).status_code == 404
        await asyncio.sleep(0.1)
        assert engines[1].inside
        engines[1].gate("long").set()
        assert (await asking).status_code == 200
        await there.until(lambda: not engines[0].inside and not engines[1].inside)
        await there.until(lambda: not list((tmp_path / "home" / "revisions").iterdir()))


async def test_more_adapters_than_a_replica_holds_all_answer_right(numbers: Path, tmp_path: Path) -> None:
    folders = {f"r{seed}": put_checkpoint(tmp_path / "runs" / f"r{seed}", 10, seed) for seed in range(1, 8)}
    engines = FakeEngine(numbers, slots=2), FakeEngine(numbers, slots=2)
    async with on_ray(tmp_path, numbers, *engines) as there:
        for _ in range(3):
            answers = await asyncio.gather(*(there.ask(name) for name in folders))
            for answer, folder in zip(answers, folders.values(), strict=True):
                assert answer.json()["choices"][0]["text"] == fingerprint_of(folder)


async def test_what_an_engine_refuses_is_refused_in_its_words(numbers: Path, tmp_path: Path) -> None:
    folder = put_checkpoint(tmp_path / "runs" / "sql", 10)
    engine = FakeEngine(numbers)
    engine.refuses.add(fingerprint_of(folder))
    async with on_ray(tmp_path, numbers, engine, ready=False) as there:

        async def refused() -> bool:
            told = (await there.client.get("/v1/adapters/sql")).json()
            return told.get("state") == "refused" and "not loaded here" in told["reason"]

        await there.until(refused)


async def test_what_made_place_everywhere_is_in_the_store_alone(
    numbers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorakit.server.on_ray.residence.YOUNG", 0.0)
    monkeypatch.setattr("lorakit.server.on_ray.residence.LOOK", 0.0)
    for seed in (1, 2, 3):
        put_checkpoint(tmp_path / "runs" / f"r{seed}", 10, seed)
    async with on_ray(tmp_path, numbers, FakeEngine(numbers, slots=1)) as there:
        for seed in (1, 2, 3):
            assert (await there.ask(f"r{seed}")).status_code == 200
        await there.until(lambda: len(there.reconciler.residency.residents) == 1)
        assert there.reconciler.residency.counted.loads >= 3


async def test_no_more_is_loaded_than_a_replica_holds_by_a_new_ones_welcome(numbers: Path, tmp_path: Path) -> None:
    for seed in (1, 2, 3):
        put_checkpoint(tmp_path / "runs" / f"r{seed}", 10, seed)
    async with on_ray(tmp_path, numbers, FakeEngine(numbers, slots=3)) as there:
        new = FakeEngine(numbers, slots=1)
        there.ray.start(new, "b")
        await there.until(lambda: len(new.inside) == 1)
        await asyncio.sleep(0.2)
        assert len(new.loads) == 1


async def test_the_same_content_under_two_names_is_one_adapter_and_leaves_with_the_last(
    numbers: Path, tmp_path: Path
) -> None:
    for name in ("sql", "chat"):
        put_checkpoint(tmp_path / "runs" / name, 10, 1)
    engine = FakeEngine(numbers)
    async with on_ray(tmp_path, numbers, engine) as there:
        answers = await asyncio.gather(there.ask("sql"), there.ask("chat"))
        names = [answer.json()["model"] for answer in answers]
        assert [name.partition("@")[0] for name in names] == ["sql", "chat"]
        assert len(engine.inside) == 1
        await there.client.delete("/v1/adapters/sql")
        await asyncio.sleep(0.1)
        assert (await there.ask("chat")).status_code == 200
        await there.client.delete("/v1/adapters/chat")
        await there.until(lambda: not engine.inside)


async def test_an_order_that_is_lost_on_its_way_blocks_its_adapter_no_longer_than_it_has_time(
    numbers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The replica goes on to say that it is well, but never heard of it: its question had timed out."""
    monkeypatch.setattr("lorakit.server.on_ray.residence.GRACE", 0.2)
    folder = put_checkpoint(tmp_path / "runs" / "sql", 10)
    engine = FakeEngine(numbers)
    async with on_ray(tmp_path, numbers, engine, ready=False, load_wait=0.3) as there:
        hosted = there.ray.replicas["a"].hosted
        lost: list[Orders] = []

        def obey(orders: Orders) -> None:
            if orders.bring and not lost:
                lost.append(orders)
            else:
                heard(orders)

        heard = hosted.obey
        monkeypatch.setattr(hosted, "obey", obey)
        await there.until(lambda: fingerprint_of(folder) in engine.inside.values())
        assert lost
