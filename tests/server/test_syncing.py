"""Adapters kept in step on an engine that its clients ask themselves: nothing leaves under a request for it."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from lorakit.server.engines.front import Front
from lorakit.server.engines.remote import Http, RemoteEngine
from lorakit.server.engines.unattended import UnattendedEngine
from lorakit.server.engines.vllm import adapters_asked
from lorakit.server.gateway import Gateway
from lorakit.server.syncing import Syncing
from tests.server.fake_engine import fingerprint_of, put_checkpoint, settings_for
from tests.server.fake_vllm import FakeVllm, listening
from tests.server.test_remote import until

pytestmark = pytest.mark.anyio


class Beside:
    """A lorakit beside an engine: its own routes, and the file with the names."""

    def __init__(self, client: httpx.AsyncClient, file: Path, running: asyncio.Task[None]) -> None:
        self.client, self.file, self.running = client, file, running

    @property
    def names(self) -> dict[str, str]:
        names: dict[str, str] = json.loads(self.file.read_text())["names"] if self.file.exists() else {}
        return names

    async def has_second(self) -> bool:
        known = (await self.client.get("/v1/adapters/sql")).json()
        return len(known["revisions"]) == 2

    async def put(self, alias: str, revision: str) -> None:
        answer = await self.client.put(f"/v1/adapters/sql/aliases/{alias}", json={"revision": revision})
        assert answer.status_code == 200, answer.text


@asynccontextmanager
async def beside(url: str, folder: Path, linger: float = 0.0, **more: Any) -> AsyncIterator[Beside]:
    http, file = Http(url), folder / "names.json"

    async def sync(gateway: Gateway, engine: RemoteEngine) -> None:
        assert isinstance(engine, UnattendedEngine)
        await Syncing(gateway.reconciler, engine, linger=linger, names=file).run()

    settings = settings_for(folder, **{"max_loras": 8, "load_wait": 5.0, **more})
    front = Front(http, settings, base_path="", max_rank=16, kind=UnattendedEngine, beside=sync)
    running = asyncio.create_task(front.run())
    try:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(front), base_url="http://lorakit") as client:
            yield Beside(client, file, running)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await http.close()


async def said(url: str, model: str) -> str | None:
    """What the engine itself answers; None where it knows no such model."""
    async with httpx.AsyncClient(base_url=url) as client:
        answer = await client.post("/v1/completions", json={"model": model, "prompt": "a"})
        return answer.json()["choices"][0]["text"] if answer.status_code == 200 else None


async def test_each_checkpoint_is_there_under_a_name_of_its_own_and_the_file_says_what_a_name_means(
    tmp_path: Path, numbers: Path
) -> None:
    vllm = FakeVllm(numbers, removes=True)
    first = put_checkpoint(tmp_path / "runs" / "sql", 1, 1)
    async with listening(vllm) as url, beside(url, tmp_path) as lorakit:
        await until(lambda: lorakit.names.get("sql", "").startswith("sql@step-1-"))
        before = lorakit.names["sql"]
        assert await said(url, before) == fingerprint_of(first)
        shutil.rmtree(first)  # as a trainer rotates
        second = put_checkpoint(tmp_path / "runs" / "sql", 2, 2)
        await until(lambda: lorakit.names["sql"].startswith("sql@step-2-"))
        assert await said(url, lorakit.names["sql"]) == fingerprint_of(second)
        assert lorakit.names["sql@latest"] == lorakit.names["sql"]
        await lorakit.client.post("/v1/adapters/sql/rollback")
        await until(lambda: lorakit.names["sql"].partition("#")[0] == before)


async def test_what_a_request_is_in_flight_for_does_not_leave_though_its_place_is_wanted(
    tmp_path: Path, numbers: Path
) -> None:
    vllm = FakeVllm(numbers, removes=True, slots=1)
    put_checkpoint(tmp_path / "runs" / "sql", 1, 1)
    async with listening(vllm) as url, beside(url, tmp_path, load_wait=1.0) as lorakit:
        await until(lambda: "sql" in lorakit.names)
        first = lorakit.names["sql"]
        vllm.running = [first]
        looks = len(vllm.asked)
        await until(lambda: [scope["path"] for scope in vllm.asked[looks:]].count("/metrics") > 1)
        second = put_checkpoint(tmp_path / "runs" / "sql", 2, 2)
        await until(lorakit.has_second)
        answer = await lorakit.client.put("/v1/adapters/sql/aliases/prod", json={"revision": "step-2"})
        assert answer.status_code == 503, answer.text
        assert await said(url, first) is not None
        vllm.running = []
        await until(lambda: lorakit.names.get("sql", first) != first)
        assert await said(url, lorakit.names["sql"]) == fingerprint_of(second)
        assert await said(url, first) is None


async def test_what_a_name_meant_before_lingers_for_those_who_still_ask_for_it(tmp_path: Path, numbers: Path) -> None:
    vllm = FakeVllm(numbers, removes=True)
    put_checkpoint(tmp_path / "runs" / "sql", 1, 1)
    async with listening(vllm) as url, beside(url, tmp_path, linger=3600.0, keep_revisions=1) as lorakit:
        await until(lambda: "sql" in lorakit.names)
        first = lorakit.names["sql"]
        for step in (2, 3):
            put_checkpoint(tmp_path / "runs" / "sql", step, step)
            await until(lambda step=step: lorakit.names["sql"].startswith(f"sql@step-{step}-"))
        await asyncio.sleep(1.5)  # some looks
        assert await said(url, first) is not None


async def test_without_lingering_what_is_kept_no_more_leaves_the_engine(tmp_path: Path, numbers: Path) -> None:
    vllm = FakeVllm(numbers, removes=True)
    put_checkpoint(tmp_path / "runs" / "sql", 1, 1)
    async with listening(vllm) as url, beside(url, tmp_path, keep_revisions=1) as lorakit:
        await until(lambda: "sql" in lorakit.names)
        first = lorakit.names["sql"]
        for step in (2, 3):  # a rollback would go to the one before
            put_checkpoint(tmp_path / "runs" / "sql", step, step)
            await until(lambda step=step: lorakit.names["sql"].startswith(f"sql@step-{step}-"))
        await until(lambda: first not in vllm.named)
        await until(lambda: len(vllm.inside) == 2)


async def test_when_lorakit_goes_its_adapters_stay_and_when_it_comes_back_they_are_known(
    tmp_path: Path, numbers: Path
) -> None:
    vllm = FakeVllm(numbers, removes=True)
    for step in (1, 2):
        put_checkpoint(tmp_path / "runs" / "sql", step, step)
    async with listening(vllm) as url:
        async with beside(url, tmp_path) as lorakit:
            await until(lambda: lorakit.names.get("sql", "").startswith("sql@step-2-"))
            await lorakit.put("prod", "step-1")
            await until(lambda: "sql@prod" in lorakit.names)
            names = lorakit.names
        assert {await said(url, name) for name in names.values()} != {None}
        loaded = vllm.count
        async with beside(url, tmp_path) as lorakit:
            await until(lambda: lorakit.names == names)
            await asyncio.sleep(1.0)
        assert vllm.count == loaded, "none of them was loaded a second time"


async def test_what_was_left_there_and_means_nothing_any_more_makes_place(tmp_path: Path, numbers: Path) -> None:
    vllm = FakeVllm(numbers, removes=True, slots=2)
    put_checkpoint(tmp_path / "runs" / "sql", 1, 1)
    revisions = tmp_path / "home" / "revisions"
    for name in ("old@step-1-x", "old@step-2-x"):
        vllm.put(name, str(revisions / name), name)
    async with listening(vllm) as url, beside(url, tmp_path) as lorakit:
        await until(lambda: "sql" in lorakit.names)
        await until(lambda: list(vllm.named) == [lorakit.names["sql"]])
        assert len(vllm.inside) == 1


async def test_adapters_of_others_stay(tmp_path: Path, numbers: Path) -> None:
    vllm = FakeVllm(numbers, removes=True, slots=3)
    vllm.put("theirs", "/elsewhere/theirs", "theirs")
    put_checkpoint(tmp_path / "runs" / "sql", 1, 1)
    async with listening(vllm) as url, beside(url, tmp_path) as lorakit:
        await until(lambda: "sql" in lorakit.names)
        assert await said(url, "theirs") == "theirs"
    assert "theirs" in vllm.named


METRICS = b"""
vllm:num_requests_running{engine="0",model_name="base"} %d.0
vllm:num_requests_waiting{engine="0",model_name="base"} 0.0
vllm:lora_requests_info{max_lora="4",running_lora_adapters="a",waiting_lora_adapters=""} 1.7000000000e+09
vllm:lora_requests_info{max_lora="4",running_lora_adapters="b,c",waiting_lora_adapters="d"} 1.7000001000e+09
vllm:lora_requests_info{max_lora="4",running_lora_adapters="e",waiting_lora_adapters=""} 1.7000000980e+09
"""


def test_the_newest_sets_are_those_that_are_asked_for_now() -> None:
    assert adapters_asked(METRICS % 3) == {"b", "c", "d", "e"}


def test_with_no_request_in_the_engine_none_is_asked_for() -> None:
    assert adapters_asked(METRICS % 0) == set()
    assert adapters_asked(b"") == set()
