"""Faults of a real vLLM, one after the other on one server: what it starts is killed and stopped, under load."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.server.real import ENGINE_FLAGS, PROMPTS, QUICK, Server, ask, is_running, serving, write_checkpoint
from tests.server.test_real_restart import first_event
from tests.world import World

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
FLAGS = ("--max-loras", "2", "--max-lora-rank", "8", "--canary", "1", "--hang-limit", "20")
STREAMS = 1000
WORKERS = (*ENGINE_FLAGS, "--distributed-executor-backend", "mp")


@pytest.fixture(scope="module")
def server(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("supervision")
    for step, adapter in ((1, 0), (2, 1)):
        write_checkpoint(folder / "runs" / "sql", world.adapters[adapter], step)
    flags = ("--watch", str(folder / "runs"), *FLAGS)
    with serving(world.base, folder / "home", folder / "serve.log", *flags, engine=WORKERS) as server:
        yield server


def assert_answers(world: World, server: Server) -> None:
    with server.client() as client:
        for model, adapter in (("sql", 1), ("sql@step-1", 0), ("base", None)):
            assert ask(client, model).agrees_with(world.cold_answer(adapter, PROMPTS[0])), model


def process(server: Server, name: str) -> int:
    """The engine's process that calls itself so; vLLM's API process, without a name."""
    for pid in server.processes():
        told = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
        if name in told if name else "api_server" in told:
            return pid
    raise AssertionError(f"there is no {name}")


@pytest.mark.parametrize(
    ("name", "number"),
    [("", signal.SIGKILL), ("EngineCore", signal.SIGKILL), ("Worker", signal.SIGKILL), ("EngineCore", signal.SIGSTOP),
     ("", signal.SIGSTOP)],
)  # fmt: skip
def test_whatever_dies_or_stops_the_address_answers_and_all_is_as_it_was(
    world: World, server: Server, name: str, number: int
) -> None:
    assert_answers(world, server)
    before = server.processes()
    hit = process(server, name)
    answered: list[int] = []
    os.kill(hit, number)
    ends = time.monotonic() + 200
    while time.monotonic() < ends:
        try:
            answered.append(httpx.get(f"{server.url}/ready", timeout=90).status_code)
        except httpx.TransportError:  # it was being answered
            answered.append(0)
        if 503 in answered and answered[-1] == 200:
            break
        time.sleep(0.1)
    assert set(answered) <= {0, 200, 503}
    assert answered.count(0) <= 2, "the address was closed"
    assert not [pid for pid in before if is_running(pid)], "something of the engine is left"
    assert_answers(world, server)
    told = first_event(server, "engine")
    assert "the engine before this one ended" in told["message"]
    assert told["last_words"].strip()


def test_an_adapter_with_a_thousand_open_streams_is_unloaded_and_each_is_answered_to_its_end(
    world: World, server: Server
) -> None:
    body = {"model": "sql", "prompt": "hello", "max_tokens": 240, "ignore_eos": True, "stream": True}

    async def run() -> list[str]:
        limits = httpx.Limits(max_connections=STREAMS + 1)
        async with httpx.AsyncClient(base_url=server.url, timeout=300, limits=limits) as client:

            async def listen() -> str:
                async with client.stream("POST", "/v1/completions", json=body) as stream:
                    return [line async for line in stream.aiter_lines() if line][-1]

            async def open_at_once() -> int:
                view = (await client.get("/v1/adapters/sql")).json()
                return sum(revision["in_flight"] for revision in view["revisions"])

            listening = [asyncio.create_task(listen()) for _ in range(STREAMS)]
            while await open_at_once() < STREAMS:
                assert not any(task.done() for task in listening), "some ended before all were open"
            assert (await client.delete("/v1/adapters/sql")).status_code == 200
            assert (await client.post("/v1/completions", json={"model": "sql", "prompt": "a"})).status_code == 404
            return await asyncio.gather(*listening)

    assert asyncio.run(run()) == ["data: [DONE]"] * STREAMS
    with server.client() as client:
        assert ask(client, "base").agrees_with(world.cold_answer(None, PROMPTS[0]))


@contextmanager
def asking(url: str) -> Iterator[list[str]]:
    """Clients that ask without a pause: what went wrong."""
    wrong: list[str] = []
    ends = threading.Event()

    def keep_asking(model: str) -> None:
        with httpx.Client(base_url=url, timeout=60) as client:
            while not ends.is_set():
                try:
                    answer = client.post("/v1/completions", json={"model": model, "prompt": "a", "max_tokens": 4})
                    if answer.status_code != 200:
                        wrong.append(f"{answer.status_code} {answer.text}")
                except httpx.TransportError as error:
                    wrong.append(repr(error))

    clients = [threading.Thread(target=keep_asking, args=(model,)) for model in ("sql", "sql@step-1", "base")]
    for client in clients:
        client.start()
    try:
        yield wrong
    finally:
        ends.set()
        for client in clients:
            client.join()


def test_another_server_takes_over_without_a_failed_request_and_its_end_leaves_nothing(
    world: World, tmp_path: Path
) -> None:
    for step, adapter in ((1, 0), (2, 1)):
        write_checkpoint(tmp_path / "runs" / "sql", world.adapters[adapter], step)
    flags = ("--watch", str(tmp_path / "runs"), *FLAGS)
    home = tmp_path / "home"
    with taken_over(world.base, home, tmp_path, flags) as (old, start):
        with asking(old.url) as wrong:
            new = start()
            assert old.process.wait(200) == 0, (tmp_path / "new.log").read_text()[-3000:]
            time.sleep(1)
            assert not wrong
        assert_answers(world, new)
        left = new.processes()
        new.process.kill()  # and what it started is gone all the same
        new.wait_until(lambda: not any(is_running(pid) for pid in left))
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{new.url}/health")


@contextmanager
def taken_over(
    base: Path, home: Path, folder: Path, flags: tuple[str, ...]
) -> Iterator[tuple[Server, Callable[[], Server]]]:
    """A server, and what starts another in its place."""
    from tests.server.real import free_port, wait_for

    port = free_port()
    url = f"http://127.0.0.1:{port}"
    started: list[subprocess.Popen[bytes]] = []

    def start(*more: str, log: str) -> Server:
        command = [sys.executable, "-m", "lorakit", "serve", str(base), "--port", str(port), *flags, *more, "--",
                   *ENGINE_FLAGS]  # fmt: skip
        with (folder / log).open("wb") as stream:
            environ = {**os.environ, **QUICK, "LORAKIT_HOME": str(home)}
            started.append(subprocess.Popen(command, env=environ, stdout=stream, stderr=stream))
        return Server(started[-1], url, folder / log)

    old = start(log="old.log")
    try:
        with old.client() as client:
            wait_for(client, "/ready", old.process, old.log)
        yield old, lambda: start("--takeover", log="new.log")
    finally:
        for process in started:
            process.kill()
            process.wait()
