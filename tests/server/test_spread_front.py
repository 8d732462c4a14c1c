"""The gateway in front of engines at addresses of their own: they come late, go, come back, or can't be used."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from lorakit.errors import EngineFailed
from lorakit.server.spread import joining
from lorakit.server.spread.front import SpreadFront
from tests.server.fake_engine import fingerprint_of, put_checkpoint, settings_for
from tests.server.fake_vllm import FakeVllm, listening

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first engine waits for no other."""
    monkeypatch.setattr(joining, "TOGETHER", 0.1)


class Front:
    def __init__(self, client: httpx.AsyncClient, running: asyncio.Task[None]) -> None:
        self.client, self.running = client, running

    async def ask(self, model: str) -> httpx.Response:
        return await self.client.post("/v1/completions", json={"model": model, "prompt": "a"})

    async def until(self, condition: Any) -> None:
        async with asyncio.timeout(30):
            while not await condition():
                assert not self.running.done(), self.running.result()
                await asyncio.sleep(0.05)

    async def ready(self) -> bool:
        return (await self.client.get("/ready")).status_code == 200


@asynccontextmanager
async def in_front_of(folder: Path, engines: dict[str, str], **more: Any) -> AsyncIterator[Front]:
    settings = settings_for(folder, max_loras=8, hang_limit=2.0, load_wait=5.0, **more)
    front = SpreadFront(engines, settings, base_path="", max_rank=16)
    running = asyncio.create_task(front.run())
    try:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(front), base_url="http://lorakit") as client:
            yield Front(client, running)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def test_engines_that_come_late_join(numbers: Path, tmp_path: Path) -> None:
    """Until the first of them, all is 503 with the reason; after it, nothing waits for the others."""
    folders = {name: put_checkpoint(tmp_path / "runs" / name, 10, seed) for seed, name in enumerate("ab", 1)}
    paths = [tmp_path / f"{number}.sock" for number in range(2)]
    vllms = [FakeVllm(numbers, removes=True) for _ in paths]
    engines = {str(number): f"unix:{path}" for number, path in enumerate(paths)}
    async with AsyncExitStack() as there, in_front_of(tmp_path, engines) as front:
        answer = await front.ask("base")
        assert answer.status_code == 503
        await front.until(lambda: told(front, "does not answer"))
        await there.enter_async_context(listening(vllms[1], path=paths[1]))
        await front.until(front.ready)
        for name, folder in folders.items():
            assert (await front.ask(name)).json()["choices"][0]["text"] == fingerprint_of(folder)
        await there.enter_async_context(listening(vllms[0], path=paths[0]))
        await front.until(lambda: both_answer(front, vllms))


async def told(front: Front, words: str) -> bool:
    return words in (await front.ask("base")).text


async def both_answer(front: Front, vllms: list[FakeVllm]) -> bool:
    await asyncio.gather(*(front.ask("base") for _ in range(8)))
    return all(sum(scope["path"] == "/v1/completions" for scope in vllm.asked) > 2 for vllm in vllms)


async def test_an_engine_that_ends_and_is_started_anew_harms_nobody(numbers: Path, tmp_path: Path) -> None:
    folders = {name: put_checkpoint(tmp_path / "runs" / name, 10, seed) for seed, name in enumerate("abcd", 1)}
    paths = [tmp_path / f"{number}.sock" for number in range(2)]
    engines = {str(number): f"unix:{path}" for number, path in enumerate(paths)}
    async with AsyncExitStack() as there:
        first = await there.enter_async_context(AsyncExitStack())
        await first.enter_async_context(listening(FakeVllm(numbers, removes=True), path=paths[0]))
        await there.enter_async_context(listening(FakeVllm(numbers, removes=True), path=paths[1]))
        front = await there.enter_async_context(in_front_of(tmp_path, engines))
        await front.until(front.ready)
        await first.aclose()
        for name, folder in folders.items():
            answer = await front.ask(name)
            assert (answer.status_code, answer.json()["choices"][0]["text"]) == (200, fingerprint_of(folder))
        anew = FakeVllm(numbers, removes=True)
        paths[0].unlink()
        async with listening(anew, path=paths[0]):
            await front.until(lambda: has_adapters(anew))
            for name, folder in folders.items():
                assert (await front.ask(name)).json()["choices"][0]["text"] == fingerprint_of(folder)


async def has_adapters(vllm: FakeVllm) -> bool:
    return bool(vllm.inside)


async def test_one_that_can_not_be_used_is_said_at_once(numbers: Path, tmp_path: Path) -> None:
    vllm = FakeVllm(numbers)
    vllm.routes = ("/v1/completions", "/v1/models")
    async with listening(vllm) as url, in_front_of(tmp_path, {"0": url, "1": "http://127.0.0.1:9"}) as front:
        with pytest.raises(EngineFailed, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING"):
            await front.running


async def test_a_second_of_another_base_stays_out(numbers: Path, tmp_path: Path, caplog: Any) -> None:
    other = FakeVllm(numbers)
    other.name = "other"
    async with AsyncExitStack() as there:
        urls = [await there.enter_async_context(listening(vllm)) for vllm in (FakeVllm(numbers),)]
        path = tmp_path / "late.sock"
        front = await there.enter_async_context(in_front_of(tmp_path, {"0": urls[0], "1": f"unix:{path}"}))
        await front.until(front.ready)
        await there.enter_async_context(listening(other, path=path))
        await front.until(lambda: said(caplog, "start all with one base"))
        assert (await front.ask("base")).status_code == 200
    assert not [scope for scope in other.asked if scope["path"] == "/v1/load_lora_adapter"]


async def said(caplog: Any, words: str) -> bool:
    return any(words in record.getMessage() for record in caplog.records)
