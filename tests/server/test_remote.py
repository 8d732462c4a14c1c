"""An engine over HTTP that lorakit did not start: what is asked of it, what passes through, what it is refused."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from lorakit.errors import EngineFailed
from lorakit.server.engines.engine import LoadFailed, Unreached
from lorakit.server.engines.front import Front
from lorakit.server.engines.remote import Http, RemoteEngine
from tests.server.fake_engine import fingerprint_of, put_adapter, put_checkpoint, settings_for
from tests.server.fake_vllm import FakeVllm, listening

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def connected(vllm: FakeVllm, store: Path, *, slots: int = 8, key: str = "") -> AsyncIterator[RemoteEngine]:
    async with listening(vllm) as url:
        http = Http(url, key)
        try:
            yield await RemoteEngine.connect(http, store, base_path="", slots=slots, max_rank=16)
        finally:
            await http.close()


@asynccontextmanager
async def passing(vllm: FakeVllm, store: Path, key: str = "") -> AsyncIterator[httpx.AsyncClient]:
    """A client of what hands everything on to an engine."""
    async with (
        connected(vllm, store, key=key) as engine,
        listening(engine.answer) as url,
        httpx.AsyncClient(base_url=url) as client,
    ):
        yield client


@asynccontextmanager
async def in_front(vllm: FakeVllm, folder: Path, port: int = 0, **more: Any) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a gateway in front of it."""
    async with listening(vllm, port) as url, before(url, folder, **more) as client:
        yield client


@asynccontextmanager
async def before(url: str, folder: Path, **more: Any) -> AsyncIterator[httpx.AsyncClient]:
    http = Http(url)
    front = Front(
        http, settings_for(folder, max_loras=8, hang_limit=2.0, load_wait=5.0, **more), base_path="", max_rank=16
    )
    running = asyncio.create_task(front.run())
    try:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(front), base_url="http://lorakit") as client:
            await until(lambda: running.done() or ready(client))
            yield client
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await http.close()


async def ready(client: httpx.AsyncClient) -> bool:
    return (await client.get("/ready")).status_code == 200


async def until(condition: Any) -> None:
    async with asyncio.timeout(30):
        while True:
            found = condition()
            if (await found) if asyncio.iscoroutine(found) else found:
                return
            await asyncio.sleep(0.05)


async def ask(client: httpx.AsyncClient, model: str) -> httpx.Response:
    return await client.post("/v1/completions", json={"model": model, "prompt": "a"})


# what it can do


async def test_what_an_engine_offers_is_asked_for(numbers: Path, tmp_path: Path) -> None:
    async with connected(FakeVllm(numbers, slots=3, version="0.31.0"), tmp_path) as engine:
        limits = engine.limits
        assert (limits.base, limits.base_path, limits.slots) == ("base", str(numbers), 3)
        assert limits.engine == "vllm 0.31.0"
        assert not limits.honours_patterns
        assert engine.serves("/v1/completions")
        assert not engine.serves("/v1/embeddings")
        assert engine.goes_around("/collective_rpc")
        assert engine.model_card()["root"] == str(numbers)


@pytest.mark.parametrize(("version", "cpu", "slots"), [("0.32.0", True, 3), ("0.32.0", False, 4), ("0.33.0", True, 4)])
async def test_on_a_cpu_before_033_one_slot_stays_empty(
    numbers: Path, tmp_path: Path, version: str, cpu: bool, slots: int
) -> None:
    async with connected(FakeVllm(numbers, version=version, cpu=cpu), tmp_path) as engine:
        assert engine.limits.slots == slots


async def test_an_engine_without_routes_for_adapters_is_refused_with_what_to_set(numbers: Path, tmp_path: Path) -> None:
    vllm = FakeVllm(numbers)
    vllm.routes = ("/v1/completions",)
    with pytest.raises(EngineFailed, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"):
        async with connected(vllm, tmp_path):
            pass


async def test_an_engine_that_wants_a_key_says_so_and_is_given_it(numbers: Path, tmp_path: Path) -> None:
    vllm = FakeVllm(numbers)
    vllm.key = "secret"
    with pytest.raises(EngineFailed, match="LORAKIT_ENGINE_KEY"):
        async with connected(vllm, tmp_path):
            pass
    async with passing(vllm, tmp_path, key="secret") as client:
        answer = await client.get("/v1/models", headers={"authorization": "Bearer of-the-client"})
        assert answer.status_code == 200


async def test_what_is_no_vllm_is_refused(numbers: Path, tmp_path: Path) -> None:
    vllm = FakeVllm(numbers)
    vllm.version = None  # type: ignore[assignment]
    with pytest.raises(EngineFailed, match="is no vLLM"):
        async with connected(vllm, tmp_path):
            pass


# what passes through


async def test_the_first_piece_is_passed_on_before_there_is_a_second(numbers: Path, tmp_path: Path) -> None:
    vllm = FakeVllm(numbers)
    async with passing(vllm, tmp_path) as client, client.stream("POST", "/first?a=%2F", json={}) as answer:
        pieces = answer.aiter_raw()
        assert len(await anext(pieces)) == 4096
        vllm.gate.set()
        assert await anext(pieces) == b"last"
        assert answer.headers["content-encoding"] == "odd"
        assert vllm.asked[-1]["query_string"] == b"a=%2F"


async def test_an_engine_makes_no_more_than_its_client_takes(numbers: Path, tmp_path: Path) -> None:
    vllm = FakeVllm(numbers)
    async with passing(vllm, tmp_path) as client, client.stream("GET", "/endless") as answer:
        pieces = answer.aiter_raw()
        await anext(pieces)
        before = -1
        while vllm.sent != before:  # until it stands still
            before = vllm.sent
            await asyncio.sleep(0.3)
        assert vllm.sent < 64 * 2**20, "it is held up by a client that reads no more"


@pytest.mark.parametrize("path", ["/endless", "/first"])
async def test_a_client_that_leaves_leaves_the_engine_too(numbers: Path, tmp_path: Path, path: str) -> None:
    vllm = FakeVllm(numbers)
    async with passing(vllm, tmp_path) as client:
        async with client.stream("GET", path) as answer:
            pieces = answer.aiter_raw()
            await anext(pieces)
        async with asyncio.timeout(10):
            await vllm.disconnected.wait()


async def test_an_answer_that_is_cut_off_does_not_look_complete(
    numbers: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL, "uvicorn.error")
    async with passing(FakeVllm(numbers), tmp_path) as client:
        with pytest.raises(httpx.RemoteProtocolError):
            await client.get("/cut")


async def test_a_body_that_comes_in_pieces_goes_on_in_pieces(numbers: Path, tmp_path: Path) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        yield b'{"model": "base", '
        await asyncio.sleep(0.01)
        yield b'"prompt": "a"}'

    async with passing(FakeVllm(numbers), tmp_path) as client:
        answer = await client.post("/v1/completions", content=pieces())
        assert answer.json()["choices"][0]["text"] == "base"


async def test_where_nobody_listens_nothing_was_sent(numbers: Path) -> None:
    async with listening(FakeVllm(numbers)) as url:
        http = Http(url)

    said = [{"type": "http.request", "body": b"{}", "more_body": False}]

    async def receive() -> Any:
        return said.pop() if said else await asyncio.get_running_loop().create_future()

    async def send(message: Any) -> None:
        raise AssertionError(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
    with pytest.raises(Unreached, match=url):
        await http.hand_on(scope, receive, send)
    await http.close()


async def test_an_engine_that_is_gone_is_503_with_its_address(numbers: Path, tmp_path: Path) -> None:
    async with AsyncExitStack() as there:
        url = await there.enter_async_context(listening(FakeVllm(numbers)))
        async with before(url, tmp_path) as client:
            assert (await ask(client, "base")).status_code == 200
            await there.aclose()
            answers = [await ask(client, "base"), await client.get("/version")]
    for answer in answers:
        assert answer.status_code == 503
        assert "retry-after" in answer.headers
    assert url in answers[0].json()["error"]["message"]


async def test_an_engine_may_listen_on_a_socket_of_its_own(numbers: Path, tmp_path: Path) -> None:
    path = tmp_path / "engine.sock"
    async with listening(FakeVllm(numbers), path=path):
        http = Http(f"unix:{path}")
        engine = await RemoteEngine.connect(http, tmp_path, base_path="", slots=2, max_rank=16)
        assert engine.limits.base == "base"
        assert await engine.try_out("base") is None
        await http.close()


# adapters


@pytest.mark.parametrize("removes", [True, False])
async def test_an_adapter_is_loaded_answers_and_leaves(
    numbers: Path, tmp_path: Path, removes: bool, caplog: pytest.LogCaptureFixture
) -> None:
    vllm = FakeVllm(numbers, removes=removes)
    async with connected(vllm, tmp_path) as engine:
        for number in range(3):
            await engine.load(f"a{number}", put_adapter(tmp_path / f"a{number}", number))
            assert await engine.try_out(f"a{number}") is None
        await engine.remove("a1")
        assert list(vllm.named) == ["a0", "a2"]
        assert vllm.inside == ([1, 3] if removes else [1, 2, 3])
        assert "does not exist" in str(await engine.try_out("a1"))
        assert ("keeps its place" in caplog.text) == (not removes)


@pytest.mark.parametrize("removes", [True, False])
async def test_a_failed_load_leaves_nothing_where_that_can_be_helped(
    numbers: Path, tmp_path: Path, removes: bool
) -> None:
    vllm = FakeVllm(numbers, removes=removes)
    async with connected(vllm, tmp_path) as engine:
        (tmp_path / "empty").mkdir()
        with pytest.raises(LoadFailed, match="at the same path"):
            await engine.load("a", tmp_path / "empty")
        assert vllm.inside == ([] if removes else [1])


async def test_what_an_earlier_gateway_left_is_taken_out_and_adapters_of_others_keep_their_places(
    numbers: Path, tmp_path: Path
) -> None:
    vllm = FakeVllm(numbers, removes=True)
    vllm.put("theirs", "/elsewhere", "theirs")
    vllm.put("sql@step-1-aaaaaaaa", str(tmp_path / "revisions" / "a"), "ours")
    async with connected(vllm, tmp_path) as engine:
        assert list(vllm.named) == ["theirs"]
        assert vllm.inside == [1]
        assert engine.limits.slots == 3


async def test_a_gateway_leaves_nothing_behind_where_it_can_be_taken_out(numbers: Path, tmp_path: Path) -> None:
    put_checkpoint(tmp_path / "runs" / "sql", 1)
    vllm = FakeVllm(numbers, removes=True)
    vllm.put("theirs", "/elsewhere", "theirs")
    async with in_front(vllm, tmp_path):
        assert len(vllm.inside) == 2
    assert (vllm.inside, list(vllm.named)) == ([1], ["theirs"])


async def test_where_nothing_can_be_taken_out_it_is_known_again(numbers: Path, tmp_path: Path) -> None:
    vllm = FakeVllm(numbers, cpu=True)
    vllm.put("sql@step-1-aaaaaaaa", str(tmp_path / "revisions" / "a"), "ours")
    async with connected(vllm, tmp_path) as engine:
        await engine.load("sql@step-1-aaaaaaaa", tmp_path / "revisions" / "a")
        for name in ("b", "c"):
            assert engine.no_place_for(name) is None
            await engine.load(name, put_adapter(tmp_path / name))
        assert engine.no_place_for("sql@step-1-aaaaaaaa") is None
        assert "VLLM_SERVER_DEV_MODE=1" in str(engine.no_place_for("d"))


async def test_an_engine_full_of_adapters_of_others_is_refused(numbers: Path, tmp_path: Path) -> None:
    vllm = FakeVllm(numbers, slots=1)
    vllm.put("theirs", "/elsewhere", "theirs")
    with pytest.raises(EngineFailed, match="full of adapters of others: theirs"):
        async with connected(vllm, tmp_path):
            pass


# the gateway in front


async def test_a_run_is_served_and_followed_in_front_of_an_engine(numbers: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "sql"
    first = put_checkpoint(run, 1)
    async with in_front(FakeVllm(numbers), tmp_path) as client:
        answer = await ask(client, "sql")
        assert answer.json()["choices"][0]["text"] == fingerprint_of(first)
        assert answer.headers["x-lorakit-revision"].startswith("sql@step-1-")
        second = put_checkpoint(run, 2)
        await until(lambda: says(client, "sql", fingerprint_of(second)))
        assert (await ask(client, "base")).json()["choices"][0]["text"] == "base"
        assert (await client.post("/collective_rpc", json={"method": "remove_lora"})).status_code == 404


async def says(client: httpx.AsyncClient, model: str, what: str) -> bool:
    answer = await ask(client, model)
    return answer.status_code == 200 and answer.json()["choices"][0]["text"] == what


async def test_more_than_an_engine_can_hold_right_is_refused_in_words_and_the_rest_answers(
    numbers: Path, tmp_path: Path
) -> None:
    """On a CPU before 0.33, without removal: the last slot is never filled, so what came first stays."""
    run = tmp_path / "runs" / "sql"
    held = [put_checkpoint(run, step) for step in (1, 2, 3)]
    async with in_front(FakeVllm(numbers, cpu=True, slots=4), tmp_path) as client:
        for step, folder in enumerate(held, 1):
            await until(lambda step=step, folder=folder: says(client, f"sql@step-{step}", fingerprint_of(folder)))
        put_checkpoint(run, 4)

        async def there() -> bool:
            found = (await client.get("/v1/adapters/sql")).json()["revisions"]
            return any(one["step"] == 4 and one["state"] != "incomplete" for one in found)

        await until(there)
        assert (await ask(client, "sql")).headers["x-lorakit-revision"].startswith("sql@step-3-")
        for step, folder in enumerate(held, 1):
            assert await says(client, f"sql@step-{step}", fingerprint_of(folder))


async def test_an_engine_that_was_started_anew_is_given_its_adapters_again(numbers: Path, tmp_path: Path) -> None:
    folder = put_checkpoint(tmp_path / "runs" / "sql", 1)
    async with AsyncExitStack() as first:
        url = await first.enter_async_context(listening(FakeVllm(numbers)))
        async with before(url, tmp_path) as client:
            assert await says(client, "sql", fingerprint_of(folder))
            await first.aclose()
            await until(lambda: refused(client))
            async with listening(FakeVllm(numbers), int(url.rpartition(":")[2])):
                await until(lambda: says(client, "sql", fingerprint_of(folder)))


async def refused(client: httpx.AsyncClient) -> bool:
    answer = await ask(client, "sql")
    return answer.status_code == 503 and "retry-after" in answer.headers


async def test_a_front_before_nothing_says_so_and_waits(numbers: Path, tmp_path: Path) -> None:
    async with listening(FakeVllm(numbers)) as url:
        pass
    http = Http(url)
    front = Front(http, settings_for(tmp_path), base_path="", max_rank=16)
    running = asyncio.create_task(front.run())
    async with httpx.AsyncClient(transport=httpx.ASGITransport(front), base_url="http://lorakit") as client:
        answer = await client.get("/v1/models")
    assert answer.status_code == 503
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await http.close()
