"""What every engine has to do, on real vLLM: lorakit's own, and one that somebody else started, over HTTP.

The last kind removes nothing: that it could is hidden from the gateway.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from safetensors.numpy import load_file, save_file

from lorakit.server.engines.remote import Http, RemoteEngine
from tests.server.real import PROMPTS, Server, answer_of, ask, started, write_checkpoint
from tests.world import PLACES, SLOTS, World

pytestmark = pytest.mark.timeout(240)
REMOVING = ["inside", "over HTTP"]
KEEPING = ["over HTTP, removing nothing"]
every = pytest.mark.parametrize("gateway", REMOVING + KEEPING, indirect=True, scope="module")
removing = pytest.mark.parametrize("gateway", REMOVING, indirect=True, scope="module")
keeping = pytest.mark.parametrize("gateway", KEEPING, indirect=True, scope="module")


@dataclass
class Engine:
    """A gateway, what it watches, where its vLLM tells of itself, and the run that a test writes into."""

    server: Server
    watched: Path
    metrics: str
    run: str
    removes: bool

    def put(self, world: World, adapter: int, step: int) -> str:
        """Write a checkpoint, wait until the run's name means it: the revision's name."""
        write_checkpoint(self.watched / self.run, world.adapters[adapter], step)

        def there() -> Any:
            name = self.server.adapter(self.run)["revision"]
            return name if name and f"@step-{step}-" in name else None

        found: str = self.server.wait_until(there)
        return found


@contextmanager
def in_front(base: Path, url: str, folder: Path) -> Iterator[Server]:
    """`lorakit serve --engine`, ready."""
    (folder / "runs").mkdir()
    flags = ("--engine", url, "--watch", str(folder / "runs"), "--max-loras", str(SLOTS), "--max-lora-rank", "8")
    with started(folder, "serve", str(base), *flags) as server:
        yield server


@contextmanager
def hiding_removal(url: str) -> Iterator[str]:
    """What stands before a vLLM, and keeps from others that it can remove adapters."""
    from tests.server.fake_vllm import listening

    address: list[str] = []
    up, ends = threading.Event(), threading.Event()

    async def run() -> None:
        http = Http(url)

        async def app(scope: Any, receive: Any, send: Any) -> None:
            if scope["path"] != "/openapi.json":
                await http.hand_on(scope, receive, send)
                return
            told = json.loads((await http.call("GET", "/openapi.json", None))[1])
            del told["paths"]["/collective_rpc"]
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": json.dumps(told).encode()})

        async with listening(app) as here:
            address.append(here)
            up.set()
            await asyncio.to_thread(ends.wait)
        await http.close()

    thread = threading.Thread(target=lambda: asyncio.run(run()))
    thread.start()
    up.wait(30)
    try:
        yield address[0]
    finally:
        ends.set()
        thread.join()


@pytest.fixture(scope="module")
def gateway(request: pytest.FixtureRequest, world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    kind, folder = request.param, tmp_path_factory.mktemp("engines")
    if kind == "inside":
        yield Engine(world.server, world.watched, f"{world.server.url}/metrics", "", True)
    elif kind == "over HTTP":
        with in_front(world.base, world.plain, folder) as server:
            yield Engine(server, folder / "runs", f"{world.plain}/metrics", "", True)
    else:
        with hiding_removal(world.plain) as url, in_front(world.base, url, folder) as server:
            yield Engine(server, folder / "runs", f"{world.plain}/metrics", "", False)
        asyncio.run(take_out_what_was_left(world, folder / "home"))


async def take_out_what_was_left(world: World, home: Path) -> None:
    """As the next gateway on this store does that may; other tests use the same vLLM."""
    http = Http(world.plain)
    engine = await RemoteEngine.connect(http, home, base_path=str(world.base), slots=SLOTS, max_rank=8)
    await engine.close()
    await http.close()


@pytest.fixture
def engine(gateway: Engine, request: pytest.FixtureRequest) -> Iterator[Engine]:
    """With a run of its own, gone at the end; one for all tests where what was taken once keeps its place."""
    gateway.run = f"engines-{request.node.originalname[-40:]}" if gateway.removes else "held"
    yield gateway
    if not gateway.removes:
        return
    with gateway.server.client() as client:
        client.delete(f"/v1/adapters/{gateway.run}")


@every
def test_an_adapter_a_second_one_and_the_base_answer_together_as_each_does_alone(world: World, engine: Engine) -> None:
    names = [engine.put(world, adapter, step) for step, adapter in ((1, 0), (2, 1))]
    asked = [
        (name, adapter, prompt)
        for prompt in PROMPTS
        for name, adapter in ((names[0], 0), (names[1], 1), ("base", None))
    ]

    def answers(one: tuple[str, int | None, str]) -> bool:
        name, adapter, prompt = one
        with engine.server.client() as client:
            found = ask(client, name, prompt)
        return found.revision == name and found.agrees_with(world.cold_answer(adapter, prompt))

    with ThreadPoolExecutor(9) as beside:
        assert all(beside.map(answers, asked * 2))


@every
def test_a_stream_says_what_an_answer_in_one_piece_does(world: World, engine: Engine) -> None:
    name = engine.put(world, 1, 2)
    body = {"model": name, "prompt": PROMPTS[0], "max_tokens": 6, "temperature": 0, "logprobs": 1, "stream": True}
    tokens: list[str] = []
    logprobs: list[float] = []
    with engine.server.client() as client, client.stream("POST", "/v1/completions", json=body) as stream:
        assert stream.headers["x-lorakit-revision"] == name
        for line in stream.iter_lines():
            if line.startswith("data: {"):
                choice = json.loads(line.removeprefix("data: "))["choices"][0]["logprobs"]
                tokens += choice["tokens"]
                logprobs += choice["token_logprobs"]
    said = {"model": name, "choices": [{"logprobs": {"tokens": tokens, "token_logprobs": logprobs}}]}
    assert answer_of(said, name).agrees_with(world.cold_answer(1, PROMPTS[0]))


@every
def test_a_client_that_leaves_ends_its_request(world: World, engine: Engine) -> None:
    body = {"model": "base", "prompt": "a", "max_tokens": 240, "ignore_eos": True, "stream": True}
    with engine.server.client() as client, client.stream("POST", "/v1/completions", json=body) as stream:
        next(stream.iter_lines())

    def ended() -> bool:
        told = [line for line in httpx.get(engine.metrics).text.splitlines() if "num_requests_running{" in line]
        return bool(told) and all(float(line.rpartition(" ")[2]) == 0 for line in told)

    engine.server.wait_until(ended)


@removing
def test_an_adapter_whose_first_token_is_no_number_is_refused_and_leaves_nothing(
    world: World, engine: Engine, tmp_path: Path
) -> None:
    good = engine.put(world, 2, 1)
    folder = write_checkpoint(tmp_path, world.adapters[3], 2)
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({name: tensor * 1e30 for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    folder.rename(engine.watched / engine.run / "checkpoint-2")

    def refused() -> Any:
        states = {one["step"]: one["state"] for one in engine.server.adapter(engine.run)["revisions"]}
        return states.get(2) == "refused"

    engine.server.wait_until(refused)
    with engine.server.client() as client:
        answer = ask(client, engine.run)
        assert answer.revision == good
        assert answer.agrees_with(world.cold_answer(2, PROMPTS[0]))


@removing
def test_more_adapters_than_fit_all_answer_right(world: World, engine: Engine) -> None:
    names = [engine.put(world, adapter, adapter + 1) for adapter in range(SLOTS + 2)]
    with engine.server.client() as client:
        for _ in range(2):
            for adapter, name in enumerate(names):
                assert ask(client, name).agrees_with(world.cold_answer(adapter, PROMPTS[0]))
            assert ask(client, "base").agrees_with(world.cold_answer(None, PROMPTS[0]))


@keeping
def test_more_than_it_can_hold_right_is_refused_in_words_and_the_rest_answers(world: World, engine: Engine) -> None:
    names = [engine.put(world, adapter, adapter + 1) for adapter in range(PLACES)]
    write_checkpoint(engine.watched / "more", world.adapters[PLACES], 1)
    engine.server.wait_until(lambda: "VLLM_SERVER_DEV_MODE=1" in engine.server.log.read_text())
    with engine.server.client() as client:
        for adapter, name in enumerate(names):
            assert ask(client, name).agrees_with(world.cold_answer(adapter, PROMPTS[0]))
        assert ask(client, "base").agrees_with(world.cold_answer(None, PROMPTS[0]))


@every
def test_an_adapter_is_unloaded_under_open_streams_and_each_is_answered_to_its_end(
    world: World, engine: Engine
) -> None:
    name = engine.put(world, 1, 2)
    streams = 32
    body = {"model": name, "prompt": "hello", "max_tokens": 60, "ignore_eos": True, "stream": True}
    opened, whole = threading.Barrier(streams + 1, timeout=60), []

    def listen_to_one() -> None:
        with engine.server.client() as client, client.stream("POST", "/v1/completions", json=body) as stream:
            opened.wait()
            whole.append([line for line in stream.iter_lines() if line][-1] == "data: [DONE]")

    listening = [threading.Thread(target=listen_to_one) for _ in range(streams)]
    for thread in listening:
        thread.start()
    opened.wait()
    with engine.server.client() as client:
        assert client.delete(f"/v1/adapters/{engine.run}").status_code == 200
        assert client.post("/v1/completions", json={"model": name, "prompt": "a"}).status_code == 404
        for thread in listening:
            thread.join()
        assert whole == [True] * streams
        time.sleep(0.1)
        assert ask(client, "base").agrees_with(world.cold_answer(None, PROMPTS[0]))


@every
def test_the_engines_own_metrics_come_through_with_lorakits_beside_them(engine: Engine) -> None:
    with engine.server.client() as client:
        ask(client, "base")
        found = {family.name: family for family in text_string_to_metric_families(client.get("/metrics").text)}
    assert found["vllm:num_requests_running"].samples
    assert len(found["vllm:lora_requests_info"].samples) == 1
    assert "base" in {one.labels["alias"] for one in found["lorakit_requests"].samples}
