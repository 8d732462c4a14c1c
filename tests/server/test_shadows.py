"""A shadow answers as well, and nobody notices: not the client, not its key, not what else is served."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from lorakit.server.requests.answered import Shadowed
from lorakit.server.sharing import shadows as module
from tests.server.fake_engine import FakeEngine, Served, fingerprint_of, put_checkpoint, serving
from tests.server.fake_vllm import FakeVllm
from tests.server.test_remote import in_front, until
from tests.server.test_splitting import asked, put, set_split, sharing, told, until_there

pytestmark = pytest.mark.anyio

SHADOWED = {"revision": "step-500", "shadow": ["step-600"]}


def seen(served: Served) -> list[Shadowed]:
    """What comes of shadows from now on."""
    found: list[Shadowed] = []
    served.reconciler.shadow_observers.append(found.append)
    return found


@asynccontextmanager
async def shadowing(folder: Path, base: Path, **more: Any) -> AsyncIterator[tuple[Served, list[Shadowed]]]:
    """A server on which step 500 answers for `sql` and step 600 is its shadow; and what comes of that."""
    put(folder, 500, 600)
    async with sharing(folder, base, SHADOWED, **more) as (served, _):
        yield served, seen(served)


async def test_its_client_is_answered_by_the_other_and_sees_no_difference(tmp_path: Path, numbers: Path) -> None:
    put(tmp_path, 500, 600)
    async with serving(tmp_path, numbers) as served:
        names = await until_there(served, 500, 600)
        plain = [await served.ask("sql@step-500"), await served.ask("sql@step-500", stream=True)]
        await set_split(served, SHADOWED)
        found = seen(served)
        for before, more in zip(plain, ({}, {"stream": True}), strict=True):
            answer = await served.ask("sql", **more)
            assert (answer.status_code, answer.text) == (before.status_code, before.text)
            assert {*answer.headers.items()} - {*before.headers.items()} == {
                ("x-request-id", answer.headers["x-request-id"])
            }
        await served.until(lambda: len(found) == 2)
        assert {one.revision.name for one in found} == {names[600]}
        assert all(one.answer is not None and one.answer.status == 200 for one in found)
        assert Counter(one["model"] for one in served.engine.asked) == {names[500]: 4, names[600]: 2}


async def test_it_is_asked_the_same_under_an_id_of_its_own(tmp_path: Path, numbers: Path) -> None:
    async with shadowing(tmp_path, numbers) as (served, found):
        await served.client.post(
            "/v1/completions", json={"model": "sql", "prompt": "a", "temperature": 0.5, "user": "ann"},
            headers={"x-request-id": "mine", "traceparent": "00-1-2-01"},
        )  # fmt: skip
        await served.until(lambda: found)
        mine, shadows = served.engine.asked[-2:]
        assert {**mine, "model": ""} == {**shadows, "model": ""}
        headers = served.engine.headers[-1]
        assert headers[b"x-request-id"].startswith(b"mine-")
        assert b"traceparent" not in headers


async def test_it_begins_when_the_client_has_all_of_its_answer(tmp_path: Path, numbers: Path) -> None:
    async with shadowing(tmp_path, numbers) as (served, _):
        held = asyncio.create_task(served.ask("sql", hold="open"))
        await served.until(lambda: served.engine.asked)
        await asyncio.sleep(0.02)
        assert len(served.engine.asked) == 1
        served.engine.gate("open").set()
        assert (await held).status_code == 200
        await served.until(lambda: len(served.engine.asked) == 2)


async def test_what_the_client_did_wrong_or_left_is_not_asked_again(tmp_path: Path, numbers: Path) -> None:
    async with shadowing(tmp_path, numbers) as (served, found):
        assert (await served.ask("sql", boom=True)).status_code == 400
        await served.client.post("/tokenize", json={"model": "sql", "prompt": "a"})
        await served.client.post("/v1/responses", json={"model": "sql", "input": "a"})
        await served.ask("sql@step-500")
        await served.ask("sql")
        await served.until(lambda: found)
        await asyncio.sleep(0.02)
        assert len(found) == 1
        assert len(served.engine.asked) == 6


async def test_a_client_that_leaves_leaves_no_shadow(tmp_path: Path, numbers: Path) -> None:
    async with shadowing(tmp_path, numbers) as (served, found):
        body = iter([{"type": "http.request", "body": b'{"model": "sql", "hold": "never"}'}])

        async def receive() -> Any:
            return next(body, {"type": "http.disconnect"})

        async def send(message: Any) -> None:
            pass

        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
        await served.gateway(scope, receive, send)
        assert served.engine.disconnected == 1
        await served.ask("sql")
        await served.until(lambda: found)
        assert len(served.engine.asked) == 3


async def test_it_costs_no_key_anything_and_is_in_no_ones_count(tmp_path: Path, numbers: Path) -> None:
    async with shadowing(tmp_path, numbers) as (served, found):
        names, heard = await until_there(served, 500, 600), served.heard()
        await asked(served, 5)
        await served.until(lambda: len(found) == 5)
        assert [answer.revision.name for answer in heard if answer.revision] == [names[500]] * 5
        known = (await served.client.get("/v1/adapters/sql")).json()
        assert {one["id"]: one["requests"] for one in known["revisions"]} == {names[500]: 5, names[600]: 0}
        text = (await served.client.get("/metrics")).text
        assert 'lorakit_requests_total{alias="sql",code="200"} 5.0' in text
        assert 'lorakit_shadow_answers_total{alias="sql",result="answered"} 5.0' in text


async def test_only_so_many_are_under_way_and_the_others_are_dropped_and_counted(tmp_path: Path, numbers: Path) -> None:
    async with shadowing(tmp_path, numbers) as (served, found):
        hold_shadows(served)
        counts = await asked(served, module.AT_ONCE + 5)
        assert counts.total() == module.AT_ONCE + 5
        assert [one.answer for one in found] == [None] * 5
        served.engine.gate("shadow").set()
        await served.until(lambda: len(found) == module.AT_ONCE + 5)
        rows = (await served.client.get("/v1/adapters/sql/comparison")).json()["revisions"]
        assert [(one["requests"], one["dropped"]) for one in rows] == [(13, 0), (8, 5)]


def hold_shadows(served: Served, step: int = 600) -> None:
    """The engine answers for that step only when the gate `shadow` is open."""
    answer = served.engine._say

    async def say(request: dict[str, Any], model: str, *more: Any) -> None:
        held = {"hold": "shadow"} if f"step-{step}" in model else {}
        await answer({**request, **held}, model, *more)

    served.engine._say = say  # type: ignore[method-assign]


async def test_a_shadow_that_still_answers_keeps_its_revision_in_the_engine(tmp_path: Path, numbers: Path) -> None:
    async with shadowing(tmp_path, numbers) as (served, _):
        names = await until_there(served, 500, 600)
        hold_shadows(served)
        await served.ask("sql")
        await served.until(lambda: len(served.engine.asked) == 2)
        assert (await served.client.delete("/v1/adapters/sql")).status_code == 200
        for _ in range(10):
            assert await served.revision_of("sql") is None
        assert names[600] in served.engine.inside
        served.engine.gate("shadow").set()
        await served.until(lambda: names[600] not in served.engine.inside)


async def test_it_takes_no_slot_that_others_want(tmp_path: Path, numbers: Path) -> None:
    put(tmp_path, 500, 600)
    put_checkpoint(tmp_path / "runs" / "chat", 100, seed=3)
    engine = FakeEngine(numbers, slots=1, memory=3)
    async with serving(tmp_path, numbers, engine=engine, fair_wait=0.01) as served:
        await until_there(served, 500, 600)
        await served.until(lambda: served.revision_of("chat"))
        await set_split(served, SHADOWED)
        found = seen(served)
        asks = [asyncio.create_task(served.ask("sql", hold="open")), asyncio.create_task(served.ask("sql"))]
        await served.until(lambda: len(served.engine.asked) == 2 or any(task.done() for task in asks))
        waiting = asyncio.create_task(served.ask("chat"))
        await served.until(lambda: found)
        assert found[0].answer is None, "the only slot is in use"
        served.engine.gate("open").set()
        assert (await waiting).status_code == 200
        for task in asks:
            assert (await task).status_code == 200
        await served.until(lambda: len(found) == 2)


async def test_one_that_left_the_memory_is_loaded_again_only_where_nothing_that_stays_has_to_go(
    tmp_path: Path, numbers: Path
) -> None:
    async with shadowing(tmp_path, numbers, slots=2) as (served, found):
        names = await until_there(served, 500, 600)
        await served.reconciler.residency.leave(names[600])
        await served.ask("sql")
        await served.until(lambda: found)
        assert found[0].answer is not None
        put_checkpoint(tmp_path / "runs" / "chat", 100, seed=3)
        put_checkpoint(tmp_path / "runs" / "more", 100, seed=4)
        for name in ("chat", "more", "chat", "more"):
            await served.until(lambda name=name: served.revision_of(name))
        await served.ask("sql")
        await served.until(lambda: len(found) == 2)
        assert found[1].answer is None, "what is in the engine is what other names mean"


async def test_a_request_that_is_too_large_to_be_kept_is_not_asked_again(tmp_path: Path, numbers: Path) -> None:
    async with shadowing(tmp_path, numbers) as (served, found):
        assert (await served.ask("sql", prompt="a" * module.LARGEST)).status_code == 200
        assert [one.answer for one in found] == [None]
        assert len(served.engine.asked) == 1


async def test_an_answer_that_is_too_long_to_be_kept_is_not_compared(
    tmp_path: Path, numbers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "HEARD", 10)
    async with shadowing(tmp_path, numbers) as (served, found):
        await served.ask("sql")
        await served.until(lambda: found)
        assert found[0].answer is not None
        assert found[0].agreement is None


async def test_one_that_never_answers_is_given_up_and_counts_as_nothing(tmp_path: Path, numbers: Path) -> None:
    async with shadowing(tmp_path, numbers, request_timeout=0.2) as (served, found):
        hold_shadows(served)
        assert (await served.ask("sql")).status_code == 200
        await served.until(lambda: found)
        assert found[0].answer is not None
        assert found[0].answer.status == 504
        assert served.engine.disconnected == 1


async def test_one_that_fails_is_dropped_with_an_event_and_its_name_stays(tmp_path: Path, numbers: Path) -> None:
    put(tmp_path, 500, 700)
    weights = fingerprint_of(put_checkpoint(tmp_path / "runs" / "sql", 600))
    async with serving(tmp_path, numbers) as served:
        names = await until_there(served, 500, 600, 700)
        await set_split(served, {"revision": "step-500", "shadow": ["step-600", "step-700"]})
        served.engine.fails.add(weights)

        async def dropped() -> bool:
            await served.ask("sql")
            return len(told(served, "split")) == 2

        await served.until(dropped)
        event = told(served, "split")[-1]
        assert event["why"].startswith("shadow dropped: ")
        assert event["shadow"] == [names[700]]
        known = (await served.client.get("/v1/adapters/sql")).json()
        assert known["splits"]["sql"]["shadow"] == [names[700]]
        assert all(one["passed_over"] is None for one in known["revisions"])
        assert told(served, "rollback") == []
        assert set(await asked(served, 10)) == {names[500]}


async def test_several_shadows_of_several_that_share_answer_each_request_once(tmp_path: Path, numbers: Path) -> None:
    put(tmp_path, 500, 600, 700, 800)
    async with serving(tmp_path, numbers) as served:
        names = await until_there(served, 500, 600, 700, 800)
        shares = [{"revision": "step-500", "share": 0.5}, {"revision": "step-600", "share": 0.5}]
        await set_split(served, {"shares": shares, "shadow": ["step-700", "step-800"]})
        found = seen(served)
        for _ in range(4):
            await served.ask("sql")
        await served.until(lambda: len(found) == 8)
        assert sorted(one.revision.name for one in found) == [names[700]] * 4 + [names[800]] * 4


async def test_an_engine_over_http_is_asked_for_it_like_any_other(tmp_path: Path, numbers: Path) -> None:
    put(tmp_path, 500, 600)
    vllm = FakeVllm(numbers, slots=8, removes=True)
    async with in_front(vllm, tmp_path) as client:

        async def shadowed() -> bool:
            answer = await client.put("/v1/adapters/sql/aliases/sql", json=SHADOWED)
            return answer.status_code == 200

        await until(shadowed)
        answer = await client.post("/v1/completions", json={"model": "sql"}, headers={"authorization": "Bearer x"})
        assert "step-500" in answer.headers["x-lorakit-revision"]

        async def compared() -> bool:
            rows = (await client.get("/v1/adapters/sql/comparison")).json()["revisions"]
            return [(row["requests"], row["errors"], row["dropped"]) for row in rows] == [(1, 0, 0)] * 2

        await until(compared)


async def test_what_stops_waits_for_no_shadow(tmp_path: Path, numbers: Path) -> None:
    async with shadowing(tmp_path, numbers) as (served, _):
        hold_shadows(served)
        await served.ask("sql")
        await served.until(lambda: len(served.engine.asked) == 2)
