"""Two real vLLMs behind one gateway: answers are right from both, and a death costs no more than what was in flight."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest

from lorakit.server.page.exposition import parse_exposition
from tests.server.peft_oracle import PeftOracle
from tests.server.real import PROMPTS, Answer, Server, answer_of, ask, is_running, serving, write_checkpoint
from tests.server.test_real_flips import streamed_while_it_moves
from tests.world import World

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
NAMES = ("one", "two", "three", "four")


@pytest.fixture(scope="module")
def server(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("replicas")
    for number, name in enumerate(NAMES):
        write_checkpoint(folder / "runs" / name, world.adapters[number], 1)
    flags = ("--watch", str(folder / "runs"), "--replicas", "2", "--max-loras", "3", "--max-lora-rank", "8",
             "--canary", "1", "--hang-limit", "20")  # fmt: skip
    with serving(world.base, folder / "home", folder / "serve.log", *flags) as server:
        yield server


def process(server: Server, *words: str) -> int:
    """The process that was started with all of these words."""
    for pid in server.processes():
        try:
            told = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if all(word in told for word in words):
            return pid
    raise AssertionError(f"there is no process of {words}")


def answered_by(server: Server) -> dict[str, float]:
    """How many requests each engine has answered."""
    with server.client() as client:
        told = parse_exposition(client.get("/metrics").text, ("vllm:",))
    return told.by("vllm:request_success_total", "replica")


@contextmanager
def clients(server: Server, *models: str) -> Iterator[list[tuple[str, int, Answer | str, float]]]:
    """Two that ask for each model, one after the other: model, status, answer or what was said instead, and when."""
    seen: list[tuple[str, int, Answer | str, float]] = []
    stop = threading.Event()

    def keep_asking(model: str) -> None:
        with server.client() as client:
            while not stop.is_set():
                body = {"model": model, "prompt": PROMPTS[0], "max_tokens": 6, "temperature": 0, "logprobs": 1}
                begun = time.monotonic()
                try:
                    answer = client.post("/v1/completions", json=body)
                except httpx.TransportError as error:
                    seen.append((model, 0, str(error), begun))
                    continue
                said = answer_of(answer.json(), None) if answer.status_code == 200 else answer.text
                seen.append((model, answer.status_code, said, begun))

    threads = [threading.Thread(target=keep_asking, args=(model,)) for model in models for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        yield seen
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)


def assert_right(world: World, seen: list[tuple[str, int, Answer | str, float]]) -> None:
    for model, status, said, _ in seen:
        if status == 200:
            assert isinstance(said, Answer)
            adapter = NAMES.index(model) if model in NAMES else None
            assert said.agrees_with(world.cold_answer(adapter, PROMPTS[0])), model


def test_both_answer_and_each_as_a_cold_server(world: World, server: Server) -> None:
    with clients(server, "base", *NAMES) as seen:
        server.wait_until(lambda: len(seen) > 150)
    assert_right(world, seen)
    assert {status for _, status, _, _ in seen} == {200}
    counted = answered_by(server)
    assert len(counted) == 2
    assert min(counted.values()) > 10


def test_an_engine_that_is_killed_costs_what_it_was_answering_and_comes_back_with_its_adapters(
    world: World, server: Server
) -> None:
    hit = process(server, "api_server", "/1.sock")
    with clients(server, "base", *NAMES) as seen:
        server.wait_until(lambda: len(seen) > 50)
        os.kill(hit, signal.SIGKILL)
        killed = time.monotonic()
        again = server.wait_until(lambda: process(server, "api_server", "/1.sock"))
        before = answered_by(server).get("1", 0.0) if "1" in answered_by(server) else 0.0
        server.wait_until(lambda: answered_by(server).get("1", 0.0) > before + 5, limit=120)
    assert again != hit
    assert not is_running(hit)
    assert_right(world, seen)
    failed = [(model, status, said, begun - killed) for model, status, said, begun in seen if status != 200]
    assert all(begun < 0.1 for *_, begun in failed), "what began after its death failed"
    assert len(failed) <= 10, "more failed than was in flight"


def test_an_engine_that_hangs_behind_an_api_that_answers_is_asked_nothing_more(world: World, server: Server) -> None:
    hit = process(server, "api_server", "/1.sock")
    (core,) = [one.pid for one in psutil.Process(hit).children() if "EngineCore" in " ".join(one.cmdline())]
    said = len(server.log.read_text())
    os.kill(core, signal.SIGSTOP)
    server.wait_until(lambda: "engine '1' does not answer: the others are asked" in server.log.read_text()[said:])
    with server.client(timeout=10) as client:  # it is ended after twice as long
        for adapter, name in [(None, "base"), *enumerate(NAMES)]:
            assert ask(client, name).agrees_with(world.cold_answer(adapter, PROMPTS[0]))
    assert is_running(hit)
    assert server.wait_until(lambda: process(server, "api_server", "/1.sock") != hit)
    with clients(server, "base", *NAMES) as seen:
        server.wait_until(lambda: answered_by(server).get("1", 0.0) > 5, limit=120)
    assert_right(world, seen)


def test_a_gateway_that_is_killed_is_back_without_its_engines_having_ended(world: World, server: Server) -> None:
    engines = [process(server, "api_server", f"/{number}.sock") for number in (0, 1)]
    os.kill(process(server, "spread.front"), signal.SIGKILL)
    with server.client() as client:
        server.wait_until(lambda: client.get("/ready").status_code == 200)
    assert all(is_running(pid) for pid in engines)
    with clients(server, "base", *NAMES) as seen:
        server.wait_until(lambda: len(seen) > 50)
    assert_right(world, seen)
    assert {status for _, status, _, _ in seen} == {200}


def test_a_name_that_moves_under_streams_mixes_no_answer_and_fails_none(world: World, server: Server) -> None:
    """As on one engine (test_real_flips.py); both of them answer."""
    with server.client() as client:
        for number, name in enumerate(NAMES):
            source = client.get(f"/v1/adapters/{name}").json()["revisions"][0]["source"]
            write_checkpoint(Path(source).parents[1] / "flips", world.adapters[number], number + 1)
            server.wait_until(lambda step=number + 1: server.adapter("flips")["step"] == step)
    revisions = {one["id"]: one["step"] - 1 for one in server.adapter("flips")["revisions"]}
    before = answered_by(server)
    oracle = PeftOracle(world.base, world.adapters[:4])
    seen = streamed_while_it_moves(server, "flips", revisions, oracle, 30.0, 1.0)
    counted = Counter(answered_by(server))
    counted.subtract(before)
    assert {answer.revision for answer in seen} == set(revisions)
    assert min(counted.values()) > len(seen) / 10
